# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    Lambda,
    RandFlip,
    Randomizable,
    RandRotate90,
    RandShiftIntensity,
    Resize,
    Transform,
    Transpose,
)
from monai.utils import MAX_SEED
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from monai_ssl.transforms import RandVoCoCrops, RandVoCoCropsd, base_origins, overlap_fractions
from monai_ssl.transforms._each_crop import is_native, untracked

# sizes, grid, number of channels: 2D and 3D, odd and unequal sides, one cell along some axes
GEOMETRIES = [((5, 6, 7), (3, 2, 1), 1), ((3, 5), (2, 3), 3), ((2, 3, 4), (2, 2, 2), 3), ((7, 5, 3), (1, 2, 3), 1)]


def window_shape(roi: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(r * g for r, g in zip(roi, grid))


def index_image(spatial: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    """Image whose voxel value is its index in the flattened volume, different in every channel."""
    return torch.arange(channels * int(np.prod(spatial)), dtype=torch.float32).reshape(channels, *spatial)


def crop(img: torch.Tensor, origin: Any, roi: tuple[int, ...]) -> torch.Tensor:
    return img[(slice(None), *(slice(int(o), int(o) + r) for o, r in zip(origin, roi)))]


def augmentation() -> Compose:
    flips = [RandFlip(0.5, axis) for axis in range(3)]
    return Compose([*flips, RandRotate90(0.5, 3, (0, 1)), RandShiftIntensity(0.1, prob=0.5)])


class AddDraw(Randomizable, Transform):
    """Adds the next draw to the crop in place, so that every draw can be read off the result."""

    def randomize(self, data: Any = None) -> None:
        self.draw = float(self.R.randint(1, 1000))

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        self.randomize()
        return data.add_(self.draw)


# ---- free functions


@pytest.mark.parametrize(
    "roi, grid, expected",
    [
        ((4, 6, 5), (3, 2, 1), [(0, 0, 0), (0, 6, 0), (4, 0, 0), (4, 6, 0), (8, 0, 0), (8, 6, 0)]),
        (5, (2, 2), [(0, 0), (0, 5), (5, 0), (5, 5)]),
    ],
)
def test_base_origins(roi: Any, grid: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    origins = base_origins(roi, grid)
    assert origins.dtype == torch.int64
    assert origins.tolist() == [list(o) for o in expected]


@pytest.mark.parametrize(
    "roi, grid, base, origin, expected",
    [
        (4, (3, 3, 1), None, (2, 6, 0), [0, 0.25, 0.25, 0, 0.25, 0.25, 0, 0, 0]),
        ((4, 6, 5), (3, 2, 1), None, (1, 2, 0), [1 / 2, 1 / 4, 1 / 6, 1 / 12, 0, 0]),
        (2, (2, 2, 2), None, (1, 1, 1), [1 / 8] * 8),
        (5, (2, 2, 1), None, (5, 3, 0), [0, 0, 0.4, 0.6]),
        (5, (2, 2, 1), None, (0, 0, 0), [1, 0, 0, 0]),
        ((2, 2), (2, 2), (3, 3), (1, 1), [1, 0, 0, 0]),
        ((4, 4), (3, 3), 2, (0, 1), [1 / 8, 1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 8, 0, 0, 0]),
    ],
)
def test_overlap_fractions(roi: Any, grid: Any, base: Any, origin: Any, expected: list[float]) -> None:
    fractions = overlap_fractions(torch.tensor(origin), roi, grid, base_size=base)
    assert fractions.dtype == torch.float32
    torch.testing.assert_close(fractions, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    exact = overlap_fractions(torch.tensor(origin), roi, grid, base_size=base, dtype=torch.float64)
    torch.testing.assert_close(exact, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("roi, grid, base", [*((r, g, None) for r, g, _ in GEOMETRIES), ((4, 3), (3, 2), (3, 5))])
def test_overlap_equals_counted_voxels(roi: Any, grid: Any, base: Any) -> None:
    cell = base or roi
    covered = window_shape(cell, grid)
    owner = torch.full([c + 2 * r for c, r in zip(covered, roi)], -1)  # room for crops that leave the grid
    inner = torch.zeros(covered, dtype=torch.int64)
    for k, origin in enumerate(product(*(range(0, g * c, c) for g, c in zip(grid, cell)))):
        crop(inner[None], origin, cell)[:] = k
    owner[tuple(slice(0, c) for c in covered)] = inner
    starts = torch.tensor(list(product(*(range(0, c, 2) for c in covered))))
    counted = [torch.bincount(crop(owner[None], s, roi).flatten() + 1, minlength=inner.max() + 2)[1:] for s in starts]
    expected = torch.stack(counted).double() / np.prod(roi)
    actual = overlap_fractions(starts, roi, grid, base_size=base, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert torch.equal(actual == 0, expected == 0)


@pytest.mark.parametrize("roi, grid, _", GEOMETRIES)
def test_overlap_sums_to_one_inside(roi: Any, grid: Any, _: int) -> None:
    starts = torch.tensor(list(product(*(range((g - 1) * r + 1) for r, g in zip(roi, grid)))))
    fractions = overlap_fractions(starts.reshape(1, -1, len(roi)), roi, grid)
    assert fractions.shape == (1, len(starts), np.prod(grid))
    torch.testing.assert_close(fractions.sum(-1), torch.ones(1, len(starts)), atol=1e-6, rtol=0)
    assert (fractions > 0).sum(-1).max() <= 2 ** sum(g > 1 for g in grid)


@pytest.mark.parametrize("last, positives, largest", [(129, 3.908, 0.5654), (128, 3.938, 0.5625)])
def test_labels_of_the_released_geometry(last: int, positives: float, largest: float) -> None:
    starts = torch.cartesian_prod(torch.arange(last), torch.arange(last), torch.arange(1))
    labels = overlap_fractions(starts, 64, (3, 3, 1), dtype=torch.float64)
    assert (labels > 0).double().sum(-1).mean() == pytest.approx(positives, abs=5e-4)
    assert labels.amax(-1).mean() == pytest.approx(largest, abs=5e-5)
    mean = labels.mean(0)
    same_corners = bool((mean[0] - mean[8]).abs() < 1e-12)
    assert same_corners == (last == 129)  # the released range never draws the last start


@pytest.mark.parametrize("origin", [torch.zeros(4, 2), torch.tensor(3)])
def test_overlap_refuses_other_axes(origin: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"origin of shape .* grid \(3, 2, 1\)"):
        overlap_fractions(origin, (4, 6, 5), (3, 2, 1))


# ---- draws


def test_released_sequence_of_draws() -> None:
    transform = RandVoCoCrops((5, 6, 7), (3, 2, 1), num_samples=4, inclusive=False).set_random_state(seed=11)
    transform.randomize()
    state = np.random.RandomState(11)
    assert transform.starts.tolist() == [[state.randint(0, 10), state.randint(0, 6), 0] for _ in range(4)]


def test_inclusive_sequence_then_seed() -> None:
    transform = RandVoCoCrops((5, 6, 7), (3, 1, 2), num_samples=3, crop_transform=AddDraw()).set_random_state(seed=5)
    transform.randomize()
    state = np.random.RandomState(5)
    assert transform.starts.tolist() == [[state.randint(0, 11), 0, state.randint(0, 8)] for _ in range(3)]
    assert transform.seed == int(state.randint(MAX_SEED, dtype="uint32"))
    assert (transform.starts.dtype, transform.label.dtype) == (torch.int64, torch.float32)
    assert torch.equal(transform.label, overlap_fractions(transform.starts, (5, 6, 7), (3, 1, 2)))


@pytest.mark.parametrize("crop_transform", [None, Transpose([0, 1, 2])])
def test_no_seed_without_random_crop_transform(crop_transform: Any) -> None:
    transform = RandVoCoCrops((4, 3), (2, 3), crop_transform=crop_transform).set_random_state(seed=0)
    transform.randomize()
    assert transform.seed is None


@pytest.mark.parametrize("inclusive", [True, False])
def test_range_of_starts(inclusive: bool) -> None:
    transform = RandVoCoCrops((3, 2, 4), (2, 3, 1), num_samples=2000, inclusive=inclusive).set_random_state(seed=0)
    transform.randomize()
    ends = [3, 4, 0] if inclusive else [2, 3, 0]
    assert transform.starts.amin(0).tolist() == [0, 0, 0]
    assert transform.starts.amax(0).tolist() == ends


# ---- crops


@pytest.mark.parametrize("roi, grid, channels", GEOMETRIES)
def test_crops_are_the_right_voxels(roi: Any, grid: Any, channels: int) -> None:
    img = index_image(window_shape(roi, grid), channels)
    item = {"image": img, "other": torch.ones(2), "name": "a.nii.gz"}
    transform = RandVoCoCropsd("image", roi, grid, num_samples=3).set_random_state(seed=1)
    out = transform(item)
    assert set(out) == {"image", "image_base", "image_origin", "label", "other", "name"}
    assert out["image"].shape == (3, channels, *roi)
    assert out["image_base"].shape == (np.prod(grid), channels, *roi)
    for sample, start in zip(out["image"], out["image_origin"]):
        assert torch.equal(sample, crop(img, start, roi))
    for base, origin in zip(out["image_base"], base_origins(roi, grid)):
        assert torch.equal(base, crop(img, origin, roi))
    assert torch.equal(out["label"], overlap_fractions(out["image_origin"], roi, grid))
    for key, dtype in (("image_origin", torch.int64), ("label", torch.float32)):
        assert type(out[key]) is torch.Tensor
        assert out[key].dtype == dtype


def test_array_form_equals_dictionary_form() -> None:
    img = index_image((15, 12, 7))
    args = {"roi_size": (5, 6, 7), "grid_size": (3, 2, 1), "num_samples": 2, "crop_transform": AddDraw()}
    transform = RandVoCoCrops(**args).set_random_state(seed=3)
    samples, bases = transform(img)
    out = RandVoCoCropsd("image", **args).set_random_state(seed=3)({"image": img})
    assert torch.equal(samples, out["image"])
    assert torch.equal(bases, out["image_base"])
    assert torch.equal(transform.starts, out["image_origin"])
    assert torch.equal(transform.label, out["label"])


def test_two_keys_share_starts_and_augmentation() -> None:
    img = index_image((8, 9, 4))
    transform = RandVoCoCropsd(["ct", "pet"], (4, 3, 4), (2, 3, 1), crop_transform=AddDraw(), label_key="overlap")
    out = transform.set_random_state(seed=0)({"ct": img, "pet": 2 * img})
    assert torch.equal(out["ct_origin"], out["pet_origin"])
    for suffix in ("", "_base"):
        draws = 2 * out[f"ct{suffix}"] - out[f"pet{suffix}"]  # the voxel cancels, the draw stays
        assert torch.equal(draws, draws[:, :, :1, :1, :1].expand_as(draws))
        assert len(draws[:, 0, 0, 0, 0].unique()) == len(draws)
    assert "label" not in out
    assert out["overlap"].shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    img = torch.arange(72).reshape(1, 8, 9).to(dtype)
    for given in (img, img.numpy()):
        samples, bases = RandVoCoCrops((4, 3), (2, 3)).set_random_state(seed=0)(given)
        assert samples.dtype == bases.dtype == dtype
        assert torch.equal(bases[-1], img[:, 4:, 6:])


def test_read_only_and_strided_arrays() -> None:
    img = index_image((8, 9)).numpy()
    img.flags.writeable = False
    transform = RandVoCoCrops((4, 3), (2, 3))
    assert torch.equal(transform(img)[1][1], torch.tensor(img[:, :4, 3:6]))
    flipped = transform(img[:, ::-1])[1]
    assert torch.equal(flipped[1], torch.tensor(img[:, ::-1][:, :4, 3:6].copy()))
    channels_last = index_image((9, 2), 8).permute(2, 0, 1)  # (2, 8, 9), channel fastest in memory
    bases = transform(channels_last)[1]
    assert bases.is_contiguous()
    assert torch.equal(bases[5], channels_last[:, 4:, 6:])


def test_affine_maps_crops_to_their_place() -> None:
    affine = torch.tensor([[0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(s) for s in (8, 9, 4)), indexing="ij")).double()
    world = torch.einsum("ij,jxyz->ixyz", affine[:3, :3], grid) + affine[:3, 3, None, None, None]
    img = MetaTensor(world, affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    out = RandVoCoCropsd("image", (4, 3, 4), (2, 3, 1)).set_random_state(seed=2)({"image": img})
    for key, origins in (("image", out["image_origin"]), ("image_base", base_origins((4, 3, 4), (2, 3, 1)))):
        assert isinstance(out[key], MetaTensor)
        assert torch.equal(out[key].affine, affine)
        assert out[key].meta["filename_or_obj"] == "a.nii.gz"
        for view, origin in zip(out[key].as_tensor(), origins):
            translate = torch.eye(4, dtype=torch.float64)
            translate[:3, 3] = origin
            voxel = torch.tensor([1, 2, 3, 1], dtype=torch.float64)
            torch.testing.assert_close(view[:, 1, 2, 3], (affine @ translate @ voxel)[:3])
    out["image"].affine[0, 3] = out["image"].meta["filename_or_obj"] = 0
    assert torch.equal(img.affine, affine)
    assert torch.equal(out["image_base"].affine, affine)
    assert img.meta["filename_or_obj"] == "a.nii.gz"


@pytest.mark.parametrize(
    "crop_transform", [None, AddDraw(), RandFlip(0.5, 1), lambda x: x, Compose([Lambda(lambda x: x)])]
)
@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_input_untouched_and_no_memory_shared(crop_transform: Any, kind: str) -> None:
    img: Any = index_image((8, 9))
    img = img.numpy() if kind == "numpy" else MetaTensor(img) if kind == "meta" else img
    before = torch.as_tensor(img).clone()
    transform = RandVoCoCrops((4, 3), (2, 3), crop_transform=crop_transform).set_random_state(seed=0)
    samples, bases = transform(img)
    first = samples.clone()
    bases.zero_()
    assert torch.equal(samples, first)
    samples.zero_()
    assert torch.equal(torch.as_tensor(img), before)
    out = RandVoCoCropsd("image", (4, 3), (2, 3)).set_random_state(seed=0)
    item = out({"image": img})
    first_item = {key: value.clone() for key, value in item.items()}
    for value in item.values():
        value.zero_()
    repeated = out({"image": img}, randomize=False)
    assert all(torch.equal(repeated[key], first_item[key]) for key in first_item)


# ---- crop_transform


def test_one_reseed_then_bases_then_samples() -> None:
    transform = RandVoCoCrops((4, 3, 2), (2, 3, 1), num_samples=3, crop_transform=AddDraw()).set_random_state(seed=9)
    img = index_image((8, 9, 2))
    samples, bases = transform(img)
    draws = np.random.RandomState(transform.seed)
    origins = [*base_origins((4, 3, 2), (2, 3, 1)), *transform.starts]
    for result, origin in zip([*bases, *samples], origins):
        assert torch.equal(result, crop(img, origin, (4, 3, 2)) + draws.randint(1, 1000))


def test_calls_get_plain_tensors_and_one_reseed() -> None:
    log: list[Any] = []

    class Recorder(Randomizable, Transform):
        def __deepcopy__(self, memo: Any) -> Recorder:
            return Recorder()

        def set_random_state(self, seed: Any = None, state: Any = None) -> Recorder:
            log.append(seed)
            return self

        def __call__(self, data: torch.Tensor) -> torch.Tensor:
            log.append(data)
            return data * 2

    img = MetaTensor(index_image((8, 9)))
    transform = RandVoCoCrops((4, 3), (2, 3), num_samples=2, crop_transform=Recorder()).set_random_state(seed=4)
    samples, bases = transform(img)
    assert log[0] == transform.seed
    assert all(type(x) is torch.Tensor and x.shape == (1, 4, 3) for x in log[1:])
    assert len(log) == 1 + 6 + 2
    assert torch.equal(torch.stack(log[1:7]) * 2, bases.as_tensor())  # what a caller keeps is not overwritten
    assert torch.equal(torch.stack(log[7:]) * 2, samples.as_tensor())


@pytest.mark.parametrize("crop_transform", [augmentation(), AddDraw(), Compose([AddDraw(), RandFlip(0.5, 1)])])
def test_equals_calling_the_transform_oneself(crop_transform: Any) -> None:
    img = index_image((10, 15, 3), channels=2)
    transform = RandVoCoCrops((5, 5, 3), (2, 3, 1), num_samples=4, crop_transform=crop_transform)
    transform.set_random_state(seed=1)
    samples, bases = transform(img)
    crop_transform.set_random_state(seed=transform.seed)
    origins = [*base_origins((5, 5, 3), (2, 3, 1)), *transform.starts]
    expected = torch.stack([torch.as_tensor(crop_transform(crop(img, o, (5, 5, 3)).clone())) for o in origins])
    assert torch.equal(torch.cat([bases, samples]), expected)


def test_what_a_callable_keeps_is_its_own() -> None:
    kept: list[torch.Tensor] = []

    def keep(data: torch.Tensor) -> torch.Tensor:
        kept.append(data)
        return data

    img = index_image((8, 9))
    for result in RandVoCoCrops((4, 3), (2, 3), crop_transform=keep)(img):
        result.zero_()
    assert torch.equal(kept[1], img[:, :4, 3:6])


def test_augmentation_varies_within_and_between_items() -> None:
    img = index_image((8, 9, 5))
    transform = RandVoCoCrops((4, 3, 5), (2, 3, 1), crop_transform=RandFlip(0.5, 2)).set_random_state(seed=0)
    plain = RandVoCoCrops((4, 3, 5), (2, 3, 1))(img)[1]
    touched = [[not torch.equal(a, b) for a, b in zip(transform(img)[1], plain)] for _ in range(8)]
    assert any(any(item) and not all(item) for item in touched)
    assert len({tuple(item) for item in touched}) > 1
    transform.set_random_state(seed=0)
    assert [[not torch.equal(a, b) for a, b in zip(transform(img)[1], plain)] for _ in range(8)] == touched


def test_crop_transform_is_copied_at_construction() -> None:
    crop_transform = AddDraw()
    crop_transform.set_random_state(seed=0)
    before = crop_transform.R.get_state()[1].copy()
    transform = RandVoCoCrops((4, 3), (2, 3), crop_transform=crop_transform)
    transform(index_image((8, 9)))
    assert transform.crop_transform is not crop_transform
    assert np.array_equal(crop_transform.R.get_state()[1], before)


def test_crop_transform_may_change_the_size_and_return_arrays() -> None:
    img = index_image((8, 9, 4), channels=3)
    resize = Resize((6, 5, 2), mode="trilinear", align_corners=True)
    samples, bases = RandVoCoCrops((4, 3, 4), (2, 3, 1), crop_transform=resize)(img)
    assert samples.shape == (2, 3, 6, 5, 2)
    assert bases.shape == (6, 3, 6, 5, 2)
    torch.testing.assert_close(bases[4].as_tensor(), resize(img[:, 4:, 3:6]).as_tensor())
    halves = RandVoCoCrops((4, 3, 4), (2, 3, 1), crop_transform=lambda x: x.numpy()[:, ::2] / 2)(img)[1]
    assert torch.equal(halves[1], img[:, :4:2, 3:6] / 2)


def test_result_that_is_a_view_of_the_crop() -> None:
    img = index_image((6, 6))
    bases = RandVoCoCrops((3, 3), (2, 2), crop_transform=Transpose([0, 2, 1]))(img)[1]
    assert torch.equal(bases[1], img[:, :3, 3:].transpose(1, 2))


def test_unequal_crops_are_refused() -> None:
    transform = RandVoCoCrops((4, 3, 2), (2, 3, 1), crop_transform=RandRotate90(0.5, 3, (0, 1))).set_random_state(
        seed=0
    )
    with pytest.raises(ValueError, match=r"crop_transform .*\(1, 4, 3, 2\).*\(1, 3, 4, 2\), \(1, 4, 3, 2\)"):
        transform(index_image((8, 9, 2)))


def test_base_and_random_crops_of_unequal_shape_are_refused() -> None:
    """Where all crops of a kind are turned, and none of the other."""
    transform = RandVoCoCrops((4, 6, 5), (2, 1, 1), 1, crop_transform=RandRotate90(prob=0.5, max_k=1))
    with pytest.raises(
        ValueError, match=r"crop_transform turned base crops .* shape \(1, 4, 6, 5\), random .* \(1, 6, 4, 5\)"
    ):
        transform.set_random_state(seed=1)(index_image((8, 6, 5)))


def test_last_draw_of_the_dictionary_form() -> None:
    transform = RandVoCoCropsd("image", 3, (2, 2), crop_transform=RandFlip(0.5)).set_random_state(seed=0)
    assert (transform.starts, transform.label, transform.seed) == (None, None, None)
    item = transform({"image": index_image((6, 6))})
    assert torch.equal(transform.starts, item["image_origin"])
    assert torch.equal(transform.label, item["label"])
    assert transform.seed is not None


def test_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"roi_size and grid_size must be whole numbers .* \(4, 0, 4\) and"):
        RandVoCoCrops((4, 0, 4), (2, 2, 1))
    with pytest.raises(
        ValueError, match=r"roi_size and grid_size must be whole numbers .* \(4.7, 6, 5\) and \(3, 2.5, 1\)"
    ):
        RandVoCoCrops((4.7, 6, 5), (3, 2.5, 1))
    with pytest.raises(ValueError, match=r"roi_size \(4, 4\) and grid_size \(2, 2, 1\) need"):
        RandVoCoCropsd("image", (4, 4), (2, 2, 1))
    with pytest.raises(ValueError, match=r"base_size \(3, 3, 3\) and grid_size \(2, 2\) need"):
        overlap_fractions(torch.zeros(1, 2), 2, (2, 2), base_size=(3, 3, 3))


def test_lazy_crop_transform() -> None:
    img = index_image((6, 9))
    lazy = Compose([RandFlip(1.0, 0), RandRotate90(1.0, 1, (0, 1))], lazy=True)
    eager = Compose([RandFlip(1.0, 0), RandRotate90(1.0, 1, (0, 1))])
    results = [RandVoCoCrops((3, 3), (2, 3), crop_transform=t)(img)[1].as_tensor() for t in (lazy, eager)]
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="pending"):
        RandVoCoCrops((3, 3), (2, 3), crop_transform=RandFlip(1.0, 0, lazy=True))(img)


# ---- repeats


@pytest.mark.parametrize("crop_transform", [None, AddDraw(), augmentation()])
def test_randomize_false_repeats_the_last_draw(crop_transform: Any) -> None:
    img = index_image((10, 15, 3))
    array = RandVoCoCrops((5, 5, 3), (2, 3, 1), crop_transform=crop_transform).set_random_state(seed=0)
    dictionary = RandVoCoCropsd("image", (5, 5, 3), (2, 3, 1), crop_transform=crop_transform)
    dictionary.set_random_state(seed=0)
    first, again = array(img), array(img, randomize=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    applied = array.apply(img, array.starts, array.seed)
    assert all(torch.equal(a, b) for a, b in zip(first, applied))
    assert not torch.equal(array(img)[0], first[0])
    out, repeated = dictionary({"image": img}), dictionary({"image": img}, randomize=False)
    assert all(torch.equal(out[key], repeated[key]) for key in out)
    assert torch.equal(out["image"], first[0])


def test_randomize_false_before_any_draw() -> None:
    img = index_image((8, 9))
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        RandVoCoCrops((4, 3), (2, 3))(img, randomize=False)
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        RandVoCoCropsd("image", (4, 3), (2, 3))({"image": img}, randomize=False)


# ---- errors


@pytest.mark.parametrize(
    "args, message",
    [
        (((4, 4, 4), (1, 1, 1)), r"grid_size \(1, 1, 1\) has fewer than two"),
        (((4, 4), (2, 2), 0), "num_samples must be at least 1, got 0"),
        (((4, 0), (2, 2)), r"at least 1.*\(4, 0\)"),
        (((4, 4), (2, -2)), r"at least 1.*\(2, -2\)"),
        (((4, 4), (3, 3, 1)), r"\(4, 4\) and grid_size \(3, 3, 1\)"),
    ],
)
def test_constructor_errors(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandVoCoCrops(*args)
    with pytest.raises(ValueError, match=message):
        RandVoCoCropsd("image", *args)


@pytest.mark.parametrize("shape", [(1, 15, 12, 8), (1, 15, 12), (15, 12, 7), (1, 12, 15, 7), (1, 15, 12, 7, 1)])
def test_other_windows_are_refused_without_a_draw(shape: tuple[int, ...]) -> None:
    transform = RandVoCoCropsd(["a", "b"], (5, 6, 7), (3, 2, 1)).set_random_state(seed=0)
    message = (
        r"'b' has spatial shape .*\(5, 6, 7\) needs exactly \(15, 12, 7\).*RandSpatialCropd, SpatialPadd or Resized"
    )
    with pytest.raises(ValueError, match=message):
        transform({"a": torch.zeros(1, 15, 12, 7), "b": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"'img' has spatial shape"):
        transform.cropper.apply(torch.zeros(shape), torch.zeros(1, 3))
    assert transform.cropper.starts is None


@pytest.mark.parametrize("starts", [[[0, 0, 0, 0]], [0, 0, 0], [[11, 0, 0]], [[0, -1, 0]], [[0, 0, 1]]])
def test_starts_outside_are_refused(starts: Any) -> None:
    with pytest.raises(ValueError, match="starts must be"):
        RandVoCoCrops((5, 6, 7), (3, 2, 1)).apply(torch.zeros(1, 15, 12, 7), torch.tensor(starts))


def test_keys() -> None:
    with pytest.raises(KeyError):
        RandVoCoCropsd("image", 4, (2, 2))({"other": 1})
    missing = RandVoCoCropsd(["image", "pet"], (4, 3), (2, 3), allow_missing_keys=True)
    assert missing({"other": 1}) == {"other": 1}
    assert "pet" not in missing({"image": index_image((8, 9))})
    for label_key in ("image", "image_base", "image_origin"):
        with pytest.raises(ValueError, match=label_key):
            RandVoCoCropsd("image", 4, (2, 2), label_key=label_key)


# ---- meta tracking


@pytest.fixture
def tracking_off() -> Iterator[None]:
    set_track_meta(False)
    yield
    set_track_meta(True)


def test_result_type_follows_tracking(tracking_off: None) -> None:
    img = index_image((8, 9, 4))
    for given in (img, img.numpy(), MetaTensor(img)):
        for result in RandVoCoCrops((4, 3, 4), (2, 3, 1), crop_transform=RandFlip(0.5, 0))(given):
            assert type(result) is torch.Tensor


@pytest.mark.parametrize(
    "transform, expected",
    [
        (RandFlip(0.1, 0), True),
        (augmentation(), True),
        (Compose([augmentation(), Resize((2, 2, 2))]), True),
        (RandFlip(0.1, 0, lazy=True), False),
        (Compose([RandFlip(0.1, 0)], lazy=True), False),
        (Compose([RandFlip(0.1, 0), Lambda(lambda x: x)]), False),
        (Compose([Compose([AddDraw()])]), False),
        (lambda x: x, False),
    ],
)
def test_only_monai_transforms_run_untracked(transform: Any, expected: bool) -> None:
    assert is_native(transform) == expected


def only_threads(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """What other tests have left running is out of sight, but for the named kinds."""
    real, me = threading.enumerate, threading.current_thread()
    monkeypatch.setattr(threading, "enumerate", lambda: [t for t in real() if t is me or type(t).__name__ in names])


def test_tracking_is_off_inside_and_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    only_threads(monkeypatch)
    with pytest.raises(KeyError), untracked():
        assert not get_track_meta()
        raise KeyError
    assert get_track_meta()


def test_a_progress_bar_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its monitor and TensorBoard's writer are threads of most training runs."""
    only_threads(monkeypatch, "TMonitor", "_AsyncWriterThread")
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 1)
    with tqdm(total=1), untracked():
        assert {type(t).__name__ for t in threading.enumerate()} >= {"TMonitor", "_AsyncWriterThread"}
        assert not get_track_meta()
    writer.close()
    assert get_track_meta()


def test_tracking_is_left_alone_beside_other_threads() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with untracked():
            assert get_track_meta()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_meta_data_reach_the_batch(num_workers: int) -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    items = [{"image": MetaTensor(index_image((10, 15, 3)), affine=affine)} for _ in range(6)]
    transform = RandVoCoCropsd("image", (5, 5, 3), (2, 3, 1), crop_transform=augmentation())
    for batch in DataLoader(Dataset(items, transform), batch_size=2, num_workers=num_workers):
        for key, count in (("image", 2), ("image_base", 6)):
            assert batch[key].shape == (2, count, 1, 5, 5, 3)
            assert torch.equal(batch[key].affine, affine.expand(2, 4, 4))
    assert get_track_meta()
