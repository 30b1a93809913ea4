# SPDX-License-Identifier: Apache-2.0
"""Base crops on a grid, random crops anywhere, and the share of each random crop in each base cell (VoCo)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import MAX_SEED, TransformBackends, convert_to_tensor, ensure_tuple, ensure_tuple_rep

from ._each_crop import transform_each

__all__ = [
    "RandVoCoCrops",
    "RandVoCoCropsD",
    "RandVoCoCropsDict",
    "RandVoCoCropsd",
    "base_origins",
    "overlap_fractions",
]


def base_origins(roi_size: Sequence[int] | int, grid_size: Sequence[int]) -> torch.Tensor:
    """First voxel of every base crop: cell (i_0, ...) starts at i_a * roi_a, last axis fastest.

    Args:
        roi_size: crop size in voxels, an int or one per axis.
        grid_size: number of base crops along each axis.

    Returns:
        (K, n) int64 with K the product of `grid_size` and n the number of axes.
    """
    roi, grid = _sizes(roi_size, grid_size)
    return torch.tensor([[i * r for i, r in zip(cell, roi)] for cell in product(*map(range, grid))])


def overlap_fractions(
    origin: torch.Tensor,
    roi_size: Sequence[int] | int,
    grid_size: Sequence[int],
    base_size: Sequence[int] | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Share of the voxels of a crop that lies in each cell of the base grid.

    Source: VoCo, position labels (arXiv 2402.17300). Along one axis a crop [s, s + r) and cell i, [i b, (i + 1) b),
    share max(0, min((i + 1) b, s + r) - max(i b, s)) / r; a cell's share is the product over the axes.

    Args:
        origin: first voxel of each crop, (..., n).
        roi_size: crop size in voxels, an int or one per axis.
        grid_size: number of base crops along each axis.
        base_size: size of a base crop in voxels where it differs from the random crop's.
        dtype: of the result; the computation is in float64.

    Returns:
        (..., K), cells in the order of `base_origins`; each row sums to 1 where the crop lies inside the grid.

    Raises:
        ValueError: when the last axis of `origin` has not one entry per spatial axis.
    """
    roi, grid = _sizes(roi_size, grid_size)
    base, _ = _sizes(roi if base_size is None else base_size, grid_size, "base_size")
    origin = torch.as_tensor(origin)
    if origin.ndim == 0 or origin.shape[-1] != len(grid):
        raise ValueError(f"origin of shape {tuple(origin.shape)} must end in {len(grid)}, one per axis of grid {grid}")
    start = origin[..., None, :].to(torch.float64)  # (..., 1, n)
    lower = base_origins(base, grid).to(start)  # (K, n)
    size, cell = start.new_tensor(roi), start.new_tensor(base)
    share = (torch.minimum(lower + cell, start + size) - torch.maximum(lower, start)).clamp_min(0) / size
    return share.prod(-1).to(dtype)


