# SPDX-License-Identifier: Apache-2.0
"""Dense fields in normalised coordinates and in voxels: conversions, composition, folding (SAMReg).

Normalised coordinates run from -1 at the centre of the first voxel of an axis to 1 at that of the last one
(`align_corners=True`). Components stand in array order, unlike the x, y, z of `grid_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "compose",
    "folding",
    "from_normalised",
    "identity_field",
    "jacobian_determinant",
    "sample_field",
    "to_ddf",
    "to_normalised",
]


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


def sample_field(field: Tensor, places: Tensor, padding_mode: str = "border", mode: str = "bilinear") -> Tensor:
    """The values of a field at normalised places, linear in between.

    Args:
        field: (B, C, *size).
        places: normalised, (B, n, *out), components in array order.
        padding_mode: "border" or "zeros" beyond the field.
        mode: "bilinear" or "nearest".

    Returns:
        (B, C, *out).
    """
    grid = places.flip(1).movedim(1, -1)  # x, y, z last
    return F.grid_sample(field, grid.to(field.dtype), mode=mode, padding_mode=padding_mode, align_corners=True)


def compose(d1: Tensor, d2: Tensor) -> Tensor:
    """The displacement of (id + d1) after (id + d2): d1 at (id + d2), plus d2.

    Args:
        d1: normalised displacement, (B, n, *size); its border value continues beyond it.
        d2: normalised displacement on the grid of the result, (B, n, *size); it is applied first.

    Returns:
        normalised displacement, of the shape of `d2`.
    """
    return sample_field(d1, identity_field(d2.shape[2:], d2) + d2) + d2


def to_ddf(phi: Tensor) -> Tensor:
    """Absolute normalised coordinates as a displacement in voxels, the form of `monai.networks.blocks.Warp`.

    Args:
        phi: (B, n, *size), normalised by the same size.

    Returns:
        (phi - id) (N - 1) / 2, (B, n, *size).
    """
    size = phi.shape[2:]
    scale = _extent(phi, size).view(1, -1, *[1] * len(size)) / 2
    return (phi - identity_field(size, phi)) * scale


def jacobian_determinant(ddf: Tensor) -> Tensor:
    """The change of volume at each voxel: det(I + d ddf / dx) by central differences, one-sided at the border.

    Where it is not positive the field folds.

    Args:
        ddf: displacement in voxels, (B, n, *size), n up to 3, at least 2 voxels along each axis.

    Returns:
        (B, *size).

    Raises:
        ValueError: as many components as axes are needed.
    """
    n = ddf.ndim - 2
    if ddf.shape[1] != n or n > 3 or min(ddf.shape[2:], default=0) < 2:
        raise ValueError(f"ddf {tuple(ddf.shape)} must be (B, n, *size) with n axes of at least 2 voxels")
    # explicit, since a batch of so many small matrices takes torch.linalg.det three times as long
    rows = [torch.gradient(component, dim=list(range(1, n + 1))) for component in ddf.unbind(1)]
    matrix = [[value + (i == j) for j, value in enumerate(row)] for i, row in enumerate(rows)]
    if n == 1:
        return matrix[0][0]
    if n == 2:
        return matrix[0][0] * matrix[1][1] - matrix[0][1] * matrix[1][0]
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folding(ddf: Tensor) -> dict[str, float]:
    """How much a field folds, and how unevenly it changes volumes.

    Args:
        ddf: displacement in voxels, (B, n, *size), see :func:`jacobian_determinant`.

    Returns:
        `folding_share`, the share of voxels whose determinant is not positive, and `sdlogj`, the standard deviation of
        its logarithm over the other voxels (of the population; NaN where there are none).
    """
    determinant = jacobian_determinant(ddf).double()
    positive = determinant[determinant > 0]
    share = 1 - positive.numel() / determinant.numel()
    return {
        "folding_share": share,
        "sdlogj": float(positive.log().std(correction=0)) if len(positive) else float("nan"),
    }


def _extent(like: Tensor, size: Sequence[int]) -> Tensor:
    """N - 1 along each axis."""
    if min(size) < 2:
        raise ValueError(f"normalised coordinates need at least 2 voxels along each axis, got {tuple(size)}")
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return torch.tensor([int(length) - 1 for length in size], dtype=dtype, device=like.device)
