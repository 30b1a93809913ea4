# SPDX-License-Identifier: Apache-2.0
"""One random slice of each part of a stack of slices (contrast of global and local features)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta

from ._one_draw import OneDraw, OneDrawd
from .view_geometry import spacing_of
from .voco_crops import _plain_tensor

__all__ = [
    "RandPartitionSlices",
    "RandPartitionSlicesD",
    "RandPartitionSlicesDict",
    "RandPartitionSlicesd",
    "partition_bounds",
]

_LABELS = ("partition", "slice_index")


def partition_bounds(num_slices: int, num_partitions: int) -> list[int]:
    """First slice of each partition, and the end of the last: b_k = k N // S.

    Source: arXiv 2006.10511. The released code (`krishnabits001/domain_specific_cl`) has k (N // S), so that it never
    draws the last N mod S slices.

    Args:
        num_slices: N.
        num_partitions: S.

    Returns:
        S + 1 numbers from 0 to N; the sizes of partitions differ by at most 1.

    Raises:
        ValueError: fewer slices than partitions, or no partition.
    """
    if not 1 <= num_partitions <= num_slices:
        raise ValueError(f"{num_slices} slices cannot be divided into {num_partitions} partitions")
    return [k * num_slices // num_partitions for k in range(num_partitions + 1)]


def checked_axis(num_partitions: int, axis: int) -> int:
    """The axis counted from the first, or a ValueError when it or the number of partitions is out of range."""
    if num_partitions < 1:
        raise ValueError(f"num_partitions must be at least 1, got {num_partitions}")
    if not -3 <= axis < 3:
        raise ValueError(f"axis must be one of three spatial axes, -3 to 2, got {axis}")
    return axis % 3


def described(img: NdarrayOrTensor, name: str) -> str:
    """Key, shape and, where it is known, file of an image that is refused."""
    file = img.meta.get("filename_or_obj") if isinstance(img, MetaTensor) else None
    return f"'{name}' {tuple(img.shape)}" + (f" of {file}" if isinstance(file, str) else "")


class RandPartitionSlices(OneDraw):
    """Divide a volume along one axis into partitions and take one random slice of each.

    Source: arXiv 2006.10511: slices of one partition show similar anatomy across subjects. Differs from the released
    code in :func:`partition_bounds`. `num_partitions=1` is the paper's random strategy.
    The last draw stays in `index` (S,) int64, the slice of each partition.

    Args:
        num_partitions: number S of partitions.
        axis: spatial axis across which the slices lie, negative from the end.

    Shapes: (C, *spatial) with three spatial axes -> (S, C, *plane), of the image's dtype, in memory of its own. With
    meta tracking it carries the affine diag(spacing of the plane's axes, 1).

    Raises:
        ValueError: no partition, an unknown axis, another number of spatial axes, or fewer slices than partitions.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("index",)

    def __init__(self, num_partitions: int = 4, axis: int = -1) -> None:
        self.num_partitions, self.axis = num_partitions, checked_axis(num_partitions, axis)
        self.index: torch.Tensor | None = None

    def check(self, img: NdarrayOrTensor, name: str = "img") -> None:
        """Raise a ValueError when the image cannot be divided."""
        if img.ndim != 4:
            raise ValueError(f"{described(img, name)} must be (C, *spatial) with three spatial axes")
        if img.shape[1 + self.axis] < self.num_partitions:
            raise ValueError(
                f"{described(img, name)} has {img.shape[1 + self.axis]} slices along axis {self.axis}, fewer than "
                f"{self.num_partitions} partitions: lower num_partitions, choose another axis, or leave it out"
            )

    def randomize(self, num_slices: int) -> None:
        """Draw one slice of each partition, in order."""
        bounds = partition_bounds(num_slices, self.num_partitions)
        drawn = [self.R.randint(bounds[k], bounds[k + 1]) for k in range(self.num_partitions)]
        self.index = torch.tensor(drawn, dtype=torch.int64)

    def apply(self, img: NdarrayOrTensor, index: torch.Tensor) -> torch.Tensor:
        """Copy the slices of the numbers `index` (S,), without any draw: (S, C, *plane)."""
        image = _plain_tensor(img).movedim(1 + self.axis, 0)
        places = torch.as_tensor(index).tolist()
        if not all(0 <= place < len(image) for place in places):
            raise ValueError(f"slices {places} are not all among the {len(image)} of {tuple(img.shape)}")
        return self._with_plane_meta(img, torch.stack([image[place] for place in places]))

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> torch.Tensor:
        """Draw, unless `randomize` is False, which repeats the last draw, and take the slices.

        Args:
            img: volume, (C, *spatial).
            randomize: whether to draw anew.
        """
        self.check(img)
        if randomize:
            self.randomize(img.shape[1 + self.axis])
        return self.apply(img, *self.last_draw())

    def _with_plane_meta(self, img: NdarrayOrTensor, slices: torch.Tensor) -> torch.Tensor:
        if not get_track_meta():
            return slices
        meta: dict[Any, Any] = {}
        spacing = torch.ones(2, dtype=torch.float64)
        if isinstance(img, MetaTensor):
            meta = deepcopy({key: value for key, value in img.meta.items() if key != "affine"})
            kept = [axis for axis in range(3) if axis != self.axis]
            spacing = spacing_of(img.affine.double())[kept]
        return MetaTensor(slices, meta=meta, affine=torch.diag(torch.cat([spacing, spacing.new_ones(1)])))


class RandPartitionSlicesd(OneDrawd):
    """Dictionary form of `RandPartitionSlices`; one draw for all keys, so that image and label give the same slices.

    Source: arXiv 2006.10511. An item holds afterwards, for every key, `<key>` slices (S, C, *plane), and once
    `partition` (S,), the numbers 0 to S - 1, and `slice_index` (S,), where each slice was, plain int64. MONAI's
    ``SplitDimd(keys, dim=0, keepdim=False, list_output=True)`` then makes one item of each slice.

    Args:
        keys: volumes with equally many slices, (C, *spatial).
        num_partitions: see `RandPartitionSlices`.
        axis: see `RandPartitionSlices`.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandPartitionSlices`; or when keys have different numbers of slices, or one key would be written
            twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self, keys: KeysCollection, num_partitions: int = 4, axis: int = -1, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, RandPartitionSlices(num_partitions, axis), None, False, allow_missing_keys)
        if set(_LABELS) & set(self.keys):
            raise ValueError(f"keys {self.keys} may not be {' or '.join(_LABELS)}, which are written")

    def randomize(self, num_slices: int) -> None:  # type: ignore[override]
        """Draw once for all keys."""
        self.transform.randomize(num_slices)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and take the slices of every key.

        Args:
            data: item with the volumes.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with what was written beside the untouched others.
        """
        d = dict(data)
        keys = list(self.key_iterator(d))
        if not keys:
            return d
        for key in keys:
            self.transform.check(d[key], str(key))
        numbers = {key: d[key].shape[1 + self.transform.axis] for key in keys}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"one draw serves all keys, which need equally many slices, got {numbers}")
        if randomize:
            self.randomize(numbers[keys[0]])
        (index,) = self.transform.last_draw()
        for key in keys:
            d[key] = self.transform.apply(d[key], index)
        d["partition"], d["slice_index"] = torch.arange(self.transform.num_partitions), index.clone()
        return d


RandPartitionSlicesD = RandPartitionSlicesDict = RandPartitionSlicesd
