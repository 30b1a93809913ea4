# SPDX-License-Identifier: Apache-2.0
"""Data that cannot be used: every bundle ends with an error that names the file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from .running import chain, command_line, copy_bundle, item, make, run, start
from .settings import PATIENT, BundleSettings

BAD = f"{PATIENT}44.nii.gz"


def truncate(dataset: Path) -> None:
    file = dataset / "images" / BAD
    file.write_bytes(file.read_bytes()[:4000])


def not_a_volume(dataset: Path) -> None:
    (dataset / "images" / BAD).write_text("not found\n")


def fill(value: float) -> Callable[[Path], None]:
    def spoil(dataset: Path) -> None:
        file = dataset / "images" / BAD
        image = nibabel.load(file)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
        voxels = np.full_like(voxels, value) if np.isfinite(value) else np.where(voxels > 0, value, voxels)
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), image.affine), file)

    return spoil


def remove_all(dataset: Path) -> None:
    shutil.rmtree(dataset)
    dataset.mkdir()


def remove_folder(dataset: Path) -> None:
    shutil.rmtree(dataset)


SPOILT = {
    "truncated": (truncate, BAD),
    "not a volume": (not_a_volume, BAD),
    "NaN": (fill(float("nan")), BAD),
    "infinite": (fill(float("inf")), BAD),
    "constant": (fill(-1000.0), BAD),
    "empty folder": (remove_all, "spoilt"),
    "no folder": (remove_folder, "spoilt"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_error_names_what_is_wrong(
    bundle: Path, overrides: dict[str, Any], dataset: Path, kind: str, tmp_path: Path
) -> None:
    spoil, named = SPOILT[kind]
    spoilt = shutil.copytree(dataset, tmp_path / "spoilt")
    spoil(spoilt)
    root = copy_bundle(bundle, tmp_path)
    with pytest.raises(Exception) as caught:
        run(make(root, "train.yaml", **{**overrides, "dataset_dir": str(spoilt)}))
    errors = chain(caught.value)
    assert not isinstance(errors[-1], (AssertionError, AttributeError, IndexError, KeyError, TypeError))
    assert any(named in str(error) for error in errors), errors
    assert not list(root.rglob("*.pt"))


def test_the_process_fails(bundle: Path, overrides: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(dataset, tmp_path / "spoilt")
    truncate(spoilt)
    root = copy_bundle(bundle, tmp_path)
    options = {**overrides, "dataset_dir": str(spoilt), "bundle_root": str(root)}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(root / "configs" / "train.yaml")]
    done = start([*command, *command_line(options)], cwd=tmp_path)
    assert done.returncode != 0
    assert BAD in done.stderr


def test_skip_bad_goes_on(
    bundle: Path, settings: BundleSettings, quick: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(dataset, tmp_path / "spoilt")
    truncate(spoilt)
    root = copy_bundle(bundle, tmp_path)
    options = {**quick, "dataset_dir": str(spoilt), "skip_bad": True, "max_epochs": 1, "batch_size": 2}
    with pytest.warns(UserWarning, match=r"1 of \d+ volumes are left out"):
        run(make(root, *settings.quick_files, **options))
    assert (root / "models" / "model.pt").is_file()
    assert any(BAD in path.read_text() for path in (root / "models").glob("*.txt"))


def test_fewer_volumes_than_a_batch(bundle: Path, overrides: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    """A run that drops incomplete batches would have none, train nothing and say that all is well."""
    root = copy_bundle(bundle, tmp_path)
    workflow = make(root, "train.yaml", **{**overrides, "dataset_dir": str(dataset), "batch_size": 50})
    if workflow.parser.get("train#dataloader").get("drop_last"):
        with pytest.raises(Exception) as caught:
            run(workflow)
        assert any("lower batch_size" in str(error) for error in chain(caught.value)), caught.value
    else:
        run(workflow)
        assert item(workflow, "train#trainer").state.iteration >= 1
