# SPDX-License-Identifier: Apache-2.0
"""Pairs of embeddings whose transform is known: random Fourier features of the voxel that each cell shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_ssl.apps import ImageEmbedding, PointMatcher
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

SIZE = (32, 48, 64)
SCALES, STRIDES = (8.0, 40.0), ((2, 2, 2), (4, 16, 16))
# what the voxel p of the fixed image shows lies at the voxel A p of the moving one
AFFINE = torch.tensor(
    [[1.06, 0.03, 0, 1], [-0.02, 0.94, 0.05, 2], [0.03, -0.02, 1.04, -3], [0, 0, 0, 1]], dtype=torch.float64
)


def affine(p: Tensor) -> Tensor:
    return transform_points(AFFINE, p)


def bent(p: Tensor) -> Tensor:
    return affine(p) + 2.5 * torch.sin(2 * math.pi * p[:, [1, 2, 0]] / 40)


def embedding(
    shows: Callable[[Tensor], Tensor] = lambda p: p,
    size: Sequence[int] = SIZE,
    world: Tensor | None = None,
    strides: Sequence[Sequence[int]] = STRIDES,
) -> ImageEmbedding:
    """Of an image whose voxels (P, n) show the places `shows` of a common field."""
    g, maps = torch.Generator().manual_seed(0), []
    for scale, stride in zip(SCALES, strides):
        weight = torch.randn(128, len(size), generator=g, dtype=torch.float64) / scale
        phase = torch.rand(128, generator=g, dtype=torch.float64) * 2 * math.pi
        cells, step = [n // s for n, s in zip(size, stride)], torch.tensor(stride, dtype=torch.float64)
        places = shows(voxel_index(cells) * step + (step - 1) / 2)
        maps.append(F.normalize(torch.cos(places @ weight.T + phase), dim=-1).T.reshape(-1, *cells).float())
    world = torch.eye(len(size) + 1, dtype=torch.float64) if world is None else world
    return ImageEmbedding(maps, world, tuple(size), world)


def border_mask(size: Sequence[int] = SIZE, border: Sequence[int] = (3, 4, 4)) -> Tensor:
    """True but for some voxels at each side."""
    mask = torch.zeros(tuple(size), dtype=torch.bool)
    mask[tuple(slice(b, -b) for b in border)] = True
    return mask


def matcher(chunk_size: int = 64) -> PointMatcher:
    """For embeddings alone."""
    return PointMatcher(nn.Identity(), device="cpu", chunk_size=chunk_size)


def same_cells(
    size: Sequence[int], fixed_world: Tensor, moving_world: Tensor
) -> tuple[ImageEmbedding, ImageEmbedding, Tensor]:
    """Moving, fixed, fixed world -> moving world: the fixed image has its axes the other way round and one mirrored.

    Cells are equal one by one, so that matches without refinement are exact.
    """
    values = F.normalize(torch.randn(40, *size, generator=torch.Generator().manual_seed(3)), dim=0)
    n, covered = len(size), [2 * s for s in size]
    moving = ImageEmbedding([values], moving_world, tuple(covered), moving_world)
    turned = values.movedim(list(range(1, n + 1)), list(range(n, 0, -1))).flip(1).contiguous()
    fixed = ImageEmbedding([turned], fixed_world, tuple(covered[::-1]), fixed_world)
    index = torch.zeros(n + 1, n + 1, dtype=torch.float64)  # voxel of fixed -> voxel of moving
    index[range(n), range(n - 1, -1, -1)] = 1
    index[n, n] = 1
    index[n - 1, 0], index[n - 1, n] = -1, covered[-1] - 1
    return moving, fixed, moving_world @ index @ torch.linalg.inv(fixed_world)
