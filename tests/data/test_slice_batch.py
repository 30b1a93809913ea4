# SPDX-License-Identifier: Apache-2.0
"""From volumes to a batch of slices: what comes out of the pipeline, and what the engine hands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader, MetaTensor, list_data_collate
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSpatialCropd,
    Resized,
    ScaleIntensityRanged,
    SplitDimd,
)

from monai_ssl.data import KeyedDataset, KeyedSampler, PrepareSliceBatch
from monai_ssl.transforms import RandPartitionSlicesd, RandViewsd

PLANE = (48, 64)


def views(plane: tuple[int, int] = PLANE) -> Compose:
    """The views of stage 1."""
    return Compose(
        [
            RandSpatialCropd("image", [round(0.52 * n) for n in plane], random_size=False),
            Resized("image", plane, mode="bilinear"),
            RandShiftIntensityd("image", 0.3, prob=1.0),
            RandScaleIntensityFixedMeand("image", factors=0.3, prob=1.0),
            ScaleIntensityRanged("image", 0, 1.5, 0, 1.5, clip=True),
        ]
    )


def pipeline(partitions: int, num_views: int = 2, inner: Any = None) -> Compose:
    return Compose(
        [
            RandPartitionSlicesd("image", partitions),
            SplitDimd(["image", "partition", "slice_index"], dim=0, keepdim=False, list_output=True),
            RandViewsd("image", num_views, inner or views()),
            EnsureTyped(["image"], track_meta=False),
        ]
    )


def volumes(number: int, channels: int = 1, slices: int = 9) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": MetaTensor(torch.rand(channels, *PLANE, slices + i, generator=generator)), "volume": 7 * i}
        for i in range(number)
    ]


def loader(items: list[dict[str, Any]], transform: Compose, batch_size: int, num_workers: int = 0) -> DataLoader:
    dataset = CacheDataset(items, transform, progress=False)
    return DataLoader(
        KeyedDataset(dataset, seed=3),
        sampler=KeyedSampler(dataset, seed=3),
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=True,
    )


@pytest.mark.parametrize("partitions", [2, 3, 4, 6])
@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_every_partition_of_every_volume_once(partitions: int, batch_size: int) -> None:
    for batch in loader(volumes(6), pipeline(partitions), batch_size):
        count = batch_size * partitions
        assert batch["image"].shape == (count, 2, 1, *PLANE)
        assert all(item.std() > 0 for view in batch["image"] for item in view)  # none is blank
        pairs = set(zip(batch["volume"].tolist(), batch["partition"].tolist()))
        assert len(pairs) == count
        assert len(set(batch["volume"].tolist())) == batch_size
        assert batch["partition"].tolist() == list(range(partitions)) * batch_size  # volume-major
        _, ids = PrepareSliceBatch()(batch)
        assert len(ids["source"].unique()) == count


@pytest.mark.parametrize("channels", [1, 3])
def test_workers_change_nothing(channels: int) -> None:
    items = volumes(4, channels)
    runs = [list(loader(items, pipeline(4), 2, num_workers)) for num_workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 2
    for one, other in zip(*runs):
        assert one["image"].shape == (8, 2, channels, *PLANE)
        assert one["image"].dtype == torch.float32
        assert type(one["image"]) is torch.Tensor
        for key in ("image", "partition", "slice_index", "volume"):
            assert torch.equal(one[key], other[key])


def test_equal_slices_get_views_of_their_own() -> None:
    """Intensity is drawn anew for each slice and each view, not once per batch."""
    flat = [{"image": torch.full((1, *PLANE, 8), 0.5), "volume": i} for i in range(2)]
    ramp = torch.linspace(0.2, 0.8, PLANE[1]).expand(1, *PLANE).unsqueeze(-1).expand(1, *PLANE, 8)
    for items in (flat, [{**item, "image": ramp.clone()} for item in flat]):
        (batch,) = loader(items, pipeline(4), 2)
        means = batch["image"].flatten(2).mean(2).flatten()
        assert len(means.unique()) == 16


def test_slices_come_from_where_they_say() -> None:
    index = torch.arange(11.0).expand(1, *PLANE, 11)
    none = Compose([RandShiftIntensityd("image", 0.0, prob=0.0)])
    items = [{"image": MetaTensor(index.clone()), "volume": i} for i in range(2)]
    (batch,) = loader(items, pipeline(4, inner=none), 2)
    assert torch.equal(batch["image"][:, 0, 0, 0, 0], batch["slice_index"].float())
    assert set(batch) >= {"image", "partition", "slice_index", "volume"}


# ---- PrepareSliceBatch


def batch(num_views: int | None = 2) -> dict[str, Any]:
    shape = (3, 1, 4, 5) if num_views is None else (3, num_views, 1, 4, 5)
    items = [
        {
            "image": MetaTensor(torch.arange(float(np.prod(shape))).reshape(shape)[i]),
            "partition": torch.tensor(i % 2),
            "slice_index": torch.tensor(4 + i),
            "volume": 10 * i,
        }
        for i in range(3)
    ]
    return list_data_collate(items)


def test_views_lie_side_by_side() -> None:
    given = batch()
    image, ids = PrepareSliceBatch()(given, "cpu")
    assert image.shape == (6, 1, 4, 5)
    assert torch.equal(image[2], given["image"].as_tensor()[1, 0])
    assert torch.equal(image[3], given["image"].as_tensor()[1, 1])
    assert {name: x.tolist() for name, x in ids.items()} == {
        "source": [4, 4, 10 * 2**20 + 5, 10 * 2**20 + 5, 20 * 2**20 + 6, 20 * 2**20 + 6],
        "partition": [0, 0, 1, 1, 0, 0],
        "volume": [0, 0, 10, 10, 20, 20],
        "view": [0, 1, 0, 1, 0, 1],
    }
    assert all(type(x) is torch.Tensor and x.dtype == torch.int64 for x in ids.values())
    assert type(image) is torch.Tensor


def test_one_view() -> None:
    image, ids = PrepareSliceBatch()(batch(None))
    assert image.shape == (3, 1, 4, 5)
    assert ids["view"].tolist() == [0, 0, 0]
    assert ids["source"].tolist() == [4, 10 * 2**20 + 5, 20 * 2**20 + 6]


def test_crops_with_three_axes() -> None:
    given = {**batch(), "image": torch.arange(3 * 2 * 60.0).view(3, 2, 1, 3, 4, 5)}
    prepare = PrepareSliceBatch(spatial_dims=3)
    image, ids = prepare(given)
    assert image.shape == (6, 1, 3, 4, 5)
    assert torch.equal(image[3], given["image"][1, 1])
    assert ids["view"].tolist() == [0, 1, 0, 1, 0, 1]
    image, ids = prepare({**batch(), "image": given["image"][:, 0]})
    assert image.shape == (3, 1, 3, 4, 5)
    assert ids["view"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"\(3, 2, 1, 3, 4, 5\) must be .* with 2 axes of the plane \(spatial_dims\)"):
        PrepareSliceBatch()(given)
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 5\) must be .* with 3 axes of the plane \(spatial_dims\)"):
        prepare(batch(None))
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        PrepareSliceBatch(spatial_dims=1)


def test_arguments_of_to_are_for_the_image() -> None:
    image, ids = PrepareSliceBatch()(batch(), "cpu", dtype=torch.float64)
    assert image.dtype == torch.float64
    assert ids["source"].dtype == torch.int64


def test_found_by_short_name() -> None:
    config = {"imports": ["$import monai_ssl"], "it": {"_target_": "PrepareSliceBatch"}}
    assert type(ConfigParser(config).get_parsed_content("it")) is PrepareSliceBatch


@pytest.mark.parametrize("key", ["image", "partition", "slice_index", "volume"])
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(KeyError, match=f"'{key}' is not in the batch, which has"):
        PrepareSliceBatch()({name: value for name, value in batch().items() if name != key})


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"'partition' \(2,\) of torch.int64 must be \(3,\).*\(3, 2, 1, 4, 5\)"):
        PrepareSliceBatch()({**batch(), "partition": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"'volume' \(3,\) of torch.float32 must be \(3,\) integers"):
        PrepareSliceBatch()({**batch(), "volume": torch.rand(3)})
    with pytest.raises(ValueError, match=r"'image' \(3, 4, 5\) must be"):
        PrepareSliceBatch()({**batch(), "image": torch.rand(3, 4, 5)})
    with pytest.raises(TypeError, match=r"batch\['volume'\] must be a tensor, got list"):
        PrepareSliceBatch()({**batch(), "volume": ["a", "b", "c"]})
