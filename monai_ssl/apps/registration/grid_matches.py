# SPDX-License-Identifier: Apache-2.0
"""Grid points of one image found in another, and what is left of them after each filter (SAM-affine)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import spacing_of, transform_points

from ..image_embedding import ImageEmbedding
from ..point_matcher import PointMatcher, check_filters
from ..point_matching import stable_matches
from .mask_region import mask_region
from .points import grid_points

__all__ = ["MATCHINGS", "GridMatches", "match_grid"]

MATCHINGS = ("cycle", "stable")
_CYCLE_MM = 4.0
_ROUNDS = 5  # of "stable"
_THIN = 0.25  # of a step of the grid: standard deviation of the points across them, below which they are one layer
_REMEDIES = {
    "grid": "the moving image is too small for this stride, give a smaller one",
    "moving_mask": "few grid points lie in the moving mask (the body, where none is given): check it, or give a "
    "smaller stride",
    "stable": "matching there and back does not settle: do both images show the same region, as the network was "
    "trained on it?",
    "score": "matches are not confident: do both images show the same region, as the network was trained on it? Else "
    "give a lower min_score or a smaller stride",
    "masks": "few matches lie in both masks (the bodies, where none are given): check them",
    "cycle": "matching back does not lead back: do both images show the same region, as the network was trained on it? "
    "Else give a smaller stride",
}


class GridMatches(NamedTuple):
    """Pairs of points that show the same anatomy, on the CPU.

    `moving` and `fixed` (P, n) float64 in RAS mm; `scores` (P,), their similarity in [-1, 1]; `counts`: how many points
    the grid has and how many are left after each filter, in the order of the filters.
    """

    moving: Tensor
    fixed: Tensor
    scores: Tensor
    counts: dict[str, int]


def match_grid(
    matcher: PointMatcher,
    moving: ImageEmbedding,
    fixed: ImageEmbedding,
    moving_mask: Any = None,
    fixed_mask: Any = None,
    stride: int = 8,
    matching: str = "cycle",
    min_score: float = 0.7,
) -> GridMatches:
    """Find the grid points of the moving image in the fixed one and keep what is confident.

    Source: the matches of SAME (arXiv 2109.11572). Kept are pairs with a score above `min_score`, both ends inside
    their masks, and for "cycle" 4 mm at most from the point when matched back.

    Args:
        matcher: gives `chunk_size`, the points that are matched at a time.
        moving: to match from.
        fixed: to match in.
        moving_mask: see :func:`mask_region`.
        fixed_mask: likewise.
        stride: voxels of the network's input between grid points, see :func:`grid_points`.
        matching: "cycle": between cells, each point once there and back. "stable": the released way, cells that points
            come to after 5 ways there and back, see `stable_matches`.
        min_score: at most 1.

    Raises:
        ValueError: arguments that cannot be used; fewer than 4 (n + 1) matches, or matches in one layer of the grid,
            with the counts after each filter and a remedy.
    """
    check_matching(matching, min_score)
    in_moving = mask_region(moving_mask, moving, "moving_mask")
    in_fixed = mask_region(fixed_mask, fixed, "fixed_mask")
    points = transform_points(moving.affine.double(), grid_points(moving.size, stride))
    counts = {"grid": len(points)}
    points = points[in_moving(points)]
    counts["moving_mask"] = len(points)
    if matching == "stable":
        cells, found, scores = stable_matches(
            moving.maps,
            fixed.maps,
            moving.cells(points),
            _ROUNDS,
            query_mask=moving.key_mask(),
            key_mask=fixed.key_mask(),
            chunk_size=matcher.chunk_size,
        )
        pairs = GridMatches(moving.world(cells), fixed.world(found), scores.cpu(), counts)
        counts["stable"] = len(cells)
    else:
        pairs = GridMatches(points, *matcher.search(moving, fixed, points), counts)
    pairs = _kept(pairs, "score", lambda p: p.scores > min_score)
    pairs = _kept(pairs, "masks", lambda p: in_moving(p.moving) & in_fixed(p.fixed))
    if matching == "cycle":
        pairs = _kept(pairs, "cycle", lambda p: _cycle_error(matcher, moving, fixed, p) <= _CYCLE_MM)
    _check_number(pairs)
    _check_layers(pairs, stride * float(spacing_of(moving.affine).min()))
    return pairs


def check_matching(matching: str, min_score: float) -> None:
    """ValueError for arguments of :func:`match_grid` that cannot be used."""
    check_filters(min_score, None)
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {matching!r}")


def shown_counts(counts: dict[str, int]) -> str:
    """For messages."""
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _cycle_error(matcher: PointMatcher, moving: ImageEmbedding, fixed: ImageEmbedding, pairs: GridMatches) -> Tensor:
    """mm (P,)."""
    return (matcher.search(fixed, moving, pairs.fixed)[0] - pairs.moving).norm(dim=1)


def _kept(pairs: GridMatches, name: str, passes: Callable[[GridMatches], Tensor]) -> GridMatches:
    """What passes a filter, counted under its name."""
    rows = passes(pairs)
    counts = {**pairs.counts, name: int(rows.sum())}
    return GridMatches(pairs.moving[rows], pairs.fixed[rows], pairs.scores[rows], counts)


def _check_number(pairs: GridMatches) -> None:
    needed = 4 * (pairs.moving.shape[1] + 1)
    for name, number in pairs.counts.items():
        if number < needed:
            raise ValueError(
                f"only {len(pairs.moving)} matches are left, at least {needed} are needed; points after each step: "
                f"{shown_counts(pairs.counts)}; {_REMEDIES[name]}"
            )


def _check_layers(pairs: GridMatches, step: float) -> None:
    """Matches in one layer of the grid say nothing of the direction across it: their noise would be taken for it."""
    middle = pairs.moving - pairs.moving.mean(0)
    across = float(torch.linalg.svdvals(middle)[-1]) / len(middle) ** 0.5
    if across < _THIN * step:
        raise ValueError(
            f"the {len(middle)} matches lie in one layer of the moving image ({across:.2g} mm thick, standard "
            f"deviation; the grid has steps of {step:.3g} mm): no affine follows from them; points after each step: "
            f"{shown_counts(pairs.counts)}; give a smaller stride, or a mask and images that show more"
        )
