# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Flip,
    RandAffine,
    RandAffined,
    RandFlip,
    RandFlipd,
    Randomizable,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSpatialCrop,
    RandSpatialCropSamples,
    Transform,
)
from monai.utils import MAX_SEED

from monai_ssl.transforms import RandViews, RandViewsd

from .index_images import AFFINE, index_image

SIZE = (12, 13, 14)


class AddDraw(Randomizable, Transform):
    """Adds the next draw to the image in place, so that every draw can be read off the result."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, data: Any) -> Any:
        self.calls.append(type(data))
        data += float(self.R.randint(1, 1000))
        return data


class AddDrawd(AddDraw):
    """The same for all keys of a dictionary, with one more that it writes."""

    def __call__(self, data: Any) -> Any:
        self.calls.append(sorted(data))
        draw = float(self.R.randint(1, 1000))
        for key in list(data):
            data[key] += draw
        return {**data, "other": draw}


def affine_args(size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "prob": 1.0,
        "rotate_range": (0.35,) * (3 if len(size) == 3 else 1),
        "scale_range": (0.2,) * len(size),
        "spatial_size": size,
        "padding_mode": "reflection",
    }


# ---- draws and views


@pytest.mark.parametrize("image, channels", [((5, 6, 7), 1), ((5, 6), 3)])
@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_views_are_those_of_the_seeds(image: Any, channels: int, kind: str) -> None:
    plain = index_image(image, channels)
    img: Any = plain.numpy().copy() if kind == "numpy" else MetaTensor(plain) if kind == "meta" else plain.clone()
    transform = RandViews(4, AddDraw()).set_random_state(seed=3)
    out = transform(img)
    state = np.random.RandomState(3)
    seeds = state.randint(MAX_SEED, size=4, dtype="uint32")
    assert transform.seeds.tolist() == seeds.tolist()
    assert transform.seeds.dtype == np.uint32
    assert transform.R.randint(1000) == state.randint(1000)
    draws = [np.random.RandomState(int(seed)).randint(1, 1000) for seed in seeds]
    assert len(set(draws)) == 4
    assert torch.equal(out, torch.stack([plain + draw for draw in draws]))  # each on the untouched input
    assert torch.equal(torch.as_tensor(img), plain)
    assert transform.transform.calls == [type(img)] * 4
    assert out.is_contiguous()


def test_dictionary_form() -> None:
    img, log = index_image((5, 6, 7)), AddDrawd()
    transform = RandViewsd(["ct", "pet"], 3, log).set_random_state(seed=3)
    item = {"ct": img, "pet": 2 * img, "name": "a.nii.gz"}
    out = transform(item)
    assert set(out) == {"ct", "pet", "name"}
    assert transform.transform.calls == [["ct", "pet"]] * 3
    assert log.calls == []
    draws = (out["ct"] - img)[:, 0, 0, 0, 0]
    assert len(draws.unique()) == 3
    assert torch.equal(out["pet"] - 2 * img, draws.reshape(3, 1, 1, 1, 1).expand(3, 1, 5, 6, 7))  # keys stay aligned
    assert torch.equal(out["ct"], RandViews(3, AddDraw()).set_random_state(seed=3)(img))
    assert torch.equal(item["ct"], index_image((5, 6, 7)))


def test_reversed_seeds_reverse_the_views() -> None:
    img = index_image(SIZE)
    array = RandViews(3, RandAffine(**affine_args(SIZE))).set_random_state(seed=0)
    first = array(img)
    assert torch.equal(array.apply(img, array.seeds[::-1]), first.flip(0))
    array.seeds = array.seeds[::-1]
    assert torch.equal(array(img, randomize=False), first.flip(0))
    dictionary = RandViewsd("image", 3, RandAffined("image", **affine_args(SIZE))).set_random_state(seed=0)
    out = dictionary({"image": img})["image"]
    dictionary.seeds = dictionary.seeds[::-1]
    assert torch.equal(dictionary({"image": img}, randomize=False)["image"], out.flip(0))


@pytest.mark.parametrize("size", [SIZE, SIZE[:2]])
def test_no_view_is_the_untouched_crop(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    img = torch.rand(1, *(s + s // 2 for s in size), generator=generator)
    transform = RandViewsd("image", 2, RandAffined("image", **affine_args(size))).set_random_state(seed=0)
    middle = tuple(slice(s // 4, s // 4 + s) for s in size)
    for _ in range(20):
        views = transform({"image": img})["image"].as_tensor()
        assert views.shape == (2, 1, *size)
        assert all((view - img[(slice(None), *middle)]).abs().max() > 0.1 for view in views)
        assert not torch.equal(views[0], views[1])


def test_exemplar_chain_keeps_keys_aligned() -> None:
    keys = ["image", "other"]
    chain = Compose(
        [
            RandAffined(keys, **affine_args(SIZE)),
            *(RandFlipd(keys, 0.5, axis) for axis in range(3)),
            RandShiftIntensityd("image", 0.125, prob=0.5),
            RandScaleIntensityFixedMeand("image", factors=0.5, prob=0.5),
        ]
    )
    img = MetaTensor(index_image((18, 19, 20)) / 7000, affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    out = RandViewsd(keys, 2, chain).set_random_state(seed=1)({"image": img, "other": img})
    assert out["image"].shape == (2, 1, *SIZE)
    for view, other in zip(out["image"].as_tensor(), out["other"].as_tensor()):
        pair = torch.stack([view.flatten(), other.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99  # intensities of one are changed, places of both alike
    assert torch.equal(out["image"].affine, AFFINE)
    assert out["image"].meta["filename_or_obj"] == "a.nii.gz"
    assert out["image"].applied_operations == []
    assert torch.equal(img.affine, AFFINE)
    assert img.applied_operations == []


def test_one_view_and_a_transform_that_returns_its_input() -> None:
    img = index_image((5, 6, 7))
    out = RandViews(1, RandFlip(0.0))(img)
    assert torch.equal(out[0], img)
    out.zero_()
    assert torch.equal(img, index_image((5, 6, 7)))


@pytest.mark.parametrize("cls", [RandViews, RandViewsd])
def test_transform_is_copied_at_construction(cls: Any) -> None:
    inner = AddDrawd() if cls is RandViewsd else AddDraw()
    inner.set_random_state(seed=0)
    before = inner.R.get_state()[1].copy()
    transform = cls("image", 2, inner) if cls is RandViewsd else cls(2, inner)
    img = index_image((5, 6))
    transform({"image": img} if cls is RandViewsd else img)
    assert transform.transform is not inner
    assert inner.calls == []
    assert np.array_equal(inner.R.get_state()[1], before)


# ---- repeats, keys, errors


def test_randomize_false_repeats_the_last_draw() -> None:
    img = index_image((5, 6, 7))
    array = RandViews(3, AddDraw()).set_random_state(seed=0)
    dictionary = RandViewsd("image", 3, AddDrawd()).set_random_state(seed=0)
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})["image"]
    assert torch.equal(first, out)
    for _ in range(2):
        assert torch.equal(array(img, randomize=False), first)
        assert torch.equal(dictionary({"image": img}, randomize=False)["image"], out)
    assert torch.equal(array.apply(img, array.seeds.tolist()), first)
    assert not torch.equal(array(img), first)


def test_keys() -> None:
    img = index_image((5, 6))
    with pytest.raises(ValueError, match=r"\(5, 6\) and 'b' \(6, 5\)"):
        RandViewsd(["a", "b"], 2, AddDrawd())({"a": img, "b": img.transpose(1, 2)})
    missing = RandViewsd(["a", "b"], 2, AddDrawd(), allow_missing_keys=True)
    assert missing({"c": 1}) == {"c": 1}
    assert missing({"a": img})["a"].shape == (2, 1, 5, 6)


@pytest.mark.parametrize(
    "num_views, inner, message",
    [
        (0, AddDraw(), "num_views must be at least 1, got 0"),
        (2, Flip(0), "Flip is not Randomizable, so that all views would be equal"),
        (2, lambda x: x, "not Randomizable"),
    ],
)
def test_constructor_errors(num_views: int, inner: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandViews(num_views, inner)
    with pytest.raises(ValueError, match=message):
        RandViewsd("image", num_views, inner)


class RandomSize(Randomizable, Transform):
    """Crops to a size that depends on the draw."""

    def __call__(self, data: Any) -> Any:
        end = int(self.R.randint(2, 6))
        return {k: v[:, :end] for k, v in data.items()} if isinstance(data, dict) else data[:, :end]


def test_views_of_unequal_shape() -> None:
    img = index_image((5, 6))
    with pytest.raises(ValueError, match=r"views of 'img' differ in shape: .*\(1, 2, 6\).*\(1, 5, 6\)"):
        RandViews(30, RandomSize()).set_random_state(seed=0)(img)
    with pytest.raises(ValueError, match="views of 'image' differ in shape"):
        RandViewsd("image", 30, RandomSize()).set_random_state(seed=0)({"image": img})


def test_views_that_are_no_single_image() -> None:
    img = index_image((5, 6))
    with pytest.raises(ValueError, match=r"each view of 'img' must be one image, got \['list', 'list'\]"):
        RandViews(2, RandSpatialCropSamples((3, 3), 2, random_size=False))(img)
    with pytest.raises(ValueError, match="pending"):
        RandViews(2, RandFlip(1.0, 0, lazy=True))(img)
    assert RandViews(2, Compose([RandSpatialCrop((3, 4), random_size=False)], lazy=True))(img).shape == (2, 1, 3, 4)
