# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SplitDimd

from monai_ssl.transforms import RandPartitionCrops, RandPartitionCropsd, RandPartitionSlices, partition_bounds

from .index_images import AFFINE, index_image

SIZE = (6, 5, 13)


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_start_is_drawn_and_every_middle_lies_in_its_partition(axis: int, thickness: int) -> None:
    """Hand-worked: the middle of [a, a + t) is a + t // 2, and [0, 13) in two partitions is [0, 6) and [6, 13)."""
    size, roi = [4, 4, 4], [3, 3, 3]
    size[axis], roi[axis] = 13, thickness
    transform = RandPartitionCrops(roi, 2, axis).set_random_state(seed=0)
    seen: list[set[int]] = [set(), set()]
    planes = set()
    for _ in range(400):
        transform.randomize(size)
        for partition, start in enumerate(transform.starts.tolist()):
            seen[partition].add(start.pop(axis))
            planes.add(tuple(start))
        assert torch.equal(transform.middle, transform.starts[:, axis] + thickness // 2)
    assert planes == set(product((0, 1), (0, 1)))
    middles = [{start + thickness // 2 for start in starts} for starts in seen]
    assert middles[0] == set(range(thickness // 2, 6))
    assert middles[1] == set(range(6, 13 - thickness + thickness // 2 + 1))
    assert seen[0] | seen[1] == set(range(13 - thickness + 1))  # so every voxel is in some crop


def test_thickness_of_one_draws_the_slices() -> None:
    """The same partitions as those of the slices, the whole plane."""
    transform = RandPartitionCrops((0, -1, 1), 4).set_random_state(seed=0)
    seen: list[set[int]] = [set() for _ in range(4)]
    for _ in range(300):
        transform.randomize(SIZE)
        assert not transform.starts[:, :2].any()
        for partition, index in enumerate(transform.middle.tolist()):
            seen[partition].add(index)
    assert [sorted(s) for s in seen] == [list(range(a, b)) for a, b in pairwise(partition_bounds(13, 4))]
    volume = index_image(SIZE)
    crops = transform(volume).as_tensor()
    slices = RandPartitionSlices(4).apply(volume, transform.middle).as_tensor()
    assert torch.equal(crops.squeeze(-1), slices)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_crops_lie_where_they_say(axis: int, channels: int) -> None:
    volume = index_image((10, 11, 12), channels)
    transform = RandPartitionCrops((4, 3, 5), 3, axis).set_random_state(seed=2)
    crops = transform(MetaTensor(volume, affine=AFFINE))
    assert crops.shape == (3, channels, 4, 3, 5)
    assert torch.equal(crops.affine, AFFINE)
    for crop, (i, j, k) in zip(crops.as_tensor(), transform.starts.tolist()):
        assert torch.equal(crop, volume[:, i : i + 4, j : j + 3, k : k + 5])


def test_image_and_label_give_the_same_crops() -> None:
    image, label = index_image(SIZE), torch.arange(13).expand(1, *SIZE)
    transform = RandPartitionCropsd(["image", "label"], (4, 5, 3), 3).set_random_state(seed=4)
    for _ in range(5):
        out = transform({"image": image, "label": label, "name": "a"})
        assert out["partition"].tolist() == [0, 1, 2]
        assert (out["partition"].dtype, out["slice_index"].dtype) == (torch.int64, torch.int64)
        assert torch.equal(out["label"][:, 0, 0, 0, 1].as_tensor(), out["slice_index"])  # the middle of three
        assert torch.equal(out["image_origin"], out["label_origin"])
        assert torch.equal(out["image_origin"][:, 2] + 1, out["slice_index"])
        again = transform({"image": image, "label": label, "name": "a"}, randomize=False)
        assert all(torch.equal(again[key], out[key]) for key in out if key != "name")
    split = SplitDimd(["image", "image_origin", "partition", "slice_index"], dim=0, keepdim=False, list_output=True)
    items = Compose([RandPartitionCropsd("image", (4, 5, 3), 3), split])({"image": image})
    assert [tuple(one["image"].shape) for one in items] == [(1, 4, 5, 3)] * 3
    assert [int(one["partition"]) for one in items] == [0, 1, 2]


def test_without_any_key_nothing_is_written() -> None:
    assert RandPartitionCropsd("image", 2, allow_missing_keys=True)({"other": 1}) == {"other": 1}


def volume(*size: int) -> torch.Tensor:
    return torch.zeros(1, *size)


NAMED = MetaTensor(volume(5, 6, 9), meta={"filename_or_obj": "/data/a.nii.gz"})
ERRORS: dict[str, tuple[Any, str]] = {
    "partitions": (lambda: RandPartitionCrops(2, 0), "num_partitions must be at least 1, got 0"),
    "axis": (lambda: RandPartitionCrops(2, axis=3), "axis must be one of three spatial axes, -3 to 2, got 3"),
    "2D": (lambda: RandPartitionCrops(2)(torch.zeros(1, 5, 6)), r"'img' \(1, 5, 6\) must be \(C, \*spatial\) with thr"),
    "large": (
        lambda: RandPartitionCrops((5, 7, 2))(volume(5, 6, 9)),
        r"'img' \(1, 5, 6, 9\) is smaller than crops of \(5, 7, 2\): lower roi_size or pad",
    ),
    "thick": (
        lambda: RandPartitionCropsd("scan", (2, 2, 4))({"scan": NAMED}),
        r"'scan' \(1, 5, 6, 9\) of /data/a.nii.gz has 9 slices along axis 2: a crop of 4 cannot have its middle in "
        "each of 4 partitions without leaving the volume: lower roi_size or num_partitions, or pad",
    ),
    "few slices": (lambda: RandPartitionCrops((2, 2, 1))(volume(5, 6, 3)), "has 3 slices along axis 2: a crop of 1"),
    "key written": (lambda: RandPartitionCropsd(["image", "slice_index"], 2), "may not be partition or slice_index"),
    "unequal": (
        lambda: RandPartitionCropsd(["a", "b"], 2)({"a": volume(9, 9, 9), "b": volume(9, 9, 8)}),
        "one draw serves all keys",
    ),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("num_slices, partitions, most", [(9, 4, 3), (12, 4, 5), (13, 4, 5), (13, 2, 11), (5, 1, 5)])
def test_thickest_crop(num_slices: int, partitions: int, most: int) -> None:
    """When it begins at 0 its middle, slice t // 2, is still one of the N // S of the first partition."""
    bounds = partition_bounds(num_slices, partitions)

    def possible(thickness: int) -> bool:
        middles = np.arange(num_slices - thickness + 1) + thickness // 2
        return all(((middles >= a) & (middles < b)).any() for a, b in pairwise(bounds))

    assert max(t for t in range(1, num_slices + 1) if possible(t)) == most
    for thickness in range(1, num_slices + 1):
        transform = RandPartitionCrops((0, 0, thickness), partitions)
        if possible(thickness):
            assert transform(volume(2, 3, num_slices)).shape == (partitions, 1, 2, 3, thickness)
        else:
            with pytest.raises(ValueError, match="cannot have its middle in each"):
                transform(volume(2, 3, num_slices))
