# SPDX-License-Identifier: Apache-2.0
"""What holds for every public transform; a new one adds an entry to CASES and nothing else."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    decollate_batch,
    get_track_meta,
    list_data_collate,
    set_track_meta,
)
from monai.transforms import (
    Compose,
    InvertibleTransform,
    MapTransform,
    MultiSampleTrait,
    Randomizable,
    RandomizableTrait,
    RandShiftIntensity,
    Transform,
)

from monai_ssl import transforms
from monai_ssl.data import KeyedDataset
from monai_ssl.transforms import base_origins

AFFINE = torch.tensor([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """How to build and feed a transform, and what it writes."""

    args: dict[str, Any]  # constructor arguments besides `keys`, as a JSON file would hold them
    spatial: tuple[int, ...]  # spatial shape of the input
    tracked: tuple[str, ...] = ("",)  # suffixes of the keys that carry meta data
    plain: tuple[str, ...] = ()  # suffixes of the keys that hold plain tensors
    labels: tuple[str, ...] = ()  # keys of plain tensors that are written once for all image keys
    returned: tuple[str, ...] = ()  # those of them that the array form returns after the images
    dtype: torch.dtype | None = None  # of the images written, where it is not the input's
    inner: dict[str, Any] = field(default_factory=dict)  # arguments that hold another random transform
    # the views in one item, each with its affine in a world where voxels of the input hold their own coordinates
    views: Callable[[dict[str, Any]], Iterator[tuple[torch.Tensor, torch.Tensor]]] | None = None
    extra: Callable[[], dict[str, Any]] = dict  # other keys that it reads
    dictionary_args: dict[str, Any] = field(default_factory=dict)  # what the dictionary form has in their place


def voco_views(roi: tuple[int, ...], grid: tuple[int, ...]) -> Callable[[dict[str, Any]], Any]:
    def views(item: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for key, origins in (("image", item["image_origin"]), ("image_base", base_origins(roi, grid))):
            for view, origin in zip(item[key].as_tensor(), origins):
                translate = torch.eye(4, dtype=torch.float64)
                translate[: len(roi), 3] = origin.double()
                yield view, item[key].affine @ translate

    return views


def voco_case(roi: tuple[int, ...], grid: tuple[int, ...]) -> Case:
    return Case(
        args={"roi_size": list(roi), "grid_size": list(grid), "num_samples": 3},
        spatial=tuple(r * g for r, g in zip(roi, grid)),
        tracked=("", "_base"),
        plain=("_origin",),
        labels=("label",),
        inner={"crop_transform": Compose([RandShiftIntensity(0.5, prob=0.7)])},
        views=voco_views(roi, grid),
    )


def feature_map_case(spatial: tuple[int, ...], source: tuple[int, ...]) -> Case:
    return Case(
        args={"source_key": "source"},
        spatial=spatial,
        extra=lambda: {"source": MetaTensor(torch.zeros(1, *source), affine=AFFINE)},
    )


def patch_views(item: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for view, origin in zip(item["image"].as_tensor(), item["image_origin"]):
        translate = torch.eye(4, dtype=torch.float64)
        translate[: len(origin), 3] = origin.double()
        yield view, item["image"].affine @ translate


def patches_case(args: dict[str, Any], spatial: tuple[int, ...], labels: tuple[str, ...] = ()) -> Case:
    return Case(args=args, spatial=spatial, plain=("_origin",), labels=labels, views=patch_views)


def rotation_case(group: str, spatial: tuple[int, ...]) -> Case:
    return Case(
        args={"group": group, "max_anisotropy": None},
        spatial=spatial,
        labels=("label",),
        views=lambda item: iter([(item["image"].as_tensor(), item["image"].affine)]),
    )


def views_case(spatial: tuple[int, ...], roi: tuple[int, ...]) -> Case:
    crop = {"roi_size": list(roi), "random_size": False}
    on_keys = {"keys": ["image", "pet"], "allow_missing_keys": True}
    return Case(
        args={"num_views": 4, "transform": {"_target_": "RandSpatialCrop", **crop}},
        dictionary_args={"transform": {"_target_": "RandSpatialCropd", **crop, **on_keys}},
        spatial=spatial,
    )


def paired_views_case(spatial: tuple[int, ...], roi: tuple[int, ...]) -> Case:
    return Case(
        args={"roi_size": list(roi), "scale_range": [[1.0, 1.6]] * len(roi)},
        spatial=spatial,
        tracked=("", "_2"),
        labels=("view_affine",),
        returned=("view_affine",),
        dtype=torch.float32,
        views=lambda item: ((item[key].as_tensor(), item[key].affine) for key in ("image", "image_2")),
    )


GRID_3D: dict[str, Any] = {"grid_size": [2, 3, 1], "jitter": 2, "gap": [1, 0.2, 1]}
GRID_2D: dict[str, Any] = {"grid_size": [2, 3], "jitter": 2, "gap": 1}
JITTER: dict[str, Any] = {"jitter": 2, "gap": 0}
SIZE_3D, SIZE_2D = (10, 14, 5), (13, 17)

# class name without the d of the dictionary form: cases by number of spatial axes
CASES: dict[str, dict[int, Case]] = {
    "FeatureMapAffine": {3: feature_map_case((5, 6, 7), (10, 12, 21)), 2: feature_map_case((5, 6), (10, 12))},
    "GridPatches": {3: patches_case(GRID_3D, SIZE_3D), 2: patches_case(GRID_2D, SIZE_2D)},
    "RandCubeRotation": {3: rotation_case("cube24", (6, 6, 6)), 2: rotation_case("plane4", (7, 7))},
    "RandGridPatches": {3: patches_case(GRID_3D, SIZE_3D), 2: patches_case(GRID_2D, SIZE_2D)},
    "RandJigsaw": {
        3: patches_case({"grid_size": [2, 3, 1], "num_permutations": 50, **JITTER}, SIZE_3D, ("label",)),
        2: patches_case({"grid_size": [2, 3], "num_permutations": 50, **JITTER}, SIZE_2D, ("label",)),
    },
    "RandPairedViews": {
        3: paired_views_case((10, 14, 9), (5, 6, 7)),
        2: paired_views_case((13, 17), (5, 6)),
    },
    "RandPartitionCrops": {
        3: Case(
            args={"roi_size": [3, 4, 2], "num_partitions": 3, "axis": 1},
            spatial=(5, 14, 7),
            plain=("_origin",),
            labels=("partition", "slice_index"),
            views=patch_views,
        ),
    },
    "RandPartitionSlices": {
        3: Case(args={"num_partitions": 3, "axis": 1}, spatial=(5, 10, 7), labels=("partition", "slice_index")),
    },
    "RandRelativeLocation": {
        3: patches_case({"grid_size": [3, 1, 3], "num_queries": 5, **JITTER}, (13, 5, 10), ("label",)),
        2: patches_case({"grid_size": 3, "num_queries": 5, **JITTER}, SIZE_2D, ("label",)),
    },
    "RandViews": {3: views_case((8, 7, 6), (5, 4, 3)), 2: views_case((13, 17), (7, 8))},
    "RandVoCoCrops": {3: voco_case((5, 6, 7), (3, 2, 1)), 2: voco_case((5, 6), (2, 3))},
}
# always MetaTensors in and out, since writing an affine is all they do
NEEDS_META = {"FeatureMapAffine"}
# what takes volumes apart
ONLY_3D = {"RandPartitionCrops", "RandPartitionSlices"}

PUBLIC = {n: o for n, o in vars(transforms).items() if n in transforms.__all__ and inspect.isclass(o)}
CLASSES = {n: o for n, o in PUBLIC.items() if n == o.__name__}
DICTIONARY = {n: o for n, o in CLASSES.items() if issubclass(o, MapTransform)}


def base_name(cls: type) -> str:
    return cls.__name__[:-1] if issubclass(cls, MapTransform) else cls.__name__


def case_of(cls: type, ndim: int = 3) -> Case:
    return CASES[base_name(cls)][ndim]


def select(keep: Callable[[type], bool], dims: tuple[int, ...] = (3, 2)) -> pytest.MarkDecorator:
    """Parametrise over the public classes to keep, in 3D and 2D."""
    chosen = [(cls, n) for cls in CLASSES.values() if keep(cls) for n in CASES.get(base_name(cls), {}) if n in dims]
    return pytest.mark.parametrize("cls, ndim", chosen, ids=[f"{c.__name__}-{n}D" for c, n in chosen])


def is_dictionary(cls: type) -> bool:
    return issubclass(cls, MapTransform)


def is_random(cls: type) -> bool:
    return issubclass(cls, Randomizable)


every = select(lambda cls: True)
dictionary_only = select(is_dictionary)
random_only = select(is_random)
random_dictionary_only = select(lambda cls: is_random(cls) and is_dictionary(cls))


def arguments_of(cls: type, case: Case) -> dict[str, Any]:
    return {**case.args, **case.dictionary_args} if is_dictionary(cls) else case.args


def build(cls: type, case: Case, keys: Any = "image", inner: bool = False, **more: Any) -> Any:
    args = ConfigParser(copy.deepcopy(arguments_of(cls, case))).get_parsed_content()
    args = {**args, **(case.inner if inner else {}), **more}
    return cls(keys, **args) if is_dictionary(cls) else cls(**args)


def image(case: Case, channels: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every voxel has a value of its own, up to 255."""
    size = channels * int(np.prod(case.spatial))
    return (torch.arange(size) % 256).reshape(channels, *case.spatial).to(dtype)


