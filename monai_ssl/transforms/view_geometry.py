# SPDX-License-Identifier: Apache-2.0
"""From indices of voxels and cells to the world and back, as plain tensors (SAM)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

__all__ = [
    "feature_affine",
    "nearest_correspondence",
    "spacing_of",
    "squared_distance",
    "transform_points",
    "vector_like",
    "voxel_index",
]


def vector_like(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """Few numbers with the type and on the device of a tensor, without a copy from the host that a GPU would wait for.

    Args:
        like: any shape.
        values: n numbers.

    Returns:
        (n,).
    """
    return torch.stack([like.new_full((), value) for value in values])


def voxel_index(size: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Index of every voxel of a grid, last axis fastest.

    Args:
        size: voxels along each axis, n in all.
        device: of the result.

    Returns:
        (V, n) int64 with V the product of `size`.
    """
    axes = [torch.arange(int(length), device=device) for length in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def transform_points(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Apply an affine to points.

    Args:
        matrix: (..., n + 1, n + 1).
        points: (..., P, n), of any dtype; leading dimensions broadcast.

    Returns:
        (..., P, n) of the matrix' dtype, or of the points' where that is wider.
    """
    dtype = torch.promote_types(matrix.dtype, points.dtype)
    matrix, points = matrix.to(dtype), points.to(dtype)
    return points @ matrix[..., :-1, :-1].transpose(-1, -2) + matrix[..., None, :-1, -1]


def spacing_of(affine: torch.Tensor) -> torch.Tensor:
    """Step in the world from one voxel to the next along each axis: the norms of the columns.

    Args:
        affine: (..., n + 1, n + 1).

    Returns:
        (..., n), in the unit of the world.
    """
    return affine[..., :-1, :-1].square().sum(-2).sqrt()


def feature_affine(view_affine: torch.Tensor, view_size: Sequence[int], feature_size: Sequence[int]) -> torch.Tensor:
    """The affine of a feature map whose cells fill the view: cell i lies at view index s i + (s - 1) / 2.

    The same as resampling an image of coordinates to the map with `F.interpolate(align_corners=False)`.

    Args:
        view_affine: index in the view -> any space, (..., n + 1, n + 1).
        view_size: voxels of the view along each axis.
        feature_size: cells of the map along each axis.

    Returns:
        Index in the map -> the same space, (..., n + 1, n + 1).

    Raises:
        ValueError: when the view is not a whole number of cells s along an axis.
    """
    view, cells = tuple(int(v) for v in view_size), tuple(int(f) for f in feature_size)
    if len(view) != len(cells) or any(f < 1 or v % f for v, f in zip(view, cells)):
        raise ValueError(f"a view of {view} voxels does not divide into a map of {cells} cells")
    stride = [v // f for v, f in zip(view, cells)]
    step = torch.diag(vector_like(view_affine, [*stride, 1]))
    step[:-1, -1] = vector_like(view_affine, [(s - 1) / 2 for s in stride])
    return view_affine @ step


def nearest_correspondence(
    affines: torch.Tensor, size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every cell of either map of a pair the place of its centre in the other map and the cell nearest to it.

    Source: SAM (arXiv 2012.02383), the correspondences of its released sampler, here from affines in float64. Rounding
    and clamping axis by axis finds the nearest cell because the axes of a map are orthogonal.

    Args:
        affines: index in the map -> world, (B, 2, n + 1, n + 1).
        size: cells of the maps along each axis, N in all.

    Returns:
        Continuous index in the other map (B, 2, N, n) float64, number of the nearest cell there (B, 2, N) int64, last
        axis fastest, and its distance (B, 2, N) float64 in the unit of the world.
    """
    affines = affines.double()
    other = affines.flip(1)
    # inv and solve would wait for the device to look for errors
    index = transform_points(torch.linalg.inv_ex(other).inverse @ affines, voxel_index(size, affines.device))
    nearest = torch.minimum(index.round().clamp_min(0), vector_like(index, [length - 1 for length in size]))
    distance = ((index - nearest) * spacing_of(other)[..., None, :]).square().sum(-1).sqrt()
    cells = nearest.long()
    number = (cells * vector_like(cells, [prod(size[axis + 1 :]) for axis in range(len(size))])).sum(-1)
    return index, number, distance


def squared_distance(index: torch.Tensor, size: Sequence[int], spacing: torch.Tensor) -> torch.Tensor:
    """Squared distance of places to the centre of every cell of a grid with orthogonal axes.

    One table for each axis and their sum: differences of coordinates, n times as many numbers, are never formed.

    Args:
        index: continuous index in the grid, (..., n).
        size: cells of the grid along each axis, V in all.
        spacing: of the grid, (..., n), mm; leading dimensions broadcast.

    Returns:
        (..., V) in mm², last axis of the grid fastest, of the wider dtype of `index` and `spacing`.
    """
    index, spacing = torch.broadcast_tensors(index, spacing)
    dtype = torch.promote_types(index.dtype, spacing.dtype)
    index, spacing = index.to(dtype), spacing.to(dtype)
    total = index.new_zeros(*index.shape[:-1], 1)
    for axis, length in enumerate(size):
        cells = torch.arange(int(length), dtype=dtype, device=index.device)
        table = ((cells - index[..., axis, None]) * spacing[..., axis, None]).square()  # (..., length)
        total = (total[..., :, None] + table[..., None, :]).flatten(-2)
    return total
