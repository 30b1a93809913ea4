# SPDX-License-Identifier: Apache-2.0
"""Fields in normalised coordinates: from voxels and back, and what lies where a field leads to.

Normalised coordinates run from -1 at the centre of the first voxel of an axis to 1 at that of the last one
(`align_corners=True`). Components stand in array order, unlike the x, y, z of `grid_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .view_geometry import vector_like

__all__ = ["from_normalised", "identity_field", "sample_field", "to_normalised"]


def to_normalised(index: Tensor, size: Sequence[int]) -> Tensor:
    """2 i / (N - 1) - 1.

    Args:
        index: voxels in the last dimension, (..., n).
        size: voxels along each axis, n in all, at least 2 each.

    Returns:
        (..., n), floating.
    """
    return index * (2 / _extent(index, size)) - 1


def from_normalised(points: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_normalised`."""
    return (points + 1) * (_extent(points, size) / 2)


def identity_field(size: Sequence[int], like: Tensor | None = None) -> Tensor:
    """Normalised coordinates of every node, (1, n, *size).

    Args:
        size: nodes along each axis.
        like: gives dtype and device; None: float32 on the CPU.
    """
    like = torch.zeros(()) if like is None else like
    axes = [torch.linspace(-1, 1, int(length), dtype=like.dtype, device=like.device) for length in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample_field(
    field: Tensor,
    places: Tensor,
    padding_mode: str = "border",
    mode: str = "bilinear",
    align_corners: bool = True,
) -> Tensor:
    """The values of a field at normalised places, linear in between.

    Args:
        field: (B, C, *size).
        places: normalised, (B, n, *out), components in array order.
        padding_mode: "border" or "zeros" beyond the field.
        mode: "bilinear" or "nearest".
        align_corners: False: -1 and 1 are the outer borders of the field.

    Returns:
        (B, C, *out).
    """
    grid = places.flip(1).movedim(1, -1)  # x, y, z last
    return F.grid_sample(field, grid.to(field.dtype), mode=mode, padding_mode=padding_mode, align_corners=align_corners)


def _extent(like: Tensor, size: Sequence[int]) -> Tensor:
    """N - 1 along each axis."""
    if min(size) < 2:
        raise ValueError(f"normalised coordinates need at least 2 voxels along each axis, got {tuple(size)}")
    like = like if like.is_floating_point() else like.to(torch.get_default_dtype())
    return vector_like(like, [int(length) - 1 for length in size])
