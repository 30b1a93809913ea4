# SPDX-License-Identifier: Apache-2.0
"""What a training leaves, and what can be done with it: resume, evaluate, infer, load elsewhere."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from monai_ssl.networks import read_provenance

from .conftest import Trained
from .running import chain, command_line, copy_bundle, item, load_config, make, power_cut, run, start
from .settings import OWN_ENCODER, PATIENT, BundleSettings

LOAD_WITHOUT_US = """
import json, sys
sys.modules["monai_ssl"] = None
try:
    import monai_ssl
except ImportError:
    pass
else:
    raise SystemExit("monai_ssl can be imported")
import torch
from monai.bundle import ConfigParser
file, encoder = sys.argv[1], json.loads(sys.argv[2])
attribute, not_in_file = encoder.pop("attribute"), tuple(encoder.pop("not_in_file", ()))
network = ConfigParser({"network": encoder}).get_parsed_content("network")
part = network.get_submodule(attribute)
state = torch.load(file, weights_only=True)
before = {name: value.clone() for name, value in part.state_dict().items()}
report = part.load_state_dict(state, strict=not not_in_file)
assert not report.unexpected_keys, report
assert all(name.startswith(not_in_file) for name in report.missing_keys), report
assert all(torch.equal(part.state_dict()[name], value) for name, value in state.items())
assert any(not torch.equal(before[name], value) for name, value in state.items())
print(json.dumps(state._metadata["monai_ssl"]))
"""


def values(item: Any) -> Iterator[Any]:
    """All values in nested containers."""
    if isinstance(item, dict):
        for value in item.values():
            yield from values(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from values(value)
    else:
        yield item


def weights(root: Path) -> dict[str, Any]:
    """All weight files that a whole training leaves; checkpoints also hold when they were written."""
    files = [path for path in (root / "models").glob("*.pt") if not path.name.startswith("checkpoint")]
    assert {"model.pt"} <= {path.name for path in files}
    return {path.name: torch.load(path, weights_only=True) for path in files}


def test_training_from_anywhere(trained: Trained) -> None:
    assert trained.iterations == 2
    assert list(trained.working_directory.iterdir()) == []
    state = torch.load(trained.root / "models" / "model.pt", weights_only=True)
    network = item(make(trained.root, "train.yaml", **trained.overrides), "network_def")
    network.load_state_dict(state, strict=True)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("run_of", ["trained", "quickly_trained"])
def test_no_weights_file_tells_a_patient(bundle: Path, run_of: str, request: pytest.FixtureRequest) -> None:
    """And all can be loaded without running code."""
    trained: Trained = request.getfixturevalue(run_of)
    files = list(trained.root.rglob("*.pt"))
    assert len(files) >= 2
    for path in files:
        assert PATIENT.encode() not in path.read_bytes(), path
        loaded = list(values(torch.load(path, weights_only=True)))
        assert loaded
        assert not any(isinstance(value, MetaTensor) for value in loaded), path
    for path in (trained.root / "models").glob("*.json"):
        assert PATIENT not in path.read_text(), path


def test_nothing_temporary_is_left(trained: Trained) -> None:
    names = [path.name for path in (trained.root / "models").iterdir()]
    assert not [name for name in names if name.startswith((".", "tmp")) or name.endswith((".tmp", ".part"))]


def test_encoder_loads_without_this_package(trained: Trained, bundle: Path, settings: BundleSettings) -> None:
    if "pretext" not in load_config(bundle, "train.yaml"):
        assert not (trained.root / "models" / "encoder.pt").exists()
        return
    name_of_file, prefix = settings.encoder_file
    file = trained.root / "models" / name_of_file
    if bundle.name in OWN_ENCODER:
        pytest.skip("the encoder is this package's own, MONAI has none like it")
    declared = json.loads((bundle / "configs" / "metadata.json").read_text())["ssl"]["encoder"]
    arguments = json.dumps({**declared, **settings.encoder})
    done = start([sys.executable, "-c", LOAD_WITHOUT_US, str(file), arguments], cwd=trained.root)
    assert done.returncode == 0, done.stderr
    provenance = json.loads(done.stdout.splitlines()[-1])
    assert provenance == read_provenance(file) == json.loads(file.with_suffix(".json").read_text())
    assert provenance["arxiv"] == json.loads((bundle / "configs" / "metadata.json").read_text())["ssl"]["arxiv"]
    network = torch.load(file.with_name("model.pt"), weights_only=True)
    for name, value in torch.load(file, weights_only=True).items():
        assert torch.equal(network[f"{prefix}{name}"], value)


@pytest.mark.parametrize(
    "more, dies_at", [({}, 3), ({"checkpoint_steps": 1}, 2)], ids=["after an epoch", "within an epoch"]
)
def test_resume(quickly_trained: Trained, more: dict[str, Any], dies_at: int, bundle: Path, tmp_path: Path) -> None:
    """A run that dies and is continued ends with the same bits as one that does not."""
    whole = quickly_trained
    assert whole.iterations == 4
    root = copy_bundle(bundle, tmp_path)
    workflow = make(root, *whole.files, **whole.overrides, **more)
    with power_cut(workflow, dies_at):
        run(workflow)
    assert not (root / "models" / "model.pt").exists()
    torch.manual_seed(99)
    resumed = run(make(root, *whole.files, **whole.overrides, **more, resume=True))
    assert item(resumed, "train#trainer").state.iteration == whole.iterations
    expected, found = weights(whole.root), weights(root)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert state.keys() == found[name].keys()
        assert [key for key, value in state.items() if not torch.equal(found[name][key], value)] == [], name


def test_best_weights_survive_a_resume(quickly_trained: Trained, bundle: Path, tmp_path: Path) -> None:
    """A run that is continued knows what was best before, and keeps it when nothing better comes."""
    if not list((quickly_trained.root / "models").glob("*best*.pt")):
        return
    root = copy_bundle(bundle, tmp_path)

    def prepare(metric: float, **more: Any) -> ConfigWorkflow:
        workflow = make(root, *quickly_trained.files, **quickly_trained.overrides, **more)
        for handler in item(workflow, "validate#key_metric").values():
            handler.compute = lambda: metric
        return workflow

    workflow = prepare(0.9)
    with power_cut(workflow, 3):
        run(workflow)
    (best,) = (root / "models").glob("*best*.pt")
    before = best.read_bytes()
    run(prepare(0.1, resume=True))
    assert best.read_bytes() == before


def test_a_second_run_does_not_overwrite_the_first(quickly_trained: Trained) -> None:
    first = quickly_trained
    before = {path: path.stat().st_mtime_ns for path in (first.root / "models").iterdir()}
    with pytest.raises(RuntimeError) as caught:
        run(make(first.root, *first.files, **first.overrides))
    assert any(isinstance(error, FileExistsError) and "--resume" in str(error) for error in chain(caught.value))
    assert {path: path.stat().st_mtime_ns for path in (first.root / "models").iterdir()} == before


def test_evaluation_repeats(quickly_trained: Trained, tmp_path: Path) -> None:
    results = []
    for attempt in ("first", "second"):
        torch.manual_seed(len(attempt))
        output = tmp_path / attempt
        options = {**quickly_trained.overrides, "output_dir": str(output)}
        workflow = make(quickly_trained.root, *quickly_trained.files, "evaluate.yaml", **options)
        metrics = dict(item(run(workflow), "validate#evaluator").state.metrics)
        results.append({name: value for name, value in metrics.items() if name != "seconds"})
        assert (output / "metrics.csv").stat().st_size > 0
    assert results[0]
    assert results[0] == results[1]
    assert all(math.isfinite(float(np.nanmean(value))) for value in results[0].values()), results[0]


def box(image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest world coordinates (mm) of an image's outer faces."""
    corners = np.array(list(product(*((-0.5, size - 0.5) for size in image.shape[:3]))))
    world = nibabel.affines.apply_affine(image.affine, corners)
    return world.min(0), world.max(0)


