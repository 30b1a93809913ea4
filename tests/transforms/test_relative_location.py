# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import log, prod
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_ssl.transforms import RandRelativeLocation, RandRelativeLocationd, location_offsets, patch_grid

from .index_images import AFFINE, crops, drawn_starts, index_image

# image, grid, jitter, gap, number of queries, channels
GEOMETRIES: list[tuple[Any, ...]] = [
    ((14, 17, 19), 3, 1, 0, None, 1),
    ((14, 17, 19), (1, 3, 5), 0.4, 0.2, 4, 3),
    ((14, 17), 3, 1, 1, None, 3),
    ((14, 17), (5, 3), 0, 1, 1, 1),
]


def grid_of(grid: Any, ndim: int) -> tuple[int, ...]:
    return grid if isinstance(grid, tuple) else (grid,) * ndim


# ---- classes


def test_location_offsets() -> None:
    cube = location_offsets(3)
    assert (cube.dtype, tuple(cube.shape)) == (torch.int64, (26, 3))
    named = {0: [-1, -1, -1], 12: [0, 0, -1], 13: [0, 0, 1], 25: [1, 1, 1]}
    assert {c: cube[c].tolist() for c in named} == named
    assert location_offsets((3, 3)).tolist() == [
        [-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1]
    ]  # fmt: skip
    assert location_offsets((1, 5)).tolist() == [[0, -2], [0, -1], [0, 1], [0, 2]]
    assert log(len(cube)) == pytest.approx(3.258097, abs=1e-6)


