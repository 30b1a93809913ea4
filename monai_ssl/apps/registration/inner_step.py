# SPDX-License-Identifier: Apache-2.0
"""What the last steps share: they look at the moving image where the steps before put it, and move the fixed side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points, voxel_index

from .fields import folding
from .result import Registration

__all__ = ["after_inner_step", "on_grid"]


def on_grid(initial: Registration | None, affine: Tensor, size: Sequence[int]) -> Registration:
    """A registration with its displacement on another grid of the fixed image; x -> x where there is none.

    Args:
        initial: what came before; None: both images lie in one world.
        affine: index in the grid -> RAS mm of the fixed image, (n + 1, n + 1).
        size: nodes along each axis, n in all.
    """
    size, n, affine = tuple(size), len(size), affine.cpu().double()
    if initial is None:
        none = torch.zeros(0, 2, n, dtype=torch.float64)
        return Registration(torch.eye(n + 1, dtype=torch.float64), None, affine, size, none, torch.zeros(0), {})
    same = tuple(initial.grid_size) == size and torch.allclose(initial.grid_affine.cpu(), affine, atol=1e-6)
    if same or initial.displacement is None:
        return dataclasses.replace(initial, grid_affine=affine, grid_size=size)
    nodes = transform_points(affine, voxel_index(size))
    d = transform_points(torch.linalg.inv(initial.affine), initial.map_points(nodes)) - nodes
    return dataclasses.replace(initial, displacement=d.T.reshape(n, *size).float(), grid_affine=affine, grid_size=size)


def after_inner_step(initial: Registration, field: Tensor, name: str, start: float) -> Registration:
    """A registration after a displacement of the fixed side, with its report.

    Args:
        initial: what came before.
        field: in voxels of its grid, (n, *size); what lies beyond the grid is padding.
        name: of the step.
        start: when it began, by `time.perf_counter`.
    """
    for axis, length in enumerate(initial.grid_size, start=1):
        field = field.narrow(axis, 0, length)
    to_world = initial.grid_affine[:-1, :-1].to(field)
    result = initial.then_inner(torch.einsum("ij,j...->i...", to_world, field))
    d: Any = result.displacement
    total = torch.einsum("ij,j...->i...", torch.linalg.inv(to_world), d.to(field))
    report = {**initial.report, "folding_share": folding(total[None])["folding_share"]}
    result = dataclasses.replace(result, displacement=d.cpu(), report=report)
    if len(result.points):
        residual = (result.map_points(result.points[:, 0]) - result.points[:, 1]).norm(dim=1)
        report |= {"residual_mean_mm": float(residual.mean()), "residual_median_mm": float(residual.median())}
    report["seconds"] = {**report.get("seconds", {}), name: time.perf_counter() - start}
    return result
