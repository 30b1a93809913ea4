# SPDX-License-Identifier: Apache-2.0
"""Dense fields in normalised coordinates and in voxels: conversions, composition, folding (SAMReg).

Normalised coordinates run from -1 at the centre of the first voxel of an axis to 1 at that of the last one
(`align_corners=True`). Components stand in array order, unlike the x, y, z of `grid_sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monai_ssl.transforms.normalised_fields import from_normalised, identity_field, sample_field, to_normalised

__all__ = [
    "compose",
    "folding",
    "from_normalised",
    "identity_field",
    "jacobian_determinant",
    "jacobian_statistics",
    "sample_field",
    "to_ddf",
    "to_normalised",
]

_SLAB = 2**20  # voxels whose derivatives are in memory at a time


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
    d = phi - identity_field(size, phi)
    return torch.stack([component * ((length - 1) / 2) for component, length in zip(d.unbind(1), size)], 1)


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
    step, parts = max(1, _SLAB // ddf[0, 0, 0].numel()), []
    for start in range(0, ddf.shape[2], step):
        first, last = max(0, start - 1), min(ddf.shape[2], start + step + 1)  # central differences at the slab's ends
        first = min(first, ddf.shape[2] - 2)
        parts.append(_determinant(ddf[:, :, first:last])[:, start - first : start - first + step])
    return torch.cat(parts, 1)


def jacobian_statistics(determinant: Tensor) -> dict[str, float | None]:
    """How a field changes volumes.

    Args:
        determinant: of :func:`jacobian_determinant`, any shape.

    Returns:
        `folding_share`, the share of determinants that are not positive; `sdlogj`, the standard deviation of the
        logarithm of the others (of the population; None where there are none); `min` and `max`.
    """
    positive = determinant[determinant > 0].double()
    return {
        "folding_share": 1 - positive.numel() / determinant.numel(),
        "sdlogj": float(positive.log().std(correction=0)) if len(positive) else None,
        "min": float(determinant.min()),
        "max": float(determinant.max()),
    }


def folding(ddf: Tensor) -> dict[str, float]:
    """How much a field folds, and how unevenly it changes volumes.

    Args:
        ddf: displacement in voxels, (B, n, *size), see :func:`jacobian_determinant`.

    Returns:
        `folding_share` and `sdlogj` of :func:`jacobian_statistics`, NaN for None.
    """
    found = jacobian_statistics(jacobian_determinant(ddf))
    values = ((name, found[name]) for name in ("folding_share", "sdlogj"))
    return {name: float("nan") if value is None else value for name, value in values}


def _determinant(ddf: Tensor) -> Tensor:
    """Explicit, since a batch of so many small matrices takes torch.linalg.det three times as long."""
    n = ddf.ndim - 2
    rows = [torch.gradient(component, dim=list(range(1, n + 1))) for component in ddf.unbind(1)]
    matrix = [[value + (i == j) for j, value in enumerate(row)] for i, row in enumerate(rows)]
    if n == 1:
        return matrix[0][0]
    if n == 2:
        return matrix[0][0] * matrix[1][1] - matrix[0][1] * matrix[1][0]
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
