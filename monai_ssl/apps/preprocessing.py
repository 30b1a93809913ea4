# SPDX-License-Identifier: Apache-2.0
"""Images as the network was shown them: reading, and the transforms that a provenance describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    LoadImage,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)
from monai.utils import ensure_tuple_rep

from monai_ssl.data.dicom import itk_loading

__all__ = ["DEFAULT", "affine_of", "embedding_transform", "image_name", "load_image"]

DEFAULT: dict[str, Any] = {
    "orientation": "SPL",
    "spacing": 2.0,
    "intensity": [-1024.0, 3071.0],
    "scaled": [-50.0, 205.0],
}


def embedding_transform(preprocessing: Mapping[str, Any] | None = None, spatial_dims: int = 3) -> Compose:
    """What is done to an image before it is embedded, without any cropping.

    Args:
        preprocessing: as in the provenance of a bundle. `orientation`: axes such as "SPL", None: as they are; `spacing`
            in mm; `intensity`: the range in HU that becomes `scaled`, beyond which values are cut off; or `percentiles`
            instead of it. What is missing is that of the released code of SAM (arXiv 2012.02383) at 2 mm; other entries
            are ignored.
        spatial_dims: 2 or 3; pictures keep their orientation.

    Returns:
        a transform of images (C, *size) with affine.

    Raises:
        ValueError: a value that cannot be understood.
    """
    given = {**DEFAULT, **(preprocessing or {})}
    try:
        low, high = (float(v) for v in given["scaled"])
        window = [float(v) for v in given.get("percentiles") or given["intensity"]]
        pixdim = [float(v) for v in ensure_tuple_rep(given["spacing"], spatial_dims)]
        if min(pixdim) <= 0:
            raise ValueError("spacing must be positive")
        scale = ScaleIntensityRangePercentiles if given.get("percentiles") else ScaleIntensityRange
        steps: list[Any] = [Spacing(pixdim=pixdim), scale(*window, low, high, clip=True)]
        if given["orientation"] and spatial_dims == 3:
            steps.insert(0, Orientation(axcodes=given["orientation"], labels=None))
    except (TypeError, ValueError) as error:
        shown = {key: given[key] for key in DEFAULT}
        raise ValueError(f"preprocessing {shown} cannot be used: {error}") from error
    return Compose(steps)


def load_image(image: Any, spatial_dims: int | None = None) -> MetaTensor:
    """An image with channels in front.

    Args:
        image: a file, a folder with a DICOM series, or a MetaTensor (C, *size), or (*size) if `spatial_dims` is given.
        spatial_dims: 2 or 3, if known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, carries no affine, or has another number of axes.
    """
    name = image_name(image)
    if isinstance(image, (str, os.PathLike)):
        if not Path(image).exists():
            raise FileNotFoundError(f"{image} does not exist")
        try:
            with itk_loading():
                image = EnsureChannelFirst()(LoadImage(image_only=True)(image))
        except Exception as error:  # a file can be broken in any way
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {reason})") from error
    if not isinstance(image, MetaTensor):
        raise ValueError(f"an image must be a file or a MetaTensor with its affine, got {type(image).__name__}")
    if spatial_dims is not None and image.ndim == spatial_dims:
        image = image[None]
    if spatial_dims is not None and image.ndim != spatial_dims + 1:
        raise ValueError(f"{name}: an image {tuple(image.shape)}, expected (C, *size) with {spatial_dims} axes")
    if min(image.shape) < 1:
        raise ValueError(f"{name} is empty: {tuple(image.shape)}")
    return image


def affine_of(image: MetaTensor) -> torch.Tensor:
    """Index -> RAS mm of an image (C, *size), (n + 1, n + 1) float64 on the CPU; MONAI keeps 4 x 4 for pictures too."""
    return torch.as_tensor(to_affine_nd(image.ndim - 1, image.affine.cpu().double().numpy()), dtype=torch.float64)


def image_name(image: Any, otherwise: str = "the image") -> str:
    """What to call an image in messages and tables: its file, where it is known."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    file = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
    return str(file) if isinstance(file, (str, os.PathLike)) else otherwise
