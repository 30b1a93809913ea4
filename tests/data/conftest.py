# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

SIZE = (5, 6, 7)
SPACING = (1.0, 2.0, 3.0)
Write = Callable[..., Path]


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
            _write_itk(path, array)
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
            _write_slice(folder / f"{series}_{array.shape[2] - z}{suffix}", array[:, :, z : z + 1], z, series)
        return folder

    return write


def coordinate_volume(value: float = 0.0) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij")
    return (x + 10 * y + 100 * z + value).astype(np.float32)


def _itk() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's, while ITK loads; as an error it is a crash
        import itk

        itk.GDCMImageIO.New()
        itk.image_from_array(np.zeros((2, 2, 2), np.float32))
    return itk


def _write_itk(path: Path, array: np.ndarray) -> None:
    itk = _itk()
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    image.SetSpacing([float(step) for step in SPACING])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        itk.imwrite(image, str(path))


def _write_slice(path: Path, array: np.ndarray, z: int, series: str) -> None:
    itk = _itk()
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    origin = [0.0, 0.0, SPACING[2] * z]
    image.SetSpacing([float(step) for step in SPACING])
    image.SetOrigin(origin)
    tags = {
        "0008|0018": f"{series}.{z + 1}",
        "0008|0060": "CT",
        "0020|000d": "1.2.3",
        "0020|000e": series,
        "0020|0013": str(z + 1),
        "0020|0032": "\\".join(str(value) for value in origin),
        "0020|0037": "1\\0\\0\\0\\1\\0",
    }
    meta = image.GetMetaDataDictionary()
    for tag, text in tags.items():
        meta[tag] = text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        writer_io = itk.GDCMImageIO.New(KeepOriginalUID=True)
        itk.ImageFileWriter.New(Input=image, FileName=str(path), ImageIO=writer_io).Update()
