# SPDX-License-Identifier: Apache-2.0
"""Vectors between the cells of maps, and their similarity with every cell (SAM).

Maps are lists of (C, *size), finest first, of one image. An index is a continuous index of cells on the finest map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.transforms.linear_resize import resize_linear

__all__ = ["checked_index", "finest_size", "map_norms", "resized", "sample_embedding", "similarity"]

_CHANNELS = 16  # of a coarse map that are up-sampled at a time


def sample_embedding(maps: Sequence[Tensor], index: Tensor, align_corners: bool = False) -> list[Tensor]:
    """The vectors of all maps at the same places, by linear interpolation, renormalised.

    Args:
        maps: (C, *size) each, finest first.
        index: on the finest map, (P, n); places beyond the outermost cells take their vectors.
        align_corners: whether the centres of the outermost cells of all maps coincide, or the outer borders do.

    Returns:
        (P, C) for each map.

    Raises:
        ValueError: maps or an index of another shape.
    """
    size = finest_size(maps)
    length = torch.tensor(size, dtype=torch.float64, device=maps[0].device)
    place = checked_index(index, size).to(length)
    place = 2 * place / (length - 1).clamp_min(1) - 1 if align_corners else (2 * place + 1) / length - 1
    grid = place.flip(-1).reshape(1, len(place), *[1] * (len(size) - 1), len(size))
    vectors = []
    for values in maps:
        found = F.grid_sample(
            values[None], grid.to(values.dtype), mode="bilinear", padding_mode="border", align_corners=align_corners
        )  # (1, C, P, 1[, 1])
        vectors.append(F.normalize(found.reshape(len(values), len(place)).T, dim=1))
    return vectors


def map_norms(maps: Sequence[Tensor], align_corners: bool = False) -> list[Tensor]:
    """Length of the vectors of each map after linear up-sampling to the finest one, which shortens them.

    Args:
        maps: (C, *size) each, finest first.
        align_corners: see :func:`sample_embedding`.

    Returns:
        (*size) of the finest map for each map.
    """
    size = finest_size(maps)
    norms = []
    for values in maps:
        squares = values.new_zeros(size)
        for part in values.split(_CHANNELS):
            squares += resized(part, size, align_corners).square().sum(0)
        norms.append(squares.sqrt().clamp_min(1e-12))
    return norms


def similarity(
    query: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    align_corners: bool = False,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over levels of the cosine of vectors with every cell of the finest map.

    The product is formed on each map's own grid and then up-sampled: linear interpolation commutes with it. Only the
    lengths of the up-sampled vectors are needed besides.

    Args:
        query: unit vectors (P, C) for each level, as of :func:`sample_embedding`.
        key_maps: (C, *size) each, finest first.
        align_corners: see :func:`sample_embedding`.
        norms: of :func:`map_norms` for `key_maps`, where they are known.

    Returns:
        (P, *size) of the finest map.

    Raises:
        ValueError: another number of levels or channels.
    """
    size = finest_size(key_maps)
    if [q.shape[1] for q in query] != [len(values) for values in key_maps]:
        raise ValueError(
            f"vectors of {[q.shape[1] for q in query]} channels do not fit maps of {[len(m) for m in key_maps]}"
        )
    norms = map_norms(key_maps, align_corners) if norms is None else norms
    total = torch.zeros(())
    for level, (vectors, values, norm) in enumerate(zip(query, key_maps, norms)):
        cosine = (vectors.to(values.dtype) @ values.flatten(1)).unflatten(1, values.shape[1:])  # (P, *s)
        cosine, scale = resized(cosine, size, align_corners), norm * len(key_maps)
        total = total.addcdiv_(cosine, scale) if level else cosine / scale
    return total


def resized(values: Tensor, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
    """(P, *s) -> (P, *size), linear."""
    return values if tuple(values.shape[1:]) == size else resize_linear(values, size, align_corners)


def finest_size(maps: Sequence[Tensor]) -> tuple[int, ...]:
    """Of the first map, (*size); ValueError where the list is no list of maps, finest first."""
    if not len(maps) or any(m.ndim != maps[0].ndim for m in maps) or maps[0].ndim - 1 not in (2, 3):
        raise ValueError(
            f"maps must be (C, *size) with 2 or 3 axes, finest first, got {[tuple(m.shape) for m in maps]}"
        )
    size = tuple(maps[0].shape[1:])
    if any(s > f for m in maps for s, f in zip(m.shape[1:], size)):
        raise ValueError(f"the first map must be the finest, got sizes {[tuple(m.shape[1:]) for m in maps]}")
    return size


def checked_index(index: Tensor, size: tuple[int, ...]) -> Tensor:
    """The index itself, (P, n); ValueError where it has another shape."""
    if index.ndim != 2 or index.shape[1] != len(size):
        raise ValueError(f"index must be (P, {len(size)}) for maps of size {size}, got {tuple(index.shape)}")
    return index