class RandVoCoCrops(Randomizable, Transform):
    """Cut a window into a grid of base crops and draw random crops of the same size, with their overlaps as label.

    Source: VoCo (arXiv 2402.17300; arXiv 2410.09890). The released code never draws the last start of an axis
    (`inclusive=False`); by default every start is as likely as any other, which treats opposite sides alike.
    The last draw stays in `starts` (R, n) int64, `label` (R, K) float32 and `seed`.

    Args:
        roi_size: crop size in voxels, an int or one per axis.
        grid_size: number of base crops along each axis, K in all; the window is `grid_size * roi_size` voxels.
        num_samples: number of random crops R.
        crop_transform: augmentation of single crops, called with one plain tensor (C, *roi) at a time, which it may
            change. It is copied here, reseeded once per item when it is `Randomizable`, and called on the base crops
            first. Anything else must be deterministic. It may change the crop size, alike for all crops.
        inclusive: whether a random crop may start at the last possible voxel.

    Shapes: (C, *window) -> random crops (R, C, *roi) and base crops (K, C, *roi), of the image's dtype unless
    `crop_transform` changes it. With meta tracking both carry the affine of the window; random crop r lies at
    `affine @ translate(starts[r])`, base crop k at `affine @ translate(base_origins(...)[k])`, before `crop_transform`.

    Raises:
        ValueError: when sizes or counts are out of range or unequal in number, the window has another shape, a start
            lies outside, or crops differ in shape after `crop_transform`.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        grid_size: Sequence[int] = (3, 3, 1),
        num_samples: int = 2,
        crop_transform: Callable[..., Any] | None = None,
        inclusive: bool = True,
    ) -> None:
        self.roi_size, self.grid_size = _sizes(roi_size, grid_size)
        if prod(self.grid_size) < 2:
            raise ValueError(f"grid_size {self.grid_size} has fewer than two base crops")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.crop_transform = deepcopy(crop_transform)
        self.inclusive = inclusive
        self.origins = base_origins(self.roi_size, self.grid_size)
        self.starts: torch.Tensor | None = None
        self.label: torch.Tensor | None = None
        self.seed: int | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw the starts in voxels, random crop by random crop and axis by axis, then the seed of `crop_transform`."""
        last = int(self.inclusive)
        self.starts = torch.tensor(
            [
                [
                    int(self.R.randint(0, (g - 1) * r + last)) if g > 1 else 0
                    for r, g in zip(self.roi_size, self.grid_size)
                ]
                for _ in range(self.num_samples)
            ]
        )
        self.label = overlap_fractions(self.starts, self.roi_size, self.grid_size)
        self.seed = None
        if isinstance(self.crop_transform, Randomizable):
            self.seed = int(self.R.randint(MAX_SEED, dtype="uint32"))

    def apply(
        self, img: NdarrayOrTensor, starts: torch.Tensor, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut the random crops at `starts` and the base crops, without any draw of its own.

        Args:
            img: window, (C, *window).
            starts: first voxel of each random crop, (R, n).
            seed: for `crop_transform`; without one that is left in the state it is in.

        Returns:
            Random crops (R, C, *roi) and base crops (K, C, *roi).
        """
        self._check_shape(img.shape)
        starts = torch.as_tensor(starts)
        limit = torch.tensor([(g - 1) * r for r, g in zip(self.roi_size, self.grid_size)])
        if starts.ndim != 2 or starts.shape[1] != len(limit) or ((starts < 0) | (starts > limit)).any():
            raise ValueError(f"starts must be (R, {len(limit)}) between 0 and {limit.tolist()}, got {starts.tolist()}")
        window = _plain_tensor(img)
        if seed is not None and isinstance(self.crop_transform, Randomizable):
            self.crop_transform.set_random_state(seed=seed)
        bases, samples = self._cut(window, self.origins), self._cut(window, starts)
        if bases.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"crop_transform turned base crops of roi_size {self.roi_size} into shape {tuple(bases.shape[1:])}, "
                f"random crops into {tuple(samples.shape[1:])}"
            )
        if not get_track_meta():
            return samples, bases
        meta = img.meta if isinstance(img, MetaTensor) else {}
        return MetaTensor(samples, meta=deepcopy(meta)), MetaTensor(bases, meta=deepcopy(meta))

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw, unless `randomize` is False, which repeats the last draw, and cut.

        Args:
            img: window, (C, *window).
            randomize: whether to draw anew.

        Returns:
            Random crops (R, C, *roi) and base crops (K, C, *roi).
        """
        self._check_shape(img.shape)
        if randomize:
            self.randomize()
        starts, _ = self._last_draw()
        return self.apply(img, starts, self.seed)

    def _last_draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.starts is None or self.label is None:
            raise RuntimeError("randomize=False repeats the last draw, but nothing has been drawn yet")
        return self.starts, self.label

    def _check_shape(self, shape: Sequence[int], name: str = "img") -> None:
        window = tuple(g * r for g, r in zip(self.grid_size, self.roi_size))
        if tuple(shape[1:]) != window:
            raise ValueError(
                f"'{name}' has spatial shape {tuple(shape[1:])}, but grid_size {self.grid_size} of roi_size "
                f"{self.roi_size} needs exactly {window}; use RandSpatialCropd, SpatialPadd or Resized before"
            )

    def _cut(self, window: torch.Tensor, origins: torch.Tensor) -> torch.Tensor:
        slices = ((slice(None), *(slice(o, o + r) for o, r in zip(row, self.roi_size))) for row in origins.tolist())
        crops = [window[s] for s in slices]
        if self.crop_transform is None:
            return torch.stack(crops)  # (crops, C, *roi), a copy
        return transform_each(self.crop_transform, crops)


class RandVoCoCropsd(MapTransform, Randomizable):
    """Dictionary form of `RandVoCoCrops`; one draw for all keys, so that they show the same crops.

    Source: VoCo (arXiv 2402.17300). An item holds afterwards, for every key, `<key>` random crops (R, C, *roi),
    `<key>_base` base crops (K, C, *roi) and `<key>_origin` first voxel of each random crop in the window (R, n) int64,
    and once `label_key`, the overlap fractions (R, K) float32. Origins and label are plain tensors.

    Args:
        keys: images of one window, (C, *window).
        roi_size: see `RandVoCoCrops`.
        grid_size: see `RandVoCoCrops`.
        num_samples: see `RandVoCoCrops`.
        crop_transform: see `RandVoCoCrops`; every key gets the same draws.
        inclusive: see `RandVoCoCrops`.
        label_key: key of the label that is written.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandVoCoCrops`, with the key; or when `label_key` is a key that crops are written to.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    backend = RandVoCoCrops.backend

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int] | int,
        grid_size: Sequence[int] = (3, 3, 1),
        num_samples: int = 2,
        crop_transform: Callable[..., Any] | None = None,
        inclusive: bool = True,
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cropper = RandVoCoCrops(roi_size, grid_size, num_samples, crop_transform, inclusive)
        self.label_key = label_key
        if any(label_key in (key, f"{key}_base", f"{key}_origin") for key in self.keys):
            raise ValueError(f"label_key '{label_key}' is also written by keys {self.keys}; choose another")

    starts = property(lambda self: self.cropper.starts, doc="First voxel of each random crop of the last draw, (R, n).")
    label = property(lambda self: self.cropper.label, doc="Overlap fractions of the last draw, (R, K).")
    seed = property(lambda self: self.cropper.seed, doc="Of `crop_transform` in the last draw.")

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandVoCoCropsd:
        """Seed the one source of all draws."""
        self.cropper.set_random_state(seed, state)
        self.R = self.cropper.R
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw once for all keys."""
        self.cropper.randomize()

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and cut every key.

        Args:
            data: item with the images.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with the keys named above beside the untouched others.
        """
        d = dict(data)
        keys = list(self.key_iterator(d))
        if not keys:
            return d
        for key in keys:
            self.cropper._check_shape(d[key].shape, str(key))
        if randomize:
            self.randomize()
        starts, label = self.cropper._last_draw()
        for key in keys:
            d[key], d[f"{key}_base"] = self.cropper.apply(d[key], starts, self.cropper.seed)
            d[f"{key}_origin"] = starts.clone()
        d[self.label_key] = label.clone()
        return d


RandVoCoCropsD = RandVoCoCropsDict = RandVoCoCropsd


def _sizes(
    size: Sequence[int] | int, grid_size: Sequence[int], name: str = "roi_size"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes in voxels, one per axis, and the grid, or a ValueError."""
    grid = tuple(ensure_tuple(grid_size))
    sizes = tuple(ensure_tuple_rep(size, len(grid)) if isinstance(size, (int, np.integer)) else size)
    if len(sizes) != len(grid):
        raise ValueError(f"{name} {sizes} and grid_size {grid} need one entry per spatial axis each")
    if any(int(value) != value or value < 1 for value in sizes + grid):
        raise ValueError(f"{name} and grid_size must be whole numbers of at least 1, got {sizes} and {grid}")
    return tuple(int(s) for s in sizes), tuple(int(g) for g in grid)


def _plain_tensor(img: NdarrayOrTensor) -> torch.Tensor:
    """The image as a tensor without meta data, not copied where that can be avoided."""
    if isinstance(img, torch.Tensor):
        return img.as_tensor() if isinstance(img, MetaTensor) else img
    # torch warns about read-only memory even where it is only read
    return convert_to_tensor(img if img.flags.writeable else img.copy())