def run(transform: Any, img: Any, case: Case, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What the transform wrote, by key; for the array form by the suffixes of the tracked keys."""
    if isinstance(transform, MapTransform):
        out = transform({"image": img, **case.extra()}, **kwargs)
        return {key: out[key] for key in written(case)}
    results = transform(img, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    names = [*(f"image{suffix}" for suffix in case.tracked), *case.returned]
    assert len(results) == len(names)
    return dict(zip(names, results))


def written(case: Case, key: str = "image") -> list[str]:
    return [*(f"{key}{suffix}" for suffix in case.tracked + case.plain), *case.labels]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(params=[True, False], ids=["tracked", "untracked"])
def tracking(request: pytest.FixtureRequest) -> Iterator[bool]:
    set_track_meta(request.param)
    yield request.param
    set_track_meta(True)


# ---- the table and the names


def test_every_transform_has_a_case() -> None:
    assert {base_name(cls) for cls in CLASSES.values()} == set(CASES), "add an entry to CASES"
    assert all(set(cases) == {2, 3} for name, cases in CASES.items() if name.startswith("Rand") and name not in ONLY_3D)


def test_names() -> None:
    for name, cls in DICTIONARY.items():
        assert name.endswith("d")
        assert PUBLIC[name[:-1] + "D"] is PUBLIC[name[:-1] + "Dict"] is cls
    assert all(issubclass(cls, Transform) for cls in PUBLIC.values())
    aliases = {n[:-1] + suffix for n in DICTIONARY for suffix in ("D", "Dict")}
    assert set(PUBLIC) == set(CLASSES) | aliases
    for name, cls in CLASSES.items():
        assert name.startswith("Rand") == issubclass(cls, RandomizableTrait)
        assert cls.__doc__
        assert "(C, " in cls.__doc__, "the docstring states shapes"
        if name.startswith("Rand"):
            assert cls.backend
            assert "arXiv" in cls.__doc__, "the docstring names the source"


@every
def test_built_by_short_name_from_json(cls: type, ndim: int) -> None:
    arguments = arguments_of(cls, case_of(cls, ndim))
    arguments = {"keys": ["image"], **arguments} if is_dictionary(cls) else arguments
    config = json.loads(json.dumps({"imports": ["$import monai_ssl"], "it": {"_target_": cls.__name__, **arguments}}))
    assert type(ConfigParser(config).get_parsed_content("it")) is cls


# ---- types, channels, dimensions


@every
@pytest.mark.parametrize("channels", [1, 3])
def test_types(cls: type, ndim: int, channels: int, tracking: bool) -> None:
    case = case_of(cls, ndim)
    if base_name(cls) in NEEDS_META and not tracking:
        pytest.skip("there is no affine to write without meta tracking")
    img = image(case, channels)
    results = []
    for given in (img, img.numpy(), MetaTensor(img)):
        transform = build(cls, case)
        if is_random(cls):
            transform.set_random_state(seed=0)
        results.append(run(transform, given, case))
    for result in results:
        assert equal(result, results[0])
        for key, value in result.items():
            expected = MetaTensor if tracking and key in {f"image{s}" for s in case.tracked} else torch.Tensor
            assert type(value) is expected


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(cls: type, ndim: int, dtype: torch.dtype) -> None:
    case = case_of(cls, ndim)
    for result in (run(build(cls, case), image(case, dtype=dtype), case),):
        assert all(result[f"image{suffix}"].dtype == (case.dtype or dtype) for suffix in case.tracked)


# ---- what is left alone


@every
@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_input_untouched_and_no_memory_shared(cls: type, ndim: int, kind: str) -> None:
    case = case_of(cls, ndim)
    img: Any = image(case)
    if kind == "numpy":
        img = img.numpy()
    elif kind == "meta":
        img = MetaTensor(img, affine=AFFINE.clone(), meta={"filename_or_obj": "a.nii.gz", "list": [1, 2]})
        img.push_applied_operation({"class": "Other", "id": 7})
    before = copy.deepcopy(img)
    for value in run(build(cls, case, inner=is_random(cls)), img, case).values():
        value.zero_()
        if isinstance(value, MetaTensor):
            value.affine.zero_()
            value.meta["filename_or_obj"] = None
            value.meta.get("list", []).clear()
            value.applied_operations.clear()
    assert torch.equal(torch.as_tensor(img), torch.as_tensor(before))
    if kind == "meta":
        assert torch.equal(img.affine, AFFINE)
        assert (img.meta["filename_or_obj"], img.meta["list"]) == ("a.nii.gz", [1, 2])
        assert img.applied_operations == before.applied_operations


@dictionary_only
def test_other_keys_untouched(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    others = {"name": "a.nii.gz", "subject": 3, "array": np.arange(4), "tensor": torch.arange(5)}
    item = {"image": image(case), **others, **case.extra()}
    keys = set(item)
    out = build(cls, case)(item)
    assert set(item) == keys
    assert set(out) == keys | set(written(case))
    assert all(out[key] is value for key, value in others.items())
    assert np.array_equal(others["array"], np.arange(4))
    assert torch.equal(others["tensor"], torch.arange(5))


@dictionary_only
def test_missing_keys(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    item = {"image": image(case), **case.extra()}
    with pytest.raises(KeyError):
        build(cls, case, keys=["image", "absent"])(item)
    assert "absent" not in build(cls, case, keys=["image", "absent"], allow_missing_keys=True)(item)
    extra = case.extra()
    untouched = build(cls, case, keys="absent", allow_missing_keys=True)(extra)
    assert untouched.keys() == extra.keys()


# ---- randomness


@random_dictionary_only
def test_one_draw_for_all_keys_equal_to_the_array_form(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    array_cls = CLASSES.get(base_name(cls))
    transform = build(cls, case, keys=["image", "pet"], inner=True).set_random_state(seed=3)
    out = transform({"image": image(case), "pet": image(case), **case.extra()})
    for one, other in zip(written(case, "image"), written(case, "pet")):
        assert torch.equal(out[one], out[other])
    if array_cls is not None:
        alone = run(build(array_cls, case, inner=True).set_random_state(seed=3), image(case), case)
        assert all(torch.equal(out[key], value) for key, value in alone.items())


@random_only
@pytest.mark.parametrize("inner", [False, True])
def test_seed(cls: type, ndim: int, inner: bool) -> None:
    case = case_of(cls, ndim)
    transform = build(cls, case, inner=inner)
    assert transform.set_random_state(seed=5) is transform
    first = [run(transform, image(case), case) for _ in range(3)]
    again = build(cls, case, inner=inner).set_random_state(state=np.random.RandomState(5))
    assert all(equal(run(again, image(case), case), result) for result in first)
    assert not equal(first[0], first[1])
    assert not equal(run(transform.set_random_state(seed=6), image(case), case), first[0])


@random_only
def test_seeded_by_compose(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    item = {"image": image(case), **case.extra()} if is_dictionary(cls) else image(case)
    results = []
    for _ in range(2):
        out = Compose([build(cls, case, inner=True)]).set_random_state(seed=8)(item)
        results.append(out["image"] if is_dictionary(cls) else out[0] if isinstance(out, (tuple, list)) else out)
    assert torch.equal(*results)


@random_only
def test_randomize_false_is_pure(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    transform = build(cls, case, inner=True).set_random_state(seed=5)
    seeded = transform.R.get_state()[1]
    first = run(transform, image(case), case)
    state = transform.R.get_state()[1:3]
    assert not np.array_equal(state[0], seeded), "draws come from its own R"
    repeats = [run(transform, image(case), case, randomize=False) for _ in range(2)]
    assert all(equal(result, first) for result in repeats)
    assert np.array_equal(transform.R.get_state()[1], state[0])
    assert transform.R.get_state()[2] == state[1]


@random_only
def test_copies_draw_alike(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    transform = build(cls, case, inner=True).set_random_state(seed=5)
    run(transform, image(case), case)
    copies = [pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)]
    expected = run(transform, image(case), case)
    assert all(equal(run(c, image(case), case), expected) for c in copies)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@select(lambda cls: is_random(cls) and is_dictionary(cls), dims=(3,))
def test_workers(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    items = [{"image": MetaTensor(image(case)), **case.extra()} for _ in range(4)]
    key = "image"
    views = []
    for num_workers in (0, 2, 3):
        dataset = KeyedDataset(Dataset(items, Compose([build(cls, case, inner=True)])), seed=1)
        views.append(torch.cat([batch[key] for batch in DataLoader(dataset, batch_size=1, num_workers=num_workers)]))
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    # a label may repeat by chance, the labels of eight items not
    loader = DataLoader(Dataset(4 * items, Compose([build(cls, case)])), batch_size=1, num_workers=2)
    unkeyed = [batch[key].as_tensor().numpy().tobytes() for batch in loader]
    assert unkeyed[::2] != unkeyed[1::2]  # two workers do not draw the same
    assert get_track_meta()


@random_dictionary_only
def test_cache_does_not_freeze_it(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    dataset = CacheDataset([{"image": image(case), **case.extra()}], Compose([build(cls, case)]), progress=False)
    dataset.transform.set_random_state(seed=0)
    assert len({dataset[0]["image"].numpy().tobytes() for _ in range(6)}) > 1


# ---- geometry, collation


@select(lambda cls: is_dictionary(cls) and any(case.views for case in CASES.get(base_name(cls), {}).values()))
def test_affine_maps_voxels_to_their_place(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    index = torch.stack(torch.meshgrid(*(torch.arange(s) for s in case.spatial), indexing="ij")).double()
    padded = torch.cat([index, torch.zeros(3 - ndim, *case.spatial), torch.ones(1, *case.spatial)])
    world = torch.einsum("ij,j...->i...", AFFINE, padded)[:3]
    out = build(cls, case)({"image": MetaTensor(world, affine=AFFINE), **case.extra()})
    count = 0
    for view, affine in case.views(out):
        index = torch.stack(torch.meshgrid(*(torch.arange(s) for s in view.shape[1:]), indexing="ij")).double()
        padded = torch.cat([index, torch.zeros(3 - ndim, *view.shape[1:]), torch.ones(1, *view.shape[1:])])
        torch.testing.assert_close(view, torch.einsum("ij,j...->i...", affine, padded)[:3].to(view))
        count += 1
    assert count


@every
def test_not_invertible(cls: type, ndim: int) -> None:
    assert not issubclass(cls, InvertibleTransform)  # one that is adds its round trip here


@dictionary_only
def test_collation(cls: type, ndim: int) -> None:
    case = case_of(cls, ndim)
    transform = build(cls, case)
    items = [transform({"image": MetaTensor(image(case), affine=AFFINE), **case.extra()}) for _ in range(2)]
    assert all(isinstance(item, list) == isinstance(transform, MultiSampleTrait) for item in items)
    batch = list_data_collate(items)
    for item, part in zip(items, decollate_batch(batch)):
        for key in written(case):
            assert torch.equal(torch.as_tensor(part[key]), item[key])  # a scalar comes back as a number
            if isinstance(item[key], MetaTensor):
                assert torch.equal(part[key].affine, item[key].affine)
