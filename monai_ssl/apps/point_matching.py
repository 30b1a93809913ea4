# SPDX-License-Identifier: Apache-2.0
"""Points found again in another image by the similarity of embeddings: free functions on maps (SAM).

Maps are lists of (C, *size), finest first, of one image. An index is a continuous index of cells on the finest map: the
voxel x of the image lies at (x + 0.5) / s - 0.5 on a map of stride s.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .map_similarity import checked_index, finest_size, map_norms, resized, sample_embedding, similarity

__all__ = [
    "map_norms",
    "match_points",
    "refine_peak",
    "sample_embedding",
    "similarity",
    "similarity_map",
    "stable_matches",
]


def refine_peak(sim: Tensor, index: Tensor) -> Tensor:
    """From the cell of the peak to the vertex of the parabola through it and its two neighbours, axis by axis.

    Args:
        sim: (P, *size); neighbours that are not finite count as outside of the map.
        index: cell of each row, whole numbers (P, n).

    Returns:
        offset in cells, (P, n) float64, within half a cell; 0 along axes where the cell lies at the border or the three
        values are not concave.
    """
    size = tuple(sim.shape[1:])
    flat, length = sim.flatten(1), torch.tensor(size, device=sim.device)
    step = torch.tensor([prod(size[axis + 1 :]) for axis in range(len(size))], device=sim.device)
    index = index.to(sim.device).long()
    centre = (index * step).sum(1, keepdim=True)  # (P, 1)
    inner = (index > 0) & (index < length - 1)  # (P, n)
    shift = torch.where(inner, step, 0)
    middle = flat.gather(1, centre).double()
    left, right = flat.gather(1, centre - shift).double(), flat.gather(1, centre + shift).double()
    curvature = left - 2 * middle + right
    usable = inner & left.isfinite() & right.isfinite() & (curvature < 0)
    offset = 0.5 * (left - right) / torch.where(usable, curvature, 1.0)
    return torch.where(usable, offset.clamp(-0.5, 0.5), 0.0)


@torch.no_grad()
def match_points(
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    index: Tensor,
    refine: bool = True,
    key_mask: Tensor | None = None,
    chunk_size: int = 64,
    align_corners: bool = False,
    key_norms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the places of one image are found in another: the cell of highest similarity, refined by a parabola.

    Source: the matching of SAM (arXiv 2012.02383). The released code rounds the query down to a cell, adds up the
    similarities of the levels and answers with the cell: give whole numbers as index and `refine=False`. The place of
    cell k in the image is s k + (s - 1) / 2 there, and s k where maps are aligned at their corners.

    Args:
        query_maps: (C, *size) each, finest first.
        key_maps: likewise, of the image to search.
        index: places on the finest map of the query, (P, n).
        refine: answer between the cells.
        key_mask: (*size) bool, True where a cell of the key may be found; None for all.
        chunk_size: places whose similarity maps are in memory at a time.
        align_corners: see :func:`sample_embedding`.
        key_norms: of :func:`map_norms` for `key_maps`, where they are known.

    Returns:
        index on the finest map of the key (P, n) float64, and the similarity of the best cell (P,) in [-1, 1].

    Raises:
        ValueError: shapes that do not fit, or a mask without any cell.
    """
    size = finest_size(key_maps)
    norms = map_norms(key_maps, align_corners) if key_norms is None else key_norms
    barred = None
    if key_mask is not None:
        if tuple(key_mask.shape) != size or key_mask.dtype != torch.bool or not key_mask.any():
            raise ValueError(f"key_mask must be bool, of the finest map's size {size}, and True somewhere")
        barred = None if key_mask.all() else ~key_mask.to(key_maps[0].device)
    vectors = sample_embedding(query_maps, index, align_corners)
    places = [torch.zeros(0, len(size), dtype=torch.float64, device=key_maps[0].device)]
    scores = [key_maps[0].new_zeros(0)]
    for start in range(0, len(index), max(1, chunk_size)):
        rows = [v[start : start + max(1, chunk_size)] for v in vectors]
        sim = similarity(rows, key_maps, align_corners, norms)
        if barred is not None:
            sim.masked_fill_(barred, float("-inf"))
        score, cell = sim.flatten(1).max(1)
        found = torch.stack(torch.unravel_index(cell, size), -1)
        places.append(found + refine_peak(sim, found) if refine else found.double())
        scores.append(score.clamp(-1, 1))
    return torch.cat(places), torch.cat(scores)


def similarity_map(
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    index: Tensor,
    size: Sequence[int],
    align_corners: bool = False,
) -> Tensor:
    """How similar every place of an image is to given places of another, at the size of the image.

    Args:
        query_maps: (C, *size) each, finest first.
        key_maps: likewise, of the image that is shown.
        index: places on the finest map of the query, (P, n).
        size: of the result, filling the same field of view as the maps of the key.
        align_corners: see :func:`sample_embedding`.

    Returns:
        (P, *size), in [-1, 1].
    """
    sim = similarity(sample_embedding(query_maps, index, align_corners), key_maps, align_corners)
    return resized(sim, tuple(int(s) for s in size), align_corners)


def stable_matches(
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    index: Tensor,
    rounds: int = 5,
    tolerance: float = 1.0,
    refine: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    chunk_size: int = 64,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of places on which matching there and back agrees, reached from given ones.

    Source: the stable points of UAE (arXiv 2311.15111) in its released code. A place is replaced `rounds` times by the
    place that is found on the way there and back, and kept if the last round moved it by less than `tolerance`.

    Args:
        query_maps: (C, *size) each, finest first.
        key_maps: likewise, of the other image.
        index: places to start from on the finest map of the query, (P, n).
        rounds: ways there and back, from 1.
        tolerance: in cells.
        refine: answer between the cells.
        query_mask: (*size) bool, True where a cell of the query may be found; None for all.
        key_mask: likewise for the key.
        chunk_size: see :func:`match_points`.
        align_corners: see :func:`sample_embedding`.

    Returns:
        places on the query (S, n) and on the key (S, n), float64, each pair once, and the similarity on the way back
        (S,).

    Raises:
        ValueError: `rounds` below 1, or shapes that do not fit.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    options: dict[str, Any] = {"refine": refine, "chunk_size": chunk_size, "align_corners": align_corners}
    query_norms, key_norms = map_norms(query_maps, align_corners), map_norms(key_maps, align_corners)
    place = checked_index(index, finest_size(query_maps)).to(query_maps[0].device).double()
    for _ in range(rounds):
        before = place
        key, _score = match_points(query_maps, key_maps, before, key_mask=key_mask, key_norms=key_norms, **options)
        place, score = match_points(key_maps, query_maps, key, key_mask=query_mask, key_norms=query_norms, **options)
    kept = (place - before).square().sum(1).sqrt() < tolerance
    pairs, row = torch.unique(torch.cat([place, key], 1)[kept], dim=0, return_inverse=True)
    scores = score.new_zeros(len(pairs)).scatter_(0, row, score[kept])  # equal pairs have equal scores
    return pairs[:, : place.shape[1]], pairs[:, place.shape[1] :], scores


def __getattr__(name: str) -> Any:
    """What works on images rather than maps is found here too; its files import this one."""
    if name in ("PointMatcher", "PointMatches"):
        from . import point_matcher as module
    elif name == "ImageEmbedding":
        from . import image_embedding as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
