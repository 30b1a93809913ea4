# SPDX-License-Identifier: Apache-2.0
"""One random 3D crop of each part of a volume: the partitions of slices, for networks with three axes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.utils import ensure_tuple_rep, fall_back_tuple

from ._one_draw import OneDraw, OneDrawd, with_meta_of
from ._patches import extract_patches
from .partition_slices import checked_axis, described, partition_bounds

__all__ = ["RandPartitionCrops", "RandPartitionCropsD", "RandPartitionCropsDict", "RandPartitionCropsd"]


class RandPartitionCrops(OneDraw):
    """Divide a volume along one axis into partitions and cut one random crop whose middle slice lies in each.

    Source: partitions and global losses of arXiv 2006.10511, which has them for 2D slices. The middle slice is the
    crop's first slice + its thickness // 2; a crop reaches into the neighbouring partitions, a thickness of 1 gives
    the slices of `RandPartitionSlices`. Every voxel can be drawn, no crop leaves the volume.
    The last draw stays in `starts` (S, 3) int64, the first voxel of each crop, and `middle` (S,), its middle slice.

    Args:
        roi_size: of the crops in voxels, an int or one per axis; 0 or less takes the whole axis of the volume.
        num_partitions: number S of partitions.
        axis: spatial axis that is divided, negative from the end.

    Shapes: (C, *spatial) with three spatial axes -> (S, C, *roi), of the image's dtype, in memory of its own. With meta
    tracking it carries the affine of the image; crop k lies at `affine @ translate(starts[k])`.

    Raises:
        ValueError: no partition, an unknown axis, another number of spatial axes, fewer slices than partitions, or
            crops that are larger than the volume or too thick to have their middle in its first or last partition.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("starts",)

    def __init__(self, roi_size: Sequence[int] | int, num_partitions: int = 4, axis: int = -1) -> None:
        self.roi_size = ensure_tuple_rep(roi_size, 3)
        self.num_partitions, self.axis = num_partitions, checked_axis(num_partitions, axis)
        self.starts: torch.Tensor | None = None
        self.middle: torch.Tensor | None = None

    def check(self, img: NdarrayOrTensor, name: str = "img") -> None:
        """Raise a ValueError when there are no such crops in the image."""
        if img.ndim != 4:
            raise ValueError(f"{described(img, name)} must be (C, *spatial) with three spatial axes")
        size, roi = tuple(img.shape[1:]), self._roi(img.shape[1:])
        if any(r > n for r, n in zip(roi, size)):
            raise ValueError(f"{described(img, name)} is smaller than crops of {roi}: lower roi_size or pad")
        if not self._has_middles(size):
            raise ValueError(
                f"{described(img, name)} has {size[self.axis]} slices along axis {self.axis}: a crop of "
                f"{roi[self.axis]} cannot have its middle in each of {self.num_partitions} partitions without leaving "
                "the volume: lower roi_size or num_partitions, or pad"
            )

    def randomize(self, image_size: Sequence[int]) -> None:
        """Draw the first voxels of all crops in one call, crop by crop and axis by axis."""
        low, high = self._ranges(image_size)
        self.starts = torch.as_tensor(self.R.randint(low.numpy(), high.numpy()), dtype=torch.int64)
        self.middle = self.starts[:, self.axis] + self._roi(image_size)[self.axis] // 2

    def apply(self, img: NdarrayOrTensor, starts: torch.Tensor) -> torch.Tensor:
        """Copy the crops that begin at `starts` (S, 3), without any draw: (S, C, *roi)."""
        return with_meta_of(img, extract_patches(img, starts, self._roi(img.shape[1:])))

    def origins(self, starts: torch.Tensor) -> torch.Tensor:
        """First voxel of every crop, (S, 3)."""
        return starts

    def _roi(self, image_size: Sequence[int]) -> tuple[int, ...]:
        return fall_back_tuple(self.roi_size, tuple(image_size))

    def _has_middles(self, size: Sequence[int]) -> bool:
        """Whether every partition has a start of its own."""
        if size[self.axis] < self.num_partitions:
            return False
        low, high = self._ranges(size)
        return bool((low < high).all())

    def _ranges(self, image_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """First and end of the starts of each crop, (S, 3)."""
        roi = self._roi(image_size)
        high = torch.tensor([n - r + 1 for n, r in zip(image_size, roi)]).repeat(self.num_partitions, 1)
        low = torch.zeros_like(high)
        half = roi[self.axis] // 2
        bounds = torch.tensor(partition_bounds(image_size[self.axis], self.num_partitions))
        low[:, self.axis] = (bounds[:-1] - half).clamp_min(0)
        high[:, self.axis] = torch.minimum(high[:, self.axis], bounds[1:] - half)
        return low, high


class RandPartitionCropsd(OneDrawd):
    """Dictionary form of `RandPartitionCrops`; one draw for all keys, so that image and label give the same crops.

    Source: arXiv 2006.10511. An item holds afterwards, for every key, `<key>` crops (S, C, *roi) and `<key>_origin`
    the first voxel of each in the volume (S, 3), and once `partition` (S,), the numbers 0 to S - 1, and `slice_index`
    (S,), the number of each crop's middle slice, plain int64. The keys are those of `RandPartitionSlicesd`, so that
    what follows is the same.

    Args:
        keys: volumes of one spatial shape, (C, *spatial).
        roi_size: see `RandPartitionCrops`.
        num_partitions: see `RandPartitionCrops`.
        axis: see `RandPartitionCrops`.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandPartitionCrops`; or when keys differ in spatial shape, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int] | int,
        num_partitions: int = 4,
        axis: int = -1,
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandPartitionCrops(roi_size, num_partitions, axis)
        super().__init__(keys, transform, None, True, allow_missing_keys)
        if {"partition", "slice_index"} & {str(key) for key in self.keys}:
            raise ValueError(f"keys {self.keys} may not be partition or slice_index, which are written")

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and cut the crops of every key.

        Args:
            data: item with the volumes.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with what was written beside the untouched others.
        """
        d = super().__call__(data, randomize)
        if any(key in d for key in self.keys):
            d["partition"] = torch.arange(self.transform.num_partitions)
            d["slice_index"] = self.transform.middle.clone()
        return d


RandPartitionCropsD = RandPartitionCropsDict = RandPartitionCropsd
