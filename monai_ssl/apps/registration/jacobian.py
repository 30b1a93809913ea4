# SPDX-License-Identifier: Apache-2.0
"""How a registration changes volumes, and whether it folds (SAME, arXiv 2109.11572)."""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import jacobian_determinant
from .result import Registration

__all__ = ["determinant_of", "jacobian_statistics"]

_SLAB = 2**20  # voxels whose Jacobians are in memory at a time


def determinant_of(result: Registration) -> Tensor:
    """The Jacobian determinant of a whole transform on its grid, (1, *grid_size), computed some slices at a time."""
    ddf = result.ddf()
    length, step, parts = ddf.shape[2], max(1, _SLAB // ddf[0, 0, 0].numel()), []
    for start in range(0, length, step):
        first, last = max(0, start - 1), min(length, start + step + 1)  # central differences at the ends of the slab
        parts.append(jacobian_determinant(ddf[:, :, first:last])[:, start - first : start - first + step])
    return torch.cat(parts, 1).cpu()


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
