# SPDX-License-Identifier: Apache-2.0
"""Transforms as files of ITK and NIfTI, whose world is LPS mm (SAMReg)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.utils import optional_import
from torch import Tensor

from monai_ssl.transforms.view_geometry import spacing_of

__all__ = [
    "FORMATS",
    "check_formats",
    "to_lps",
    "write_affine",
    "write_composite",
    "write_displacement",
    "write_image",
    "written_files",
]

FORMATS = {"tfm": "_affine.tfm", "h5": ".h5", "nifti": "_displacement.nii.gz", "warped": "_warped.nii.gz"}
_VECTOR = 1007  # as written, LPS; with 1006 ITK takes components for RAS and negates them
_ORTHOGONAL = 1e-4  # cosine between axes: headers round
_AFFINE = "AffineTransform_double_3_3"

h5py, _HAS_H5PY = optional_import("h5py")


def to_lps(affine: Tensor) -> Tensor:
    """A transform of RAS mm as one of LPS mm: F A F with F = diag(-1, -1, 1, 1); its own inverse. (4, 4)."""
    flip = torch.tensor([-1, -1, 1, 1], dtype=torch.float64)
    return flip[:, None] * affine.cpu().double() * flip + 0.0  # no -0


def check_formats(formats: Sequence[str], grid_affine: Tensor) -> None:
    """Whether a transform on a grid can be written.

    Args:
        formats: keys of `FORMATS`.
        grid_affine: index in the grid -> RAS mm, (n + 1, n + 1).

    Raises:
        ValueError: unknown formats; "h5" without h5py; in 2D others than "warped"; a field on a grid whose axes are
            not orthogonal.
    """
    if isinstance(formats, str) or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats must be a sequence of {', '.join(FORMATS)}, got {formats!r}")
    if "h5" in formats and not _HAS_H5PY:
        raise ValueError('format "h5" needs the package h5py: pip install h5py, or leave "h5" out of formats')
    n, transforms = len(grid_affine) - 1, [key for key in formats if key != "warped"]
    if transforms and n != 3:
        raise ValueError(
            f'in {n}D formats must be ("warped",): ITK\'s transforms are written in 3D alone, got {formats!r}'
        )
    axes = grid_affine[:-1, :-1] / spacing_of(grid_affine)
    shear = float((axes.T @ axes).fill_diagonal_(0).abs().max())
    if {"h5", "nifti"} & set(transforms) and shear > _ORTHOGONAL:
        raise ValueError(
            f"the axes of the grid are not orthogonal (cosine {shear:.2g}) and images of ITK hold no shear: give "
            'formats=("tfm",), which has the affine alone, or register to a fixed image without shear'
        )


@contextmanager
def written_files(directory: str | PathLike[str], name: str, formats: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Temporary paths to write to, by format; the files get their names when the block ends without an error.

    Args:
        directory: of the files, made if absent.
        name: how their names begin.
        formats: keys of `FORMATS`.

    Raises:
        ValueError: a name that leads to another directory.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"name must be the beginning of a file name, without a directory, got {name!r}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".registration", dir=folder) as temporary:  # suffixes tell writers what to write
        files = {key: Path(temporary) / f"{name}{FORMATS[key]}" for key in formats}
        yield files
        for file in files.values():
            os.replace(file, folder / file.name)


def write_affine(file: Path, affine: Tensor) -> None:
    """Text that ITK, SimpleITK, 3D Slicer and ANTs read.

    Args:
        file: to write.
        affine: RAS mm of the fixed image -> RAS mm of the moving one, (4, 4).
    """
    numbers = " ".join(np.format_float_positional(value, trim="-") for value in _parameters(affine))
    file.write_text(
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: {_AFFINE}\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )


def write_composite(file: Path, affine: Tensor, displacement: Tensor | None, grid_affine: Tensor) -> None:
    """HDF5 as ITK writes it: x -> A(x + d(x)), or the affine alone. Needs h5py.

    Args:
        file: to write.
        affine: A, RAS mm -> RAS mm, (4, 4).
        displacement: d, RAS mm, (3, *size); None: only A.
        grid_affine: index in the grid -> RAS mm, (4, 4), of orthogonal axes.
    """
    entries: list[tuple[str, Any, Any]] = [(_AFFINE, _parameters(affine), np.zeros(3))]
    if displacement is not None:
        values = _lps(displacement.double()).permute(3, 2, 1, 0).reshape(-1)  # z, y, x, component
        axes, size, spacing = _lps(grid_affine[:3]), torch.tensor(displacement.shape[1:]), spacing_of(grid_affine.cpu())
        fixed = torch.cat([size, axes[:, 3], spacing, (axes[:, :3] / spacing).flatten()])
        composite = ("CompositeTransform_double_3_3", None, None)  # ITK applies the last of its entries first
        entries = [composite, *entries, ("DisplacementFieldTransform_double_3_3", values.numpy(), fixed.numpy())]
    text = h5py.string_dtype("ascii")  # ITK refuses UTF-8
    with h5py.File(file, "w") as content:
        for key in ("ITKVersion", "HDFVersion", "OSName", "OSVersion"):
            content.create_dataset(key, data=["5.4.7" if key == "ITKVersion" else "unknown"], dtype=text)
        for number, (kind, parameters, fixed_parameters) in enumerate(entries):
            group = content.create_group(f"TransformGroup/{number}")
            group.create_dataset("TransformType", data=[kind], dtype=text)
            if parameters is not None:
                group.create_dataset("TransformParameters", data=np.asarray(parameters))
                group.create_dataset("TransformFixedParameters", data=np.asarray(fixed_parameters))


def write_displacement(file: Path, displacement: Tensor, grid_affine: Tensor) -> None:
    """A NIfTI file of vectors in LPS mm, as ITK reads it: (X, Y, Z, 1, 3) float32.

    Args:
        file: to write, .nii or .nii.gz.
        displacement: T(x) - x, RAS mm, (3, *size).
        grid_affine: index in the grid -> RAS mm, (4, 4), of orthogonal axes.
    """
    image = _nifti(_lps(displacement).movedim(0, -1)[:, :, :, None], grid_affine)
    image.header.set_intent(_VECTOR)
    nib.save(image, file)


def write_image(file: Path, image: MetaTensor) -> None:
    """A NIfTI file of an image (C, *size), float32 or of its own type where that is whole numbers; channels last.

    Args:
        file: to write, .nii or .nii.gz.
        image: with its affine.
    """
    values = image.as_tensor().movedim(0, -1)
    if values.shape[-1] == 1:
        values = values[..., 0]
    elif values.ndim == 3:
        values = values[:, :, None]  # channels stand fourth
    nib.save(_nifti(values, image.affine), file)


def _parameters(affine: Tensor) -> list[float]:
    """ITK's order: the linear part row by row, then the translation."""
    matrix = to_lps(affine)
    return [*matrix[:3, :3].flatten().tolist(), *matrix[:3, 3].tolist()]


def _lps(vectors: Tensor) -> Tensor:
    """Vectors (3, ...) of RAS in LPS, on the CPU."""
    vectors = vectors.cpu()
    return torch.cat([-vectors[:2], vectors[2:]])


def _nifti(values: Tensor, affine: Tensor) -> nib.Nifti1Image:
    """With the affine in both forms that readers look for."""
    values = values.cpu().float() if values.is_floating_point() else values.cpu()
    image = nib.Nifti1Image(values.numpy(), None, dtype=values.numpy().dtype)
    matrix = to_affine_nd(3, affine.cpu().double().numpy())
    image.set_sform(matrix, 1)
    image.set_qform(matrix, 1)
    image.header.set_xyzt_units("mm")
    return image
