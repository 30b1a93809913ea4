# SPDX-License-Identifier: Apache-2.0
"""Registrations that are known by formula, on oblique grids of unequal spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.apps import Registration
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

SIZE = (9, 11, 7)
AFFINE = torch.tensor(
    [[1.05, 0.02, 0, 3], [-0.03, 0.95, 0.04, -2], [0, -0.02, 1.08, 4], [0, 0, 0, 1]], dtype=torch.float64
)
LPS = torch.tensor([-1.0, -1, 1], dtype=torch.float64)


def oblique(spacing: Sequence[float], origin: Sequence[float], angles: Sequence[float] = (0.3, -0.2, 0.5)) -> Tensor:
    """Index -> RAS mm of a grid turned about each axis, (4, 4)."""
    matrix = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    matrix[:3, 3] = torch.tensor(origin, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        turn, (a, b) = torch.eye(3, dtype=torch.float64), [other for other in range(3) if other != axis]
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix[:3, :3] = turn @ matrix[:3, :3]
    return matrix


GRID = oblique((1.5, 2, 3), (-40, 25, 300))


def result(
    affine: Tensor | None = None,
    displacement: Tensor | None = None,
    grid: Tensor = GRID,
    size: Sequence[int] = SIZE,
) -> Registration:
    """Without matches."""
    n = len(size)
    affine = torch.eye(n + 1) if affine is None else affine
    return Registration(affine, displacement, grid, tuple(size), torch.zeros(0, 2, n), torch.zeros(0), {})


def rough(seed: int = 0, amplitude: float = 2.0, size: Sequence[int] = SIZE) -> Tensor:
    """A displacement in mm that differs from node to node."""
    generator = torch.Generator().manual_seed(seed)
    return amplitude * torch.randn(len(size), *size, generator=generator)


def world(grid: Tensor, size: Sequence[int]) -> Tensor:
    """RAS mm of every voxel, (V, n)."""
    return transform_points(grid, voxel_index(size))


def coordinates(grid: Tensor, size: Sequence[int], dtype: torch.dtype = torch.float64) -> MetaTensor:
    """An image whose channels are its world coordinates, (n, *size): any linear interpolation of it is exact."""
    return MetaTensor(world(grid, size).T.reshape(-1, *size).to(dtype), affine=grid)
