# SPDX-License-Identifier: Apache-2.0
"""Coarse deformable registration of two images by the matches of their embeddings (SAM-coarse)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_ssl.transforms.linear_resize import resize_linear
from monai_ssl.transforms.view_geometry import transform_points

from ..image_embedding import ImageEmbedding
from ..point_matcher import PointMatcher
from ..preprocessing import affine_of
from .affine import normalised_affine, register_affine
from .coarse_fit import compose_affine, fit_coarse_field
from .fields import folding, to_normalised
from .grid_matches import match_grid
from .result import Registration

__all__ = ["compose_affine", "fit_coarse_field", "register_coarse"]


def register_coarse(
    matcher: PointMatcher,
    moving: Any,
    fixed: Any,
    initial: Registration | None = None,
    node_spacing: int = 16,
    steps: int = 100,
    lr: float = 0.05,
    smoothness: float = 0.04,
    moving_mask: Any = None,
    fixed_mask: Any = None,
    method: str = "huber",
    stride: int = 8,
    matching: str = "cycle",
    min_score: float = 0.7,
    generator: torch.Generator | None = None,
    max_residual: float | None = None,
) -> Registration:
    """Bend an affine registration so that it follows the matches of the embeddings, smoothly: T(x) = A(x + d(x)).

    Source: SAM-coarse (arXiv 2109.11572). The defaults are the published ones and follow the noise of the matches too:
    `node_spacing=8, smoothness=0.4` is better on pairs that need bending, and the affine alone on those that do not.

    Args:
        matcher: embeds the images, each once.
        moving: a file or a MetaTensor as `PointMatcher.embed` takes it, or its embedding.
        fixed: likewise.
        initial: of :func:`register_affine` for the same images; its matches are used again, and the matching arguments
            are not. None: made here.
        node_spacing: voxels of the network's input between the nodes of d, which span the fixed image from its first
            voxel to its last: N // node_spacing nodes along an axis of N voxels, at least 2.
        steps: of :func:`fit_coarse_field`.
        lr: likewise.
        smoothness: likewise.
        moving_mask: see :func:`register_affine`; likewise all that follow.
        fixed_mask: see there.
        method: see there.
        stride: see there.
        matching: see there.
        min_score: see there.
        generator: see there.
        max_residual: mm; matches that the affine misses by more do not take part. None: all do, as published, which is
            right for good embeddings. A weak one leaves false matches that survive the way back, and d follows them.

    Returns:
        Its `report` has the entries of :func:`register_affine`; `folding_share` is that of the voxels of the grid.

    Raises:
        FileNotFoundError: an image or a mask that is not there.
        ValueError: as :func:`register_affine`; or `initial` is of other images or has a displacement already; or
            `max_residual` leaves no more matches than an affine needs.
    """
    if node_spacing < 1:
        raise ValueError(f"node_spacing must be at least 1 voxel, got {node_spacing}")
    if initial is not None and initial.displacement is not None:
        raise ValueError("initial has a displacement already, the coarse step starts from an affine: give that one")
    if initial is None or not len(initial.points):  # else no embedding is needed
        moving, fixed = matcher.embedding(moving), matcher.embedding(fixed)
    if initial is None:
        options = moving_mask, fixed_mask, method, stride, matching, min_score, generator
        initial = register_affine(matcher, moving, fixed, *options)
    grid_affine, grid_size = _grid(matcher, fixed)
    if tuple(initial.grid_size) != grid_size or not torch.allclose(initial.grid_affine.double(), grid_affine):
        raise ValueError(f"initial, on a grid of {initial.grid_size}, is of another fixed image than this: {grid_size}")
    if not len(initial.points):
        pairs = match_grid(matcher, moving, fixed, moving_mask, fixed_mask, stride, matching, min_score)
        points, report = torch.stack([pairs.fixed, pairs.moving], 1), {**initial.report, "counts": pairs.counts}
        initial = dataclasses.replace(initial, points=points, scores=pairs.scores, report=report)
    if max_residual is not None:
        initial = _near(initial, max_residual)
    start = time.perf_counter()
    displacement = _fitted(initial, *_grid(matcher, moving), node_spacing, steps, lr, smoothness)
    result = dataclasses.replace(initial, displacement=displacement)
    residual = (result.map_points(initial.points[:, 0]) - initial.points[:, 1]).norm(dim=1)
    to_voxels = torch.linalg.inv(grid_affine[:-1, :-1]).to(displacement)
    report = {
        **initial.report,
        "residual_mean_mm": float(residual.mean()),
        "residual_median_mm": float(residual.median()),
        "folding_share": folding(torch.einsum("ij,j...->i...", to_voxels, displacement)[None])["folding_share"],
    }
    report["seconds"] = {**initial.report.get("seconds", {}), "coarse": time.perf_counter() - start}
    return dataclasses.replace(result, report=report)


def _near(initial: Registration, max_residual: float) -> Registration:
    """With the matches that the affine misses by so many mm at most."""
    residual = (initial.map_points(initial.points[:, 0]) - initial.points[:, 1]).norm(dim=1)
    kept = residual <= max_residual
    if int(kept.sum()) <= len(initial.grid_size) + 1:
        raise ValueError(
            f"{int(kept.sum())} of {len(kept)} matches lie within max_residual={max_residual} mm of the affine, half "
            f"of all within {float(residual.median()):.3g} mm: raise max_residual, or stop at the affine"
        )
    counts = {**initial.report.get("counts", {}), "max_residual": int(kept.sum())}
    return dataclasses.replace(
        initial, points=initial.points[kept], scores=initial.scores[kept], report={**initial.report, "counts": counts}
    )


def _grid(matcher: PointMatcher, image: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Index -> RAS mm of the network's input, float64, and its voxels."""
    if isinstance(image, ImageEmbedding):
        return image.affine.double(), tuple(image.size)
    prepared = matcher.prepare(image)
    return affine_of(prepared), tuple(prepared.shape[1:])


def _fitted(
    initial: Registration,
    moving_affine: Tensor,
    moving_size: Sequence[int],
    node_spacing: int,
    steps: int,
    lr: float,
    smoothness: float,
) -> Tensor:
    """The displacement in RAS mm on the whole fixed grid, (n, *size) float32."""
    size, to_world = initial.grid_size, initial.grid_affine
    to_fixed, to_moving = torch.linalg.inv(to_world), torch.linalg.inv(moving_affine)
    target = to_normalised(transform_points(to_fixed, initial.points[:, 0]), size)
    source = to_normalised(transform_points(to_moving, initial.points[:, 1]), moving_size)
    affine = normalised_affine(to_moving @ initial.affine @ to_world, size, moving_size)
    nodes = [max(2, length // node_spacing) for length in size]
    _, disp = fit_coarse_field(source, target, affine, nodes, steps, lr, smoothness)
    extent = torch.tensor([(length - 1) / 2 for length in size], dtype=torch.float64)
    field = torch.einsum("ij,bj...->bi...", to_world[:-1, :-1] * extent, disp).float()
    return resize_linear(field[0], size, align_corners=True)