def test_inference(trained: Trained, settings: BundleSettings, scans: Path, tmp_path: Path) -> None:
    """One file per scan, over the same space as the scan, or a table of all."""
    overrides = {**settings.inference, "dataset_dir": str(scans), "output_dir": str(tmp_path)}
    run(make(trained.root, "inference.yaml", kind="infer", **overrides))
    sources = sorted(scans.iterdir())
    if settings.table:
        rows = list(csv.DictReader((tmp_path / settings.table).read_text().splitlines()))
        assert [row["name"] for row in rows] == [scan.name for scan in sources]
        numbers = np.array([[float(row[name]) for name in overrides["class_names"]] for row in rows])
        np.testing.assert_allclose(numbers.sum(1), 1, atol=1e-5)
        return
    written = sorted(tmp_path.rglob("*.nii.gz"))
    assert len(written) == len(sources) == 2
    for scan, file in zip(sources, written):
        assert file.name.startswith(scan.name.removesuffix(".nii.gz"))
        source, result = nibabel.load(scan), nibabel.load(file)
        if settings.same_grid:
            assert result.shape == source.shape
            np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
        voxel = np.abs(result.affine[:3, :3]).sum(1)
        (low, high), (first, last) = box(source), box(result)
        assert (np.abs((first + last) - (low + high)) / 2 < voxel).all(), "not centred on the scan"
        assert (first < low + voxel).all(), "does not cover the scan"
        assert (last > high - voxel).all(), "does not cover the scan"


def test_without_data_the_phantom_is_used(
    bundle: Path, settings: BundleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written once into the cache folder, which the environment names."""
    monkeypatch.setenv("MONAI_SSL_CACHE", str(tmp_path / "cache"))
    phantom = {"num_subjects": 5, "size": [30, 24, 27], "seed": 0}
    options = {**settings.quick, "max_epochs": 1, "phantom": phantom}
    roots = [copy_bundle(bundle, tmp_path / name) for name in ("first", "second")]
    run(make(roots[0], *settings.quick_files, **options))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nii.gz")}
    assert len([path for path in written if path.parent.name.startswith("images")]) == 5
    run(make(roots[1], *settings.quick_files, **options))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nii.gz")} == written
    first, second = weights(roots[0]), weights(roots[1])
    for name, state in first.items():
        assert all(torch.equal(second[name][key], value) for key, value in state.items()), "same seed, other weights"


def test_command_line_writes_below_the_working_directory(
    bundle: Path, settings: BundleSettings, quick: dict[str, Any], tmp_path: Path
) -> None:
    """Without bundle_root, and without touching the bundle."""
    root = copy_bundle(bundle, tmp_path)
    before = sorted(root.rglob("*"))
    here = tmp_path / "here"
    here.mkdir()
    files = str([str(root / "configs" / file) for file in settings.quick_files])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files]
    done = start([*command, *command_line({**quick, "max_epochs": 1})], cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (here / "models" / "model.pt").is_file()
    assert (here / "eval").is_dir()
    assert sorted(root.rglob("*")) == before
