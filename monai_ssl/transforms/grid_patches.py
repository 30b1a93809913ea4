# SPDX-License-Identifier: Apache-2.0
"""Patches from the cells of a regular grid, with jitter, guaranteed space between them, or overlap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform

from ._one_draw import OneDraw, OneDrawd, check_written_keys, shared_size
from ._patches import PatchGrid, RandPatches, Shares, Sizes, extract_patches, patch_grid

__all__ = [
    "GridPatches",
    "GridPatchesD",
    "GridPatchesDict",
    "GridPatchesd",
    "RandGridPatches",
    "RandGridPatchesD",
    "RandGridPatchesDict",
    "RandGridPatchesd",
    "extract_patches",
    "patch_grid",
]


class GridPatches(Transform):
    """Cut an image into the patches of a regular grid, each in the middle of its range of jitter.

    Source: the patches of 3D-CPC, 3D-RPL and 3D-Jigsaw (arXiv 2006.03829). The released code leaves no space between
    neighbours, which can then be matched by the borders that touch; `gap` keeps them apart whatever the jitter.
    The starts of the last call stay in `starts` (P, n) int64.

    Args:
        grid_size: cells along each axis, P in all; this and the following are one value for all axes or one per axis.
        patch_size: patch size in voxels; None takes what jitter and gap leave of a cell.
        jitter: range of the starts, in voxels if an int, as a share of the pitch, rounded down, if a float in [0, 1).
        gap: space between neighbours that is always free, as `jitter`.
        overlap: voxels that neighbouring cells share; not together with a gap.

    Shapes: (C, *spatial) -> (P, C, *patch), first axis slowest, of the image's dtype. With meta tracking it carries
    the affine of the image; patch p lies at `affine @ translate(starts[p])`.

    Raises:
        ValueError: when an argument is out of range, or a patch does not fit into its cell.
    """

    backend = OneDraw.backend

    def __init__(
        self,
        grid_size: Sizes,
        patch_size: Sizes | None = None,
        jitter: Shares = 0,
        gap: Shares = 0,
        overlap: Sizes = 0,
    ) -> None:
        self.grid = PatchGrid(grid_size, patch_size, jitter, gap, overlap)
        self.starts: torch.Tensor | None = None

    def fixed_starts(self, image_size: Sequence[int]) -> torch.Tensor:
        """First voxel of every patch, (P, n)."""
        lowest, _, jitter = self.grid(image_size)
        return lowest + torch.tensor(jitter) // 2

    def apply(self, img: NdarrayOrTensor, starts: torch.Tensor) -> torch.Tensor:
        """Cut the patches that begin at `starts` (P, n): (P, C, *patch)."""
        return self.grid.cut(img, starts)

    def __call__(self, img: NdarrayOrTensor) -> torch.Tensor:
        self.starts = self.fixed_starts(img.shape[1:])
        return self.apply(img, self.starts)


class GridPatchesd(MapTransform):
    """Dictionary form of `GridPatches`.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, `<key>` patches (P, C, *patch) and
    `<key>_origin` the first voxel of each in the image (P, n) int64, a plain tensor.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        grid_size: see `GridPatches`.
        patch_size: see `GridPatches`.
        jitter: see `GridPatches`.
        gap: see `GridPatches`.
        overlap: see `GridPatches`.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `GridPatches`; or when keys differ in spatial shape, or one key would be written twice.
    """

    backend = GridPatches.backend

    def __init__(
        self,
        keys: KeysCollection,
        grid_size: Sizes,
        patch_size: Sizes | None = None,
        jitter: Shares = 0,
        gap: Shares = 0,
        overlap: Sizes = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_written_keys(self.keys, None)
        self.transform = GridPatches(grid_size, patch_size, jitter, gap, overlap)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        keys = list(self.key_iterator(d))
        if not keys:
            return d
        starts = self.transform.fixed_starts(shared_size(d, keys))
        for key in keys:
            d[key], d[f"{key}_origin"] = self.transform.apply(d[key], starts), starts.clone()
        return d


class RandGridPatches(RandPatches):
    """Cut an image into the patches of a regular grid, each shifted at random within its range of jitter.

    Source: the patches of 3D-CPC, 3D-RPL and 3D-Jigsaw (arXiv 2006.03829); see `GridPatches` on the space between
    neighbours. The released code shifts patches in validation too; use `GridPatches` there.
    The last draw stays in `starts` (P, n) int64.

    Args:
        grid_size: see `GridPatches`.
        patch_size: see `GridPatches`.
        jitter: see `GridPatches`; every patch and axis is drawn on its own, all values alike.
        gap: see `GridPatches`.
        overlap: see `GridPatches`.

    Shapes: (C, *spatial) -> (P, C, *patch), as `GridPatches`.

    Raises:
        ValueError: when an argument is out of range, a patch does not fit into its cell, or a start lies outside.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        grid_size: Sizes,
        patch_size: Sizes | None = None,
        jitter: Shares = 0,
        gap: Shares = 0,
        overlap: Sizes = 0,
    ) -> None:
        self.grid = PatchGrid(grid_size, patch_size, jitter, gap, overlap)

    def apply(self, img: NdarrayOrTensor, starts: torch.Tensor) -> torch.Tensor:
        """Cut the patches that begin at `starts` (P, n): (P, C, *patch)."""
        return self.grid.cut(img, starts)


class RandGridPatchesd(OneDrawd):
    """Dictionary form of `RandGridPatches`; one draw for all keys, so that they show the same patches.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, `<key>` patches (P, C, *patch) and
    `<key>_origin` the first voxel of each in the image (P, n) int64, a plain tensor.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        grid_size: see `GridPatches`.
        patch_size: see `GridPatches`.
        jitter: see `RandGridPatches`.
        gap: see `GridPatches`.
        overlap: see `GridPatches`.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandGridPatches`; or when keys differ in spatial shape, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        grid_size: Sizes,
        patch_size: Sizes | None = None,
        jitter: Shares = 0,
        gap: Shares = 0,
        overlap: Sizes = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandGridPatches(grid_size, patch_size, jitter, gap, overlap)
        super().__init__(keys, transform, None, True, allow_missing_keys)


GridPatchesD = GridPatchesDict = GridPatchesd
RandGridPatchesD = RandGridPatchesDict = RandGridPatchesd
