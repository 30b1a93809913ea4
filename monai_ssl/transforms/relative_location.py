# SPDX-License-Identifier: Apache-2.0
"""The patch in the middle of a grid, others around it, and where each of those lies (RPL)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor

from ._one_draw import OneDrawd
from ._patches import PatchGrid, RandPatches, Shares, Sizes, per_axis

__all__ = [
    "RandRelativeLocation",
    "RandRelativeLocationD",
    "RandRelativeLocationDict",
    "RandRelativeLocationd",
    "location_offsets",
]


def location_offsets(grid_size: Sizes) -> torch.Tensor:
    """Position of each class of `RandRelativeLocation` relative to the centre, in cells.

    Args:
        grid_size: odd number of cells along each axis; an int means three axes.

    Returns:
        (P - 1, n) int64: the cells of the grid without the middle one, first axis slowest.

    Raises:
        ValueError: when a grid size is even, or there are fewer than 3 cells.
    """
    grid = _odd_grid(grid_size, 3)
    cells = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in grid)).reshape(-1, len(grid))
    return torch.cat([cells[: len(cells) // 2], cells[len(cells) // 2 + 1 :]])


class RandRelativeLocation(RandPatches):
    """Cut the patch in the middle of a grid and others around it, with the positions of the others as label.

    Source: 3D relative patch location (arXiv 2006.03829). The released code takes one query per volume, patches that
    may touch and 3 voxels of jitter (`RandRelativeLocation(3, 3, 0, 1)`); by default all neighbours are queries of one
    centre, and `gap` keeps them from being matched by their borders.
    The last draw stays in `starts` (P, n) of all patches of the grid and in `label` (Q,), int64.

    Args:
        grid_size: odd number of cells along each axis, P in all, an int or one per axis.
        jitter: range of the starts, in voxels if an int, as a share of the pitch, rounded down, if a float in [0, 1).
        gap: space between neighbours that is always free, as `jitter`.
        num_queries: number Q of distinct neighbours; None takes all P - 1, in random order.

    Shapes: (C, *spatial) -> (1 + Q, C, *patch), the centre first, then the queries in the order of the label, of the
    image's dtype. With meta tracking it carries the affine of the image. Label class c is at `location_offsets`[c].

    Raises:
        ValueError: when an argument is out of range, a patch does not fit into its cell, or the starts or the
            label given are not of this grid.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("starts", "label")

    def __init__(
        self,
        grid_size: Sizes = 3,
        jitter: Shares = 0.125,
        gap: Shares = 0.125,
        num_queries: int | None = None,
    ) -> None:
        self.grid = PatchGrid(grid_size, None, jitter, gap, 0)
        self.grid_size, self.num_queries = grid_size, num_queries
        self.label: torch.Tensor | None = None
        self._count_queries(prod(_odd_grid(grid_size, 3)))

    def randomize(self, image_size: Sequence[int]) -> None:
        """Draw the starts of all patches of the grid, then which of them are queries."""
        patches = len(self.grid(image_size)[0])
        queries = self._count_queries(patches)
        super().randomize(image_size)
        self.label = torch.as_tensor(self.R.permutation(patches - 1)[:queries], dtype=torch.int64)

    def apply(self, img: NdarrayOrTensor, starts: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Cut the centre and the queries, without any draw.

        Args:
            img: image, (C, *spatial).
            starts: first voxel of every patch of the grid, (P, n).
            label: class of each query, (Q,).

        Returns:
            Patches (1 + Q, C, *patch), the centre first.
        """
        return self.grid.cut(img, self.origins(starts, label))

    def origins(self, starts: torch.Tensor, *others: Any) -> torch.Tensor:
        """First voxel of the centre, then of each query, (1 + Q, n), from `starts` (P, n) and the label (Q,)."""
        starts, label = torch.as_tensor(starts), torch.as_tensor(others[0])
        patches = prod(_odd_grid(self.grid_size, starts.shape[-1]))
        if len(starts) != patches:
            raise ValueError(f"starts of shape {tuple(starts.shape)} are not those of a grid of {patches} patches")
        if label.ndim != 1 or ((label < 0) | (label > patches - 2)).any():
            raise ValueError(f"label must be (Q,) between 0 and {patches - 2}, got {label.tolist()}")
        centre = patches // 2
        return starts[torch.cat([label.new_tensor([centre]), label + (label >= centre)])]

    def _count_queries(self, patches: int) -> int:
        queries = patches - 1 if self.num_queries is None else self.num_queries
        if not 1 <= queries <= patches - 1:
            raise ValueError(f"num_queries must be between 1 and {patches - 1} for {patches} patches, got {queries}")
        return queries


class RandRelativeLocationd(OneDrawd):
    """Dictionary form of `RandRelativeLocation`; one draw for all keys, so that they show the same patches.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, `<key>` patches (1 + Q, C, *patch) and
    `<key>_origin` the first voxel of each in the image (1 + Q, n) int64, and once `label_key`, the class of each query
    (Q,) int64. Origins and label are plain tensors.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        grid_size: see `RandRelativeLocation`.
        jitter: see `RandRelativeLocation`.
        gap: see `RandRelativeLocation`.
        num_queries: see `RandRelativeLocation`.
        label_key: key of the label that is written.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandRelativeLocation`; or when keys differ in spatial shape, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        grid_size: Sizes = 3,
        jitter: Shares = 0.125,
        gap: Shares = 0.125,
        num_queries: int | None = None,
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandRelativeLocation(grid_size, jitter, gap, num_queries)
        super().__init__(keys, transform, label_key, True, allow_missing_keys)


RandRelativeLocationD = RandRelativeLocationDict = RandRelativeLocationd


def _odd_grid(grid_size: Any, ndim: int) -> tuple[int, ...]:
    """One odd number of cells per axis, at least 3 in all, or a ValueError."""
    grid = per_axis("grid_size", grid_size, len(grid_size) if np.ndim(grid_size) else ndim)
    if any(n % 2 == 0 for n in grid) or prod(grid) < 3:
        raise ValueError(f"grid_size must be odd, with at least 3 patches and so one in the middle, got {grid_size}")
    return grid
