# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Rand2DElasticd, RandAffined, RandScaleIntensityFixedMeand, SplitDimd

from monai_ssl.transforms import RandPartitionSlices, RandPartitionSlicesd, partition_bounds

from .index_images import AFFINE, index_image

BOUNDS = {
    4: [0, 1, 2, 3, 4],
    7: [0, 1, 3, 5, 7],
    9: [0, 2, 4, 6, 9],
    10: [0, 2, 5, 7, 10],
    11: [0, 2, 5, 8, 11],
    15: [0, 3, 7, 11, 15],
    22: [0, 5, 11, 16, 22],
    43: [0, 10, 21, 32, 43],
}


@pytest.mark.parametrize("num_slices", BOUNDS)
def test_table_of_bounds(num_slices: int) -> None:
    assert partition_bounds(num_slices, 4) == BOUNDS[num_slices]


@pytest.mark.parametrize("partitions", [1, 2, 3, 5, 6])
def test_partitions_are_of_about_one_size(partitions: int) -> None:
    for num_slices in range(partitions, 40):
        bounds = partition_bounds(num_slices, partitions)
        sizes = [end - start for start, end in pairwise(bounds)]
        assert (bounds[0], bounds[-1], len(sizes)) == (0, num_slices, partitions)
        assert 1 <= max(sizes) <= min(sizes) + 1


@pytest.mark.parametrize("num_slices", [4, 7, 11, 43])
def test_every_slice_is_drawn_in_its_own_partition(num_slices: int) -> None:
    """The released code never draws the last N mod S slices."""
    transform = RandPartitionSlices(4).set_random_state(seed=0)
    seen: list[set[int]] = [set() for _ in range(4)]
    for _ in range(1000):  # 4000 draws
        transform.randomize(num_slices)
        for partition, index in enumerate(transform.index.tolist()):
            seen[partition].add(index)
    assert [sorted(s) for s in seen] == [list(range(a, b)) for a, b in pairwise(BOUNDS[num_slices])]


def test_draws_are_those_of_the_definition() -> None:
    transform, state = RandPartitionSlices(3, 0).set_random_state(seed=9), np.random.RandomState(9)
    for num_slices in (5, 11, 8):
        transform(torch.zeros(1, num_slices, 2, 3))
        bounds = partition_bounds(num_slices, 3)
        assert transform.index.tolist() == [state.randint(a, b) for a, b in pairwise(bounds)]
        assert transform.index.dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("axis, plane", [(0, (6, 7)), (1, (5, 7)), (2, (5, 6)), (-1, (5, 6)), (-3, (6, 7))])
def test_slices(axis: int, plane: tuple[int, int], channels: int) -> None:
    volume = index_image((5, 6, 7), channels)
    transform = RandPartitionSlices(4, axis).set_random_state(seed=1)
    slices = transform(volume)
    assert slices.shape == (4, channels, *plane)
    for number, index in enumerate(transform.index.tolist()):
        assert torch.equal(slices[number].as_tensor(), volume.select(1 + axis % 3, index))
    assert torch.equal(transform.apply(volume, torch.tensor([0, 3, 1])).as_tensor()[1], volume.select(1 + axis % 3, 3))


