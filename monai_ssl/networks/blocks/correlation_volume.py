# SPDX-License-Identifier: Apache-2.0
"""How similar each vector of a map is to its neighbours in another map."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["correlation_volume"]

_FLOOR = 1e-4  # shorter vectors count as so long
_CHANNELS = 8  # that are multiplied at a time: a product of all would be one more map in memory


def correlation_volume(source: Tensor, target: Tensor, radius: int = 1) -> Tensor:
    """The cosine of each vector of the target with those of the source in a window around the same place.

    Source: the correlation features of SAM-VoxelMorph in SAME (arXiv 2109.11572). The window runs over one padded map
    of unit vectors, offset by offset; a copy of all windows would need (2 r + 1)^n times the memory of a map.

    Args:
        source: (B, C, *size), moving; its border is repeated outwards.
        target: (B, C, *size), fixed.
        radius: r, cells of the window on either side of its centre.

    Returns:
        (B, (2 r + 1)^n, *size), in [-1, 1]; offsets from (-r, .., -r) to (r, .., r), the last axis fastest.

    Raises:
        ValueError: maps of different shapes or without 2 or 3 spatial axes, or a negative radius.
    """
    n = source.ndim - 2
    if source.shape != target.shape or n not in (2, 3):
        raise ValueError(
            f"source {tuple(source.shape)} and target {tuple(target.shape)} must be equal, (B, C, *size), 2 or 3 axes"
        )
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    unit = F.pad(F.normalize(source, dim=1, eps=_FLOOR), [radius] * (2 * n), mode="replicate")
    length = torch.linalg.vector_norm(target, dim=1).clamp_min(_FLOOR)  # (B, *size)
    offsets = list(product(range(2 * radius + 1), repeat=n))
    volume = target.new_empty(len(target), len(offsets), *target.shape[2:])
    for channel, offset in enumerate(offsets):
        window = unit
        for axis, start in enumerate(offset, start=2):
            window = window.narrow(axis, start, target.shape[axis])
        parts = zip(window.split(_CHANNELS, dim=1), target.split(_CHANNELS, dim=1))
        volume[:, channel] = sum((a * b).sum(1) for a, b in parts) / length
    return volume
