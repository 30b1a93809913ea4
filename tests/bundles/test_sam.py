# SPDX-License-Identifier: Apache-2.0
"""What only the bundle of arXiv 2012.02383 does: matching, tracking, and images with two axes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import SegResNet
from monai.transforms import Compose, RandGaussianNoised

from monai_ssl.apps import load_matcher
from monai_ssl.networks import SegResNetEncoder, load_pretrained

from .conftest import Trained
from .running import copy_bundle, item, load_config, make, run
from .settings import CPU, SAM

pytestmark = pytest.mark.parametrize("bundle", ["sam_resnet18_ct"], indirect=True)
MATCH = {"device": CPU["device"], "max_cycle_mm": None}


def inside(scan: Path) -> list[float]:
    """A place in the middle of a scan, RAS mm."""
    image = nibabel.load(scan)
    return nibabel.affines.apply_affine(image.affine, np.array(image.shape) / 2).tolist()


def test_match_and_track(bundle: Path, quickly_trained: Trained, scans: Path, tmp_path: Path) -> None:
    """A scan in itself: every point is found where it is, by both workflows and by the matcher in Python."""
    template, other = sorted(scans.iterdir())
    points = [inside(template)]
    options = {**MATCH, "output_dir": str(tmp_path / "match")}
    queries = [str(template), str(other)]
    run(make(quickly_trained.root, "match.yaml", template=str(template), points=points, queries=queries, **options))
    with (tmp_path / "match" / "tracking.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = [float(rows[0][f"target_{axis}"]) for axis in "xyz"]
    assert found == pytest.approx(points[0], abs=10.0)  # half a cell
    assert float(rows[0]["score"]) > 0.99
    assert len(rows) == 2
    matcher = load_matcher(quickly_trained.root, device="cpu")
    assert matcher.match(template, template, points).points[0].tolist() == pytest.approx(found, abs=1e-3)
    pairs = tmp_path / "pairs.json"
    entry = {"id": "a", "source": str(template), "target": str(template), "points": points, "truth": points}
    pairs.write_text(json.dumps([entry]))
    options["output_dir"] = str(tmp_path / "track")
    run(make(quickly_trained.root, "track_lesions.yaml", pairs=str(pairs), **options))
    with (tmp_path / "track" / "tracking.csv").open(newline="") as stream:
        assert float(next(csv.DictReader(stream))["distance_mm"]) < 18  # half a cell along each axis
    assert (tmp_path / "track" / "a_target.mrk.json").is_file()


def test_evaluation_of_pairs(
    bundle: Path, quickly_trained: Trained, scans: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lesions with known places, in the same run as the errors on views."""
    template = min(scans.iterdir())
    points = [inside(template)]
    entry = {"id": "a", "source": str(template), "target": str(template), "points": points, "truth": points}
    (tmp_path / "pairs.json").write_text(json.dumps([{**entry, "radius_mm": 30}]))
    options = {**quickly_trained.overrides, "output_dir": str(tmp_path), "pairs": str(tmp_path / "pairs.json")}
    run(make(quickly_trained.root, *quickly_trained.files, "evaluate.yaml", **options))
    assert "MED_elastic_mm" in (tmp_path / "metrics.csv").read_text()
    summary = json.loads((tmp_path / "tracking.json").read_text())["summary"]
    assert summary["MED_mm"] < 18  # half a cell along each axis
    assert summary["CPM@Radius"] == 1
    printed = capfd.readouterr().out
    for name in ("MED_mm", "CPM@10mm_plain", "CPM@10mm_min_radius", "CPM@Radius"):
        assert f"'{name}': {summary[name]}" in printed


def test_views_are_changed_each_by_itself(bundle: Path) -> None:
    """Noise that both views share would tell which voxels correspond."""
    config = load_config(bundle, "train.yaml")
    for part in ("intensities", "intensities_2"):
        for transform in config[part]:
            transform["prob"] = 1.0
    parser = ConfigParser({name: config[name] for name in ("imports", "intensities", "intensities_2")})
    parser.get_parsed_content("imports")
    views = [parser.get_parsed_content(part) for part in ("intensities", "intensities_2")]
    assert [type(t) for t in views[0]] == [type(t) for t in views[1]]
    assert [{key for t in part for key in t.keys} for part in views] == [{"image"}, {"image_2"}]
    flat = torch.full((1, 12, 20, 24), 40.0)
    for seed in range(3):
        for change, change_2 in zip(*views):
            both = Compose([change, change_2]).set_random_state(seed)
            out = both({"image": flat.clone(), "image_2": flat.clone()})
            pair = torch.stack([out[key].as_subclass(torch.Tensor).flatten() for key in ("image", "image_2")])
            if isinstance(change, RandGaussianNoised):
                assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.1
            assert (pair[0] - pair[1]).abs().max() > 0.1