@pytest.mark.parametrize("axis, spacing", [(0, [2.0, 1.5]), (1, [3.0, 1.5]), (2, [3.0, 2.0])])
def test_affine_of_the_plane(axis: int, spacing: list[float]) -> None:
    """AFFINE has steps of 3, 2 and 1.5 mm."""
    volume = MetaTensor(index_image((5, 6, 7)), affine=AFFINE, meta={"filename_or_obj": "a.nii"})
    slices = RandPartitionSlices(2, axis)(volume)
    assert torch.equal(slices.affine, torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    assert slices.meta["filename_or_obj"] == "a.nii"
    item = {"image": volume, "name": "a"}
    split = SplitDimd(["image", "partition", "slice_index"], dim=0, keepdim=False, list_output=True)
    items = Compose([RandPartitionSlicesd("image", 2, axis), split])(item)
    assert [int(one["partition"]) for one in items] == [0, 1]
    for one in items:
        assert torch.equal(one["image"].affine, slices.affine)
        assert torch.equal(one["image"].as_tensor(), volume.as_tensor().select(1 + axis, int(one["slice_index"])))
        assert one["name"] == "a"


def test_image_and_label_give_the_same_slices() -> None:
    """Also where their planes differ, as with a label on a finer grid."""
    image, label = index_image((5, 6, 7)), torch.arange(7).expand(1, 10, 12, 7)
    transform = RandPartitionSlicesd(["image", "label"], 3).set_random_state(seed=4)
    for _ in range(5):
        out = transform({"image": image, "label": label})
        assert out["partition"].tolist() == [0, 1, 2]
        assert (out["partition"].dtype, out["slice_index"].dtype) == (torch.int64, torch.int64)
        assert torch.equal(out["label"][:, 0, 0, 0].as_tensor(), out["slice_index"])
        assert torch.equal(out["image"].as_tensor()[:, 0], image[0][..., out["slice_index"]].movedim(-1, 0))
        again = transform({"image": image, "label": label}, randomize=False)
        assert all(torch.equal(again[key], out[key]) for key in out)


def test_fine_tuning_changes_images_and_no_label_values() -> None:
    """With labels: intensity reaches the image, classes stay what they are."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 24, 20, 9, generator=generator)
    label = torch.randint(4, (1, 24, 20, 9), generator=generator)
    keys = ["image", "label"]
    modes: dict[str, Any] = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
    transform = Compose(
        [
            RandPartitionSlicesd(keys, 3),
            SplitDimd([*keys, "partition", "slice_index"], dim=0, keepdim=False, list_output=True),
            RandAffined(keys, prob=1.0, rotate_range=0.26, scale_range=0.05, **modes),
            Rand2DElasticd(keys, (8, 8), (0.5, 1.0), prob=1.0, **modes),
            RandScaleIntensityFixedMeand("image", factors=0.3, prob=1.0),
        ]
    ).set_random_state(seed=0)
    for out in transform({"image": image, "label": label}):
        assert set(out["label"].unique().tolist()) == {0, 1, 2, 3}
        assert out["image"].shape == out["label"].shape == (1, 24, 20)
        plain = image[..., int(out["slice_index"])]
        assert (out["image"] - plain).abs().mean() > 0.05


ERRORS: dict[str, tuple[Any, str]] = {
    "partitions": (lambda: RandPartitionSlices(0), "num_partitions must be at least 1, got 0"),
    "axis": (lambda: RandPartitionSlices(axis=3), "axis must be one of three spatial axes, -3 to 2, got 3"),
    "2D": (lambda: RandPartitionSlices()(torch.zeros(1, 5, 6)), r"'img' \(1, 5, 6\) must be \(C, \*spatial\) with thr"),
    "few slices": (
        lambda: RandPartitionSlicesd("scan", 4)({"scan": torch.zeros(1, 5, 6, 3)}),
        r"'scan' \(1, 5, 6, 3\) has 3 slices along axis 2, fewer than 4 partitions",
    ),
    "unequal": (
        lambda: RandPartitionSlicesd(["a", "b"], 2)({"a": torch.zeros(1, 5, 6, 3), "b": torch.zeros(1, 5, 6, 4)}),
        r"equally many slices, got \{'a': 3, 'b': 4\}",
    ),
    "key written": (lambda: RandPartitionSlicesd(["image", "partition"]), "may not be partition or slice_index"),
    "index": (
        lambda: RandPartitionSlices(2).apply(torch.zeros(1, 5, 6, 3), torch.tensor([0, 3])),
        r"slices \[0, 3\] are not all among the 3 of \(1, 5, 6, 3\)",
    ),
    "bounds": (lambda: partition_bounds(3, 4), "3 slices cannot be divided into 4 partitions"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_refused_images_leave_the_random_state() -> None:
    transform = RandPartitionSlicesd(["a", "b"], 2).set_random_state(seed=0)
    before = transform.R.get_state()[2]
    with pytest.raises(ValueError, match="equally many"):
        transform({"a": torch.zeros(1, 5, 6, 3), "b": torch.zeros(1, 5, 6, 4)})
    assert transform.R.get_state()[2] == before
    with pytest.raises(RuntimeError, match="nothing has been drawn yet"):
        transform({"a": torch.zeros(1, 5, 6, 4), "b": torch.zeros(1, 5, 6, 4)}, randomize=False)
