# SPDX-License-Identifier: Apache-2.0
"""The patches of a grid in permuted order, and the number of the permutation (Jigsaw)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations as all_permutations
from math import factorial, prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor

from ._affine_permutations import affine_permutations, affine_rows, prime_power
from ._one_draw import OneDrawd
from ._patches import PatchGrid, RandPatches, Shares, Sizes, per_axis

__all__ = [
    "RandJigsaw",
    "RandJigsawD",
    "RandJigsawDict",
    "RandJigsawd",
    "affine_permutations",
    "greedy_permutations",
    "hamming_permutations",
]


def hamming_permutations(num_positions: int, num_permutations: int, seed: int = 0) -> torch.Tensor:
    """Permutations that differ from each other in as many positions as can be.

    Source: the permutation set of 3D-Jigsaw (arXiv 2006.03829), which is to have the largest Hamming distance; the
    released set is random. Where the number of positions q is a prime power and q (q - 1) suffice, rows are drawn
    without repetition from `affine_permutations`: any two differ in q positions, or in at least q - 1 if there are more
    than q rows, and no set does better. Otherwise `greedy_permutations` chooses.

    Args:
        num_positions: length q of each permutation.
        num_permutations: number of permutations.
        seed: same seed, same rows.

    Returns:
        (num_permutations, num_positions) int64, distinct rows.

    Raises:
        ValueError: when fewer than 2 permutations are wanted, or more than there are.
    """
    q, m = num_positions, num_permutations
    _check_count(q, m)
    if prime_power(q) is None or m > q * (q - 1):
        return greedy_permutations(q, m, seed)
    rows = np.random.RandomState(seed).permutation(q if m <= q else q * (q - 1))[:m]
    return affine_rows(q, seed, rows)


def greedy_permutations(q: int, m: int, seed: int = 0, pool_size: int = 4000) -> torch.Tensor:
    """Permutations chosen one after the other, each as far as can be from those chosen before.

    The choice is among all permutations in lexicographic order where these are at most M = max(pool_size, 4 m), else
    among M random ones. The first of them is taken, then always the one whose smallest Hamming distance to those taken
    is largest, the first of several.

    Args:
        q: number of positions.
        m: number of permutations.
        seed: of the random ones.
        pool_size: how many there are to choose from at least.

    Returns:
        (m, q) int64.

    Raises:
        ValueError: when fewer than 2 permutations are wanted, or more than there are.
    """
    _check_count(q, m)
    size = max(pool_size, 4 * m)
    if factorial(q) <= size:
        pool = np.array(list(all_permutations(range(q))))
    else:
        state = np.random.RandomState(seed)
        pool = np.stack([state.permutation(q) for _ in range(size)])
    columns = pool.T.astype(np.int16 if q < 2**15 else np.int64, order="C")  # (q, M): sums run along memory
    chosen = [0]
    nearest = (columns != columns[:, :1]).sum(0, dtype=np.int32)
    while len(chosen) < m:
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, (columns != columns[:, chosen[-1:]]).sum(0, dtype=np.int32), out=nearest)
    return torch.as_tensor(pool[chosen], dtype=torch.int64)


class RandJigsaw(RandPatches):
    """Cut an image into the patches of a grid and put them in the order of a random permutation out of a table.

    Source: 3D Jigsaw (arXiv 2006.03829). The released code has 100 random permutations of 27 patches that may touch,
    with 3 voxels of jitter (`RandJigsaw(3, 100, 3, 0, permutations=array)`); by default permutations are as far apart
    as can be, and `gap` keeps neighbours from being matched by their borders.
    The last draw stays in `starts` (P, n) of the patches in the order of the grid and in `label` (), int64.

    Args:
        grid_size: cells along each axis, P in all; an int means three axes.
        num_permutations: number of classes.
        jitter: range of the starts, in voxels if an int, as a share of the pitch, rounded down, if a float in [0, 1).
        gap: space between neighbours that is always free, as `jitter`.
        seed: of `hamming_permutations`, which makes the table.
        permutations: the table (classes, P) itself, which replaces `num_permutations` and `seed`.

    Shapes: (C, *spatial) -> (P, C, *patch), of the image's dtype; patch i is number `permutations[label][i]` of the
    grid, whose first axis is slowest. With meta tracking it carries the affine of the image.

    Raises:
        ValueError: when an argument is out of range, rows of `permutations` are equal or no permutations of P, a patch
            does not fit into its cell, or the starts or the label given are not of this grid and table.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("starts", "label")

    def __init__(
        self,
        grid_size: Sizes = (3, 3, 3),
        num_permutations: int = 100,
        jitter: Shares = 0.125,
        gap: Shares = 0.125,
        seed: int = 0,
        permutations: Any = None,
    ) -> None:
        grid = per_axis("grid_size", grid_size, len(grid_size) if np.ndim(grid_size) else 3)  # type: ignore[arg-type]
        self.grid = PatchGrid(grid, None, jitter, gap, 0)
        if permutations is None:
            self.permutations = hamming_permutations(prod(grid), num_permutations, seed)
        else:
            self.permutations = _checked_table(permutations, prod(grid))
        self.label: torch.Tensor | None = None

    def randomize(self, image_size: Sequence[int]) -> None:
        """Draw the starts, then the permutation."""
        super().randomize(image_size)
        self.label = torch.tensor(int(self.R.randint(len(self.permutations))))

    def apply(self, img: NdarrayOrTensor, starts: torch.Tensor, label: torch.Tensor | int) -> torch.Tensor:
        """Cut the patches in the order of a permutation, without any draw.

        Args:
            img: image, (C, *spatial).
            starts: first voxel of every patch in the order of the grid, (P, n).
            label: number of the permutation.

        Returns:
            Patches (P, C, *patch).
        """
        return self.grid.cut(img, self.origins(starts, label))

    def origins(self, starts: torch.Tensor, *others: Any) -> torch.Tensor:
        """First voxel of every patch in the order of the output (P, n), from that of the grid and the label."""
        starts, (classes, patches) = torch.as_tensor(starts), self.permutations.shape
        label = int(others[0])
        if len(starts) != patches:
            raise ValueError(f"starts of shape {tuple(starts.shape)} are not those of a grid of {patches} patches")
        if not 0 <= label < classes:
            raise ValueError(f"label must be between 0 and {classes - 1}, got {label}")
        return starts[self.permutations[label]]