def test_errors_by_known_warps(quickly_trained: Trained, tmp_path: Path) -> None:
    """Both errors in the report; the elastic one follows the field, of which a flat one leaves no error to make."""
    errors = []
    for amplitude in (60.0, 0.001):
        options = {**quickly_trained.overrides, "output_dir": str(tmp_path / str(amplitude))}
        options |= {"elastic_amplitude": amplitude, "elastic_wavelength": 700.0}
        run(make(quickly_trained.root, *quickly_trained.files, "evaluate.yaml", **options))
        rows = (tmp_path / str(amplitude) / "metrics.csv").read_text().splitlines()
        errors.append({name: float(value) for name, value in (row.rsplit(",", 1) for row in rows)})
    assert errors[0]["MED_mm"] == errors[1]["MED_mm"] > 0
    assert errors[0]["MED_elastic_mm"] > 20  # mm, a network that has learnt nothing
    assert errors[1]["MED_elastic_mm"] < 10  # half a cell


def test_another_encoder(bundle: Path, overrides: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    """The provenance says what was trained, so that matching builds it again; the encoder is the MONAI network's."""
    root = copy_bundle(bundle, tmp_path)
    options = {**overrides, "init_filters": 8, "max_iterations": 2, "output_dir": str(tmp_path / "eval")}
    run(make(root, "train.yaml", "segresnet.yaml", **options))
    described = json.loads((root / "models" / "encoder.json").read_text())["network"]
    assert described["encoder"]["net"]["_target_"] == "monai.networks.nets.SegResNet"
    template = min(scans.iterdir())
    point = inside(template)
    matcher = load_matcher(root, device="cpu")
    assert matcher.match(template, template, [point]).points[0].tolist() == pytest.approx(point, abs=10.0)
    load_pretrained(SegResNetEncoder(SegResNet(in_channels=1, init_filters=8)), root / "models" / "encoder.pt")
    narrow = {"device": CPU["device"], "embed_dim": 16, "pixdim": [10.0] * 3, "stride": [8] * 3, "init_filters": 8}
    narrow |= {"dataset_dir": str(scans), "output_dir": str(tmp_path / "maps")}
    run(make(root, "inference.yaml", "segresnet.yaml", kind="infer", **narrow))
    assert len(list((tmp_path / "maps").glob("*.nii.gz"))) == 2


def test_an_encoder_that_is_not_described_is_named(bundle: Path, overrides: dict[str, Any], tmp_path: Path) -> None:
    encoder = {"_target_": "SegResNetEncoder", "net": {"_target_": "SegResNet", "init_filters": 8}}
    workflow = make(copy_bundle(bundle, tmp_path), "train.yaml", **{**overrides, "encoder": encoder})
    assert item(workflow, "pretext").channels == [8, 16, 32, 64]
    assert item(workflow, "described")["_target_"].endswith(".SegResNetEncoder")


def test_two_dimensions(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    slices = tmp_path / "slices"
    slices.mkdir()
    for path in sorted((dataset / "images").iterdir()):
        image = nibabel.load(path)
        plane = np.asarray(image.dataobj)[:, :, image.shape[2] // 2]
        nibabel.save(nibabel.Nifti1Image(plane, image.affine), slices / path.name)
    options: dict[str, Any] = {**SAM, "dataset_dir": str(slices), "max_iterations": 2, "roi_size": [32, 32]}
    options |= {"spacing": [10.0, 10.0], "pixdim": [10.0, 10.0]}
    workflow = make(copy_bundle(bundle, tmp_path), "train.yaml", "two_dimensions.yaml", **options)
    assert workflow.check_properties() == []
    run(workflow)
    assert item(workflow, "train#trainer").state.iteration == 2
    metrics = item(workflow, "validate#evaluator").state.metrics
    assert 0 < metrics["MED_mm"] < 500
    assert 0 < metrics["MED_elastic_mm"] < 500
    assert (tmp_path / bundle.name / "models" / "model.pt").is_file()