@pytest.mark.parametrize("image, grid, jitter, gap, queries, channels", GEOMETRIES)
def test_label_is_the_place_of_the_query(
    image: Any, grid: Any, jitter: Any, gap: Any, queries: Any, channels: int
) -> None:
    cells = grid_of(grid, len(image))
    transform = RandRelativeLocationd("image", grid, jitter, gap, queries).set_random_state(seed=0)
    offsets, pitch = location_offsets(cells), torch.tensor([s // n for s, n in zip(image, cells)])
    for _ in range(3):
        out = transform({"image": index_image(image, channels)})
        cell = out["image_origin"] // pitch  # jitter stays inside the cell
        assert cell[0].tolist() == [n // 2 for n in cells]
        assert torch.equal(cell[1:] - cell[0], offsets[out["label"]])


# ---- draws


@pytest.mark.parametrize("image, grid, jitter, gap, queries, _", GEOMETRIES)
def test_draws(image: Any, grid: Any, jitter: Any, gap: Any, queries: Any, _: int) -> None:
    transform = RandRelativeLocation(grid, jitter, gap, queries).set_random_state(seed=3)
    state = np.random.RandomState(3)
    lowest, _, ranges = patch_grid(image, grid, None, jitter, gap)
    for _ in range(2):
        transform.randomize(image)
        assert transform.starts.tolist() == drawn_starts(state, lowest, ranges)
        assert transform.label.tolist() == state.permutation(len(lowest) - 1)[:queries].tolist()
        assert (transform.starts.dtype, transform.label.dtype) == (torch.int64, torch.int64)
    assert transform.R.randint(1000) == state.randint(1000)


def test_all_neighbours_are_queries_by_default() -> None:
    out = RandRelativeLocationd("image").set_random_state(seed=0)({"image": index_image((24, 25, 26))})
    assert out["image"].shape == (27, 1, 6, 6, 6)
    assert sorted(out["label"].tolist()) == list(range(26))
    assert out["label"].tolist() != list(range(26))
    assert len(out["image_origin"].unique(dim=0)) == 27


# ---- patches


@pytest.mark.parametrize("image, grid, jitter, gap, queries, channels", GEOMETRIES)
def test_patches_are_the_right_voxels(
    image: Any, grid: Any, jitter: Any, gap: Any, queries: Any, channels: int
) -> None:
    img, count = index_image(image, channels), prod(grid_of(grid, len(image)))
    array = RandRelativeLocation(grid, jitter, gap, queries)
    starts, size, _ = patch_grid(image, grid, None, jitter, gap)
    for label in (list(range(count - 1)), [count - 2], [0, 0, 1]):
        ids = [count // 2, *(c if c < count // 2 else c + 1 for c in label)]
        assert torch.equal(array.apply(img, starts, torch.tensor(label)), crops(img, starts[ids], size))
    out = RandRelativeLocationd("image", grid, jitter, gap, queries, label_key="place")({"image": img})
    assert set(out) == {"image", "image_origin", "place"}
    expected = count - 1 if queries is None else queries
    assert out["image"].shape == (1 + expected, channels, *size)
    assert out["image_origin"].shape == (1 + expected, len(image))
    assert out["place"].shape == (expected,)
    assert torch.equal(out["image"], crops(img, out["image_origin"], size))
    for key in ("image_origin", "place"):
        assert type(out[key]) is torch.Tensor
        assert out[key].dtype == torch.int64


def test_constant_volume_gives_equal_inputs_for_every_label() -> None:
    transform = RandRelativeLocation(num_queries=5).set_random_state(seed=0)
    img = torch.full((2, 24, 25, 26), 0.3)
    first = transform(img)
    assert torch.equal(first, first[:1].expand_as(first))
    for _ in range(5):
        label = transform.label
        assert torch.equal(transform(img), first)
        assert not torch.equal(transform.label, label)


def test_affine() -> None:
    img = MetaTensor(index_image((14, 17, 19)), affine=AFFINE)
    patches = RandRelativeLocation(3, 1, 1)(img)
    assert torch.equal(patches.affine, AFFINE)
    assert patches.shape[0] == 27


# ---- repeats, keys, errors


def test_randomize_false_repeats_the_last_draw() -> None:
    img = index_image((14, 17, 19))
    array = RandRelativeLocation(3, 1, 0, 4).set_random_state(seed=0)
    dictionary = RandRelativeLocationd("image", 3, 1, 0, 4).set_random_state(seed=0)
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})
    assert torch.equal(array(img, randomize=False), first)
    assert torch.equal(array.apply(img, array.starts, array.label), first)
    repeated = dictionary({"image": img}, randomize=False)
    assert all(torch.equal(out[key], repeated[key]) for key in out)
    assert torch.equal(out["image"], first)
    assert torch.equal(out["label"], array.label)
    assert not torch.equal(array(img), first)


def test_keys() -> None:
    img = index_image((14, 17))
    out = RandRelativeLocationd(["ct", "pet"], jitter=1, gap=0)({"ct": img, "pet": 2 * img})
    assert torch.equal(2 * out["ct"], out["pet"])
    assert torch.equal(out["ct_origin"], out["pet_origin"])
    with pytest.raises(ValueError, match=r"\(14, 17\) and 'pet' \(17, 14\)"):
        RandRelativeLocationd(["ct", "pet"])({"ct": img, "pet": img.transpose(1, 2)})
    for label_key in ("image", "image_origin"):
        with pytest.raises(ValueError, match=label_key):
            RandRelativeLocationd("image", label_key=label_key)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"grid_size": 2}, "grid_size must be odd, .* got 2"),
        ({"grid_size": (3, 4)}, r"odd, .*\(3, 4\)"),
        ({"grid_size": 1}, "at least 3 patches"),
        ({"grid_size": (1, 1)}, "at least 3 patches"),
        ({"num_queries": 0}, "num_queries must be between 1 and 26 for 27 patches, got 0"),
        ({"num_queries": 27}, "between 1 and 26"),
        ({"grid_size": (3, 3), "num_queries": 9}, "between 1 and 8"),
        ({"jitter": -1}, "jitter must be"),
        ({"gap": True}, "gap must be"),
    ],
)
def test_constructor_errors(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandRelativeLocation(**args)
    with pytest.raises(ValueError, match=message):
        RandRelativeLocationd("image", **args)


@pytest.mark.parametrize("grid", [2, (3, 4), 1, (1, 1)])
def test_no_offsets_without_a_middle(grid: Any) -> None:
    with pytest.raises(ValueError, match="grid_size must be odd"):
        location_offsets(grid)


def test_call_errors() -> None:
    transform = RandRelativeLocation(3, 0, 0, num_queries=9).set_random_state(seed=0)
    with pytest.raises(ValueError, match="between 1 and 8 for 9 patches, got 9"):
        transform(torch.zeros(1, 14, 17))
    with pytest.raises(ValueError, match="axis 0 of length 2 in 3 cells"):
        transform(torch.zeros(1, 2, 17, 19))
    assert transform.starts is None
    assert transform.R.randint(1000) == np.random.RandomState(0).randint(1000)


@pytest.mark.parametrize(
    "starts, label, message",
    [
        (torch.zeros(26, 3), [0], "not those of a grid of 27 patches"),
        (torch.zeros(27, 3), [26], "label must be .* between 0 and 25"),
        (torch.zeros(27, 3), [-1], "label must be"),
        (torch.zeros(27, 3), 3, "label must be"),
    ],
)
def test_starts_and_labels_of_another_grid_are_refused(starts: torch.Tensor, label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandRelativeLocation().apply(torch.zeros(1, 14, 17, 19), starts.long(), torch.tensor(label))
