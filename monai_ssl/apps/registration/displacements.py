# SPDX-License-Identifier: Apache-2.0
"""Transforms A(x + d(x)) of the world, d given at the nodes of a grid, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

from .voxel_sampling import fill_voxels, sample_voxels, voxels_at

__all__ = ["compose_displacement", "invert_displacement", "point_mapping", "steps_on_grid"]


def point_mapping(
    affine: Tensor, d: Tensor | None, grid_affine: Tensor, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The transform as a function of points in mm, (P, n) float64 on a device -> likewise.

    Args:
        affine: A, mm -> mm, (n + 1, n + 1) float64.
        d: mm at the nodes of a grid, (n, *size): linear, its border value within the outer half voxel, 0 beyond. None:
            the affine alone.
        grid_affine: index in the grid -> mm, (n + 1, n + 1) float64.
        device: of the points.
    """
    affine, voxels = affine.to(device), torch.linalg.inv(grid_affine).to(device)
    field = None if d is None else d.to(device).double()

    def mapped(points: Tensor) -> Tensor:
        if field is not None:
            points = (
                points + sample_voxels(field, transform_points(voxels, points), beyond=field.new_zeros(len(field))).T
            )
        return transform_points(affine, points)

    return mapped


def steps_on_grid(
    mapped: Callable[[Tensor], Tensor], grid_affine: Tensor, size: Sequence[int], linear: Tensor, device: torch.device
) -> Tensor:
    """How far a transform moves the voxels of a grid: linear (T(x) - x).

    Args:
        mapped: T of :func:`point_mapping`.
        grid_affine: index in the grid -> mm, (n + 1, n + 1) float64.
        size: voxels along each axis.
        linear: from mm to the unit of the result, (n, n) float64.
        device: of `mapped`.

    Returns:
        (n, *size) float32.
    """
    matrix, linear = grid_affine.to(device), linear.to(device)

    def moved(index: Tensor) -> Tensor:
        world = transform_points(matrix, index)
        return linear @ (mapped(world) - world).T

    return fill_voxels(torch.empty(len(size), *size, device=device), moved)


def compose_displacement(d: Tensor, v: Tensor, affine: Tensor) -> Tensor:
    """The displacement of (id + d) after (id + v): d(x + v(x)) + v(x).

    Args:
        d: mm at the nodes of a grid, (n, *size); its border value continues beyond it.
        v: mm on the same grid, (n, *size); it is applied first.
        affine: index in the grid -> mm, (n + 1, n + 1).

    Returns:
        (n, *size), of the dtype of `d`, on the device of `v`.
    """
    field, voxels = d.to(v.device).double(), torch.linalg.inv(affine[:-1, :-1]).to(v.device)

    def composed(index: Tensor) -> Tensor:
        inner = voxels_at(v, index.long()).double()
        return sample_voxels(field, index + (voxels @ inner).T) + inner

    return fill_voxels(torch.empty(v.shape, dtype=d.dtype, device=v.device), composed)


def invert_displacement(d: Tensor, affine: Tensor, tolerance: float = 1e-4, num_steps: int = 100) -> Tensor:
    """The displacement w of the inverse of (id + d), by the fixed-point iteration w(x) = -d(x + w(x)).

    Args:
        d: mm at the nodes of a grid, (n, *size); its border value continues beyond it.
        affine: index in the grid -> mm, (n + 1, n + 1).
        tolerance: mm by which no component changes any more.
        num_steps: at most.

    Returns:
        (n, *size) float64.

    Raises:
        ValueError: it does not settle.
    """
    field, voxels = d.double(), torch.linalg.inv(affine[:-1, :-1]).to(d.device)
    found, change = torch.zeros_like(field), float("inf")
    for _ in range(num_steps):

        def improved(index: Tensor, w: Tensor = found) -> Tensor:
            return -sample_voxels(field, index + (voxels @ voxels_at(w, index.long())).T)

        before, found = found, fill_voxels(torch.empty_like(field), improved)
        change = float((found - before).abs().max())
        if change < tolerance:
            return found
    raise ValueError(
        f"the displacement has no inverse that is found: it still changes by {change:.3g} mm after {num_steps} steps, "
        "since it folds, or nearly so"
    )
