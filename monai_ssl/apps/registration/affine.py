# SPDX-License-Identifier: Apache-2.0
"""Affine registration of two images by the matches of their embeddings (SAM-affine)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

from ..point_matcher import PointMatcher
from .affine_fit import FIT_METHODS, fit_affine
from .grid_matches import GridMatches, check_matching, match_grid, shown_counts
from .result import Registration

__all__ = ["fit_affine", "normalised_affine", "register_affine"]

_SCALES = (1 / 3, 3.0)  # of bodies from newborns to adults
# median residual, relative to the median distance of the matches from their middle; on CT of patients up to 0.19 where
# organs overlap after it, 0.28 and more where they do not
_DISAGREEMENT = 0.25


def normalised_affine(M: Tensor, source_size: Sequence[int], target_size: Sequence[int]) -> Tensor:
    """An affine between indices as one between normalised coordinates: D_target M D_source^-1.

    Axes stand in array order. The (n, n + 1) matrix that `torch.nn.functional.affine_grid(align_corners=True)` takes
    has rows and columns of the first n reversed.

    Args:
        M: index in the source -> index in the target, (n + 1, n + 1).
        source_size: voxels along each axis, at least 2.
        target_size: likewise.

    Returns:
        (n + 1, n + 1) float64.

    Raises:
        ValueError: an axis of one voxel, or sizes that do not fit the matrix.
    """
    n = len(M) - 1
    if M.shape != (n + 1, n + 1) or len(source_size) != n or len(target_size) != n:
        raise ValueError(f"M {tuple(M.shape)} must be (n + 1, n + 1) for {source_size} -> {target_size}")
    if min(*source_size, *target_size) < 2:
        raise ValueError(f"normalised coordinates need 2 voxels along each axis, got {source_size} -> {target_size}")
    source, target = (_to_normalised(size, M.device) for size in (source_size, target_size))
    return target @ M.double() @ torch.linalg.inv(source)


def register_affine(
    matcher: PointMatcher,
    moving: Any,
    fixed: Any,
    moving_mask: Any = None,
    fixed_mask: Any = None,
    method: str = "huber",
    stride: int = 8,
    matching: str = "cycle",
    min_score: float = 0.7,
    generator: torch.Generator | None = None,
) -> Registration:
    """Align two images of any shape, spacing and position in the world, by what they show and not by where they lie.

    Source: SAM-affine (arXiv 2109.11572, 2311.14986). Grid points of the moving image are matched in the fixed one; the
    affine is fitted in this direction, since noise sits in the answers, and inverted. The released code crops both
    images to one shape and fits by plain least squares: `method="lstsq", matching="stable"`.

    Args:
        matcher: embeds the images, each once.
        moving: a file or a MetaTensor as `PointMatcher.embed` takes it, or its embedding.
        fixed: likewise.
        moving_mask: where matches may lie, a file, a MetaTensor or a tensor on the grid of the network's input, see
            `mask_region`; None: the body.
        fixed_mask: likewise.
        method: of :func:`fit_affine`.
        stride: voxels of the network's input between grid points.
        matching: "cycle" or "stable", see `match_grid`.
        min_score: least similarity of a match, at most 1.
        generator: of the trials of "ransac".

    Returns:
        Its `report` holds `counts` after each filter, `residual_mean_mm` and `residual_median_mm` of all matches,
        `folding_share` (0: an affine that folds is refused) and `seconds` for each step.

    Raises:
        FileNotFoundError: an image or a mask that is not there.
        ValueError: arguments or images that cannot be used; too few matches, or matches in one layer; matches that no
            affine fits, half of which stay further off than a quarter of their distance from the middle; or one that
            mirrors, or that stretches or shrinks any direction more than threefold.
    """
    check_matching(matching, min_score)
    if method not in FIT_METHODS:
        raise ValueError(f"method must be one of {', '.join(FIT_METHODS)}, got {method!r}")
    start = time.perf_counter()
    first, second = matcher.embedding(moving), matcher.embedding(fixed)
    embedded = time.perf_counter()
    pairs = match_grid(matcher, first, second, moving_mask, fixed_mask, stride, matching, min_score)
    matched = time.perf_counter()
    matrix = fit_affine(pairs.moving, pairs.fixed, method, generator=generator)
    affine, residual = _inverted(matrix, pairs)
    fitted = time.perf_counter()
    report = {
        "counts": pairs.counts,
        "residual_mean_mm": float(residual.mean()),
        "residual_median_mm": float(residual.median()),
        "folding_share": 0.0,
        "seconds": {"embed": embedded - start, "match": matched - embedded, "affine": fitted - matched},
    }
    points = torch.stack([pairs.fixed, pairs.moving], 1)
    return Registration(affine, None, second.affine.double(), tuple(second.size), points, pairs.scores, report)


def _to_normalised(size: Sequence[int], device: torch.device) -> Tensor:
    matrix = torch.diag(torch.tensor([*(2 / (length - 1) for length in size), 1], dtype=torch.float64, device=device))
    matrix[:-1, -1] = -1
    return matrix


def _inverted(matrix: Tensor, pairs: GridMatches) -> tuple[Tensor, Tensor]:
    """Fixed -> moving, and what it leaves of the distances, mm (P,); ValueError for what no pair of patients has.

    Matches that agree on nothing, or images that are no pair, give such transforms too.
    """
    linear, (low, high) = matrix[:-1, :-1], _SCALES
    scales, wrong = torch.linalg.svdvals(linear), ""
    affine, residual = matrix, torch.zeros(len(pairs.moving), dtype=torch.float64)
    if scales[-1] < low or scales[0] > high:
        wrong = f"it scales by {float(scales[-1]):.3g} to {float(scales[0]):.3g}, allowed are {low:.3g} to {high:.3g}"
    elif torch.linalg.det(linear) <= 0:
        wrong = "it mirrors: are left and right, or another pair of sides, exchanged in one of the files?"
    else:
        affine = torch.linalg.inv(matrix)
        residual = (transform_points(affine, pairs.fixed) - pairs.moving).norm(dim=1)
        spread = float((pairs.moving - pairs.moving.mean(0)).norm(dim=1).median())
        if residual.median() > _DISAGREEMENT * spread:
            off = float(residual.median())
            wrong = (
                f"it misses half of them by {off:.3g} mm or more, and half lie within {spread:.3g} mm of their middle"
            )
    if wrong:
        raise ValueError(
            f"the affine that fits the matches from moving to fixed cannot be right: {wrong}; points after each step: "
            f'{shown_counts(pairs.counts)}; check that both images show the same region, or give method="ransac", a '
            "higher min_score or a smaller stride"
        )
    return affine, residual