class RandJigsawd(OneDrawd):
    """Dictionary form of `RandJigsaw`; one draw for all keys, so that they show the same patches in the same order.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, `<key>` patches (P, C, *patch) and
    `<key>_origin` the first voxel of each in the image (P, n) int64, and once `label_key`, the number of the
    permutation () int64. Origins and label are plain tensors. The table is in `permutations`.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        grid_size: see `RandJigsaw`.
        num_permutations: see `RandJigsaw`.
        jitter: see `RandJigsaw`.
        gap: see `RandJigsaw`.
        seed: see `RandJigsaw`.
        permutations: see `RandJigsaw`.
        label_key: key of the label that is written.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandJigsaw`; or when keys differ in spatial shape, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        grid_size: Sizes = (3, 3, 3),
        num_permutations: int = 100,
        jitter: Shares = 0.125,
        gap: Shares = 0.125,
        seed: int = 0,
        permutations: Any = None,
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandJigsaw(grid_size, num_permutations, jitter, gap, seed, permutations)
        super().__init__(keys, transform, label_key, True, allow_missing_keys)
        self.permutations = transform.permutations


RandJigsawD = RandJigsawDict = RandJigsawd


def _check_count(q: int, m: int) -> None:
    if q < 1 or not 2 <= m <= factorial(q):
        raise ValueError(f"there must be between 2 and {q}! permutations of {q} positions, got {m}")


def _checked_table(permutations: Any, patches: int) -> torch.Tensor:
    """The table as a tensor of its own, or a ValueError."""
    table = permutations.clone() if isinstance(permutations, torch.Tensor) else torch.as_tensor(np.array(permutations))
    if len(table) and (table.dtype == torch.bool or table.is_floating_point()):
        raise ValueError(f"permutations must hold whole numbers, got {table.dtype}")
    table = table.to("cpu", torch.int64)
    if table.ndim != 2 or not torch.equal(table.sort(-1).values, torch.arange(patches).expand(len(table), -1)):
        raise ValueError(
            f"permutations of shape {tuple(table.shape)} must hold permutations of 0..{patches - 1} in rows"
        )
    if len(table) == 0 or len(table.unique(dim=0)) != len(table):
        raise ValueError(f"the {len(table)} rows of permutations must be distinct, and at least one")
    return table
