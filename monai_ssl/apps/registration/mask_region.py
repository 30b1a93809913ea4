# SPDX-License-Identifier: Apache-2.0
"""Where points of an image may lie, from a mask on any grid."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

from ..image_embedding import ImageEmbedding
from ..preprocessing import affine_of, image_name, load_image

__all__ = ["mask_region"]

_HALF = 0.5 + 1e-6  # matches at the border of an image lie on the outer faces of its voxels


def mask_region(mask: Any, image: ImageEmbedding, name: str = "mask") -> Callable[[Tensor], Tensor]:
    """A test of world points by the voxel of a mask that they lie in.

    The mask is read where points are and never resampled, so that it may be finer than the network's input.

    Args:
        mask: True (above 0.5) where points may lie. A file or a MetaTensor, (1, *size) or (*size), on any grid, by its
            affine; or a plain tensor on the grid of the network's input, `image.size`. None: the body as the image's
            embedding knows it.
        image: the image that the points are from.
        name: of the mask, for messages.

    Returns:
        RAS mm (P, n) -> (P,) bool; False beyond the mask.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a mask of another size, with several channels, or empty.
    """
    if mask is None:
        return image.in_body
    n = len(image.size)
    if isinstance(mask, (str, os.PathLike, MetaTensor)):
        loaded = load_image(mask, n)
        values, matrix = loaded.as_tensor(), affine_of(loaded)
    else:
        values, matrix = torch.as_tensor(mask), image.affine.double()
        values = values[None] if values.ndim == n else values
        if tuple(values.shape[1:]) != tuple(image.size):
            raise ValueError(
                f"{name} {tuple(values.shape)} must have the size of the network's input {tuple(image.size)}; give a "
                "file or a MetaTensor with its affine for a mask on another grid"
            )
    if len(values) != 1:
        raise ValueError(f"{name} must have one channel, got {tuple(values.shape)}")
    inside = values[0].cpu() > 0.5
    if not inside.any():
        raise ValueError(f"{name} is empty{_file(mask)}: no voxel is above 0.5")
    last, inverse = torch.tensor(inside.shape) - 1, torch.linalg.inv(matrix)

    def contains(points: Tensor) -> Tensor:
        place = transform_points(inverse, points.double())
        within = ((place >= -_HALF) & (place <= last + _HALF)).all(-1)
        return within & inside[tuple(torch.minimum(place.round().long().clamp_min(0), last).T)]

    return contains


def _file(mask: Any) -> str:
    name = image_name(mask, "")
    return f" ({name})" if name else ""
