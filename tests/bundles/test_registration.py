# SPDX-License-Identifier: Apache-2.0
"""What only the bundle of arXiv 2109.11572 does: pairs from a file, their points and labels, a loss on embeddings."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from monai_ssl.apps import Registration, read_alignment, write_alignment

from .conftest import Trained
from .running import chain, copy_bundle, item, make, run
from .settings import REGISTRATION

pytestmark = pytest.mark.parametrize("bundle", ["samreg_unet_ct"], indirect=True)
SHIFT = 20.0  # mm, of the moving scan in the world


@pytest.fixture
def pairs(dataset: Path, tmp_path: Path) -> Path:
    """A scan and the same one 20 mm further along the first axis of the world, with labels and a point."""
    fixed = sorted((dataset / "images").iterdir())[0]
    entry: dict[str, Any] = {}
    for role, shift in (("moving", SHIFT), ("fixed", 0.0)):
        for folder, name in (("images", role), ("labels", f"{role}_label")):
            source = nibabel.load(dataset / folder / fixed.name)
            affine = source.affine.copy()
            affine[0, 3] += shift
            nibabel.save(nibabel.Nifti1Image(np.asarray(source.dataobj), affine), tmp_path / f"{name}.nii.gz")
            entry[name] = f"{name}.nii.gz"
    centre = nibabel.affines.apply_affine(source.affine, np.array(source.shape) / 2)
    entry["fixed_points"], entry["moving_points"] = [centre.tolist()], [(centre + [SHIFT, 0, 0]).tolist()]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([entry]))
    return file


@pytest.mark.parametrize("part", ["", "test"])
def test_evaluation_of_pairs(bundle: Path, quickly_trained: Trained, pairs: Path, tmp_path: Path, part: str) -> None:
    """Untrained the network moves nothing, so before and after are the same; the point is 20 mm off."""
    if part:  # held-out pairs alone
        pairs.write_text(json.dumps({part: json.loads(pairs.read_text())}))
    options = {**quickly_trained.overrides, "pairs": str(pairs), "output_dir": str(tmp_path / "out")}
    workflow = run(make(quickly_trained.root, "train.yaml", "evaluate.yaml", **options))
    metrics = item(workflow, "validate#evaluator").state.metrics
    assert set(metrics) == {"mean_dice", "dice_before", "folding", "sdlogj", "TRE_mm", "TRE_before_mm", "seconds"}
    assert metrics["TRE_before_mm"] == pytest.approx(SHIFT, abs=1e-3)
    assert metrics["TRE_mm"] == pytest.approx(SHIFT, abs=1.0)
    assert 0.2 < metrics["dice_before"] < 0.8
    assert metrics["mean_dice"] == pytest.approx(metrics["dice_before"], abs=0.05)
    with (tmp_path / "out" / "mean_dice_raw.csv").open(newline="") as stream:
        assert len(list(csv.reader(stream, delimiter="\t"))) == 2  # the heading and the pair
    assert (tmp_path / "out" / "registration_0001_1.png").stat().st_size > 10_000


def test_an_evaluation_or_inference_of_nothing_is_an_error(
    bundle: Path, quickly_trained: Trained, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(sorted(scans.iterdir())[0], tmp_path / "alone")
    options = {**quickly_trained.overrides, "val_fraction": 0.17}  # one volume is held out
    workflows = [
        lambda: make(quickly_trained.root, "train.yaml", "evaluate.yaml", **options),
        lambda: make(
            quickly_trained.root, "inference.yaml", kind="infer", prealign=[], dataset_dir=str(tmp_path / "alone")
        ),
    ]
    for workflow in workflows:
        with pytest.raises(RuntimeError) as caught:
            run(workflow())
        assert any("there is no pair of scans" in str(error) for error in chain(caught.value))


def test_evaluation_takes_a_known_alignment(
    bundle: Path, quickly_trained: Trained, pairs: Path, tmp_path: Path
) -> None:
    """With the shift as the earlier registration labels agree and the point is met."""

    aligned = make(
        quickly_trained.root,
        "train.yaml",
        **{**quickly_trained.overrides, "pairs": str(pairs), "output_dir": str(tmp_path)},
    )
    grid = read_alignment(item(aligned, "validate#pairs")[0]["alignment"])
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 3] = SHIFT
    found = Registration(affine, None, grid.grid_affine, grid.grid_size, grid.points, grid.scores, {})
    write_alignment(tmp_path / "known.pt", found)
    entries = [{**json.loads(pairs.read_text())[0], "alignment": "known.pt"}]
    pairs.write_text(json.dumps(entries))
    options = {**quickly_trained.overrides, "pairs": str(pairs), "output_dir": str(tmp_path / "out")}
    workflow = run(make(quickly_trained.root, "train.yaml", "evaluate.yaml", **options))
    metrics = item(workflow, "validate#evaluator").state.metrics
    assert metrics["TRE_mm"] < 1.0
    assert metrics["mean_dice"] > 0.95
    assert metrics["dice_before"] < 0.8


def keep(engine: Engine, losses: dict[float, float], weight: float) -> None:
    losses[weight] = engine.state.output["loss"].item()


def test_similarity_of_embeddings(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """The option adds its term to the loss, through which the network learns and the embedder does not."""
    losses: dict[float, float] = {}
    for weight in (0.0, 10.0):
        options = {**REGISTRATION, "dataset_dir": str(dataset), "max_epochs": 1, "embedding_weight": weight}
        workflow = make(copy_bundle(bundle, tmp_path / str(weight)), "train.yaml", **options)
        trainer, embedder = item(workflow, "train#trainer"), item(workflow, "embedder")
        before = {name: value.clone() for name, value in embedder.state_dict().items()}
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), keep, losses, weight)
        run(workflow)
        assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())
    assert 0 < losses[10.0] - losses[0.0] < 20  # ten times a mean of 1 - cosine


def test_no_embedder_is_an_error_that_tells_what_to_do(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    options = {**REGISTRATION, "dataset_dir": str(dataset), "embedder_file": ""}
    with pytest.raises(Exception) as caught:
        run(make(copy_bundle(bundle, tmp_path), "train.yaml", **options))
    assert any(
        "embedder_file is empty" in str(error) and "sam_resnet18_ct" in str(error) for error in chain(caught.value)
    )


def test_baseline_needs_no_embedder(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    options = {**REGISTRATION, "dataset_dir": str(dataset), "embedder_file": "", "max_epochs": 1}
    root = copy_bundle(bundle, tmp_path)
    workflow = run(make(root, "train.yaml", "voxelmorph.yaml", **options))
    assert item(workflow, "train#trainer").state.iteration == 2
    names = torch.load(root / "models" / "model.pt", weights_only=True)
    assert not any(name.startswith("embedder.") for name in names)
