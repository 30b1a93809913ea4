# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (5, 6, 7)
SPACING = (1.0, 2.0, 3.0)


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


def write_itk(path: Path, array: np.ndarray) -> None:
    itk = _itk()
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    image.SetSpacing([float(step) for step in SPACING])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        itk.imwrite(image, str(path))


def write_slice(path: Path, array: np.ndarray, z: int, series: str) -> None:
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
