# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from volumes import SPACING, coordinate_volume, write_itk, write_slice

Write = Callable[..., Path]


@atexit.register
def _forget_warning_filters() -> None:
    """Let the interpreter see the default filters again before it ends.

    It remembers those of its last warning. Had that been raised as an error in a test, so would be the one that SWIG
    gives when ITK is taken down, and that ends in a segmentation fault after the last test has passed.
    """
    warnings.warn("the tests are over", DeprecationWarning, stacklevel=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    folder = tmp_path / "cache_root"
    monkeypatch.setenv("MONAI_SSL_CACHE", str(folder))
    return folder


@pytest.fixture
def write_volume(tmp_path: Path) -> Write:
    """Write a volume below tmp_path; by default each voxel of (5, 6, 7) holds x + 10 y + 100 z plus `value`."""

    def write(name: str, array: Any = None, value: float = 0.0, affine: Any = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = coordinate_volume(value) if array is None else np.asarray(array)
        if name.endswith((".nii", ".nii.gz")):
            nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1.0]) if affine is None else affine), path)
        else:
            write_itk(path, array)
        return path

    return write


@pytest.fixture
def write_dicom(tmp_path: Path) -> Write:
    """Write the slices of a volume as one DICOM series, the files in an order that is not that of the slices."""

    def write(name: str, series: str = "1.2.826.0.1", value: float = 0.0, suffix: str = ".dcm") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        array = coordinate_volume(value).astype(np.int16)
        for z in range(array.shape[2]):
            write_slice(folder / f"{series}_{array.shape[2] - z}{suffix}", array[:, :, z : z + 1], z, series)
        return folder

    return write
