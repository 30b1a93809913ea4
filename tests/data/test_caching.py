# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset, set_track_meta
from monai.transforms import (
    CastToTyped,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    MapTransform,
    Orientationd,
    RandLambdad,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    Spacingd,
)

from monai_ssl.data import DiskCacheDataset, KeyedDataset, cached_dataset
from monai_ssl.data.files import atomic_path

pytestmark = [
    pytest.mark.usefixtures("cache"),
    # torch 2.13 tensors with numpy 2: any spatial transform of MONAI on a NIfTI file
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
Write = Callable[..., Path]
MODES = ("memory", "disk", "none")


class Count(MapTransform):
    """Counts its calls in a file, so that pickles and other processes share the count."""

    def __init__(self, log: Path) -> None:
        super().__init__("image")
        self.log = str(log)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        with open(self.log, "a") as file:
            file.write("x")
        return dict(data)

    @property
    def calls(self) -> int:
        return os.path.getsize(self.log) if os.path.exists(self.log) else 0


class Put(MapTransform):
    """Adds a value under the key "extra"."""

    def __init__(self, value: Any) -> None:
        super().__init__("image")
        self.value = value

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "extra": self.value}


def shift_by_one(image: torch.Tensor) -> torch.Tensor:
    return image + 1


def load(a_max: float = 700.0) -> list[Any]:
    return [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="LPS", labels=None),
        Spacingd("image", pixdim=(1.0, 1.5, 3.0)),
        ScaleIntensityRanged("image", a_min=0, a_max=a_max, b_min=0, b_max=1),
    ]


def crop() -> Any:
    return RandSpatialCropd("image", roi_size=(3, 4, 5), random_size=False)


def items_of(*paths: Path) -> list[dict[str, Any]]:
    return [{"image": str(path), "name": path.name, "subject": "a"} for path in paths]


def make(cache: str, data: list[dict[str, Any]], transform: Any, **arguments: Any) -> Any:
    dataset = cached_dataset(data, transform, cache, **arguments)
    if cache == "memory":
        dataset.progress = False
    return dataset


def test_kinds(write_volume: Write, capsys: pytest.CaptureFixture[str]) -> None:
    data = items_of(write_volume("a.nii.gz"))
    kinds = [type(cached_dataset(data, Compose(load()), cache)) for cache in MODES]
    assert kinds == [CacheDataset, DiskCacheDataset, Dataset]
    assert issubclass(DiskCacheDataset, PersistentDataset)
    assert "Loading dataset: 100%" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cache must be one of memory, disk, none, got 'disc'"):
        cached_dataset(data, Compose(load()), "disc")


def test_three_modes_give_the_same_items(write_volume: Write) -> None:
    data = items_of(write_volume("a.nii.gz"), write_volume("b.mha", value=50))
    wholes = []
    for cache in MODES:
        dataset = KeyedDataset(make(cache, data, Compose([*load(), crop()])), seed=5)
        wholes.append([dataset[epoch, index] for _ in range(2) for epoch in range(3) for index in range(2)])
    for memory, disk, none in zip(*wholes):
        for item in (memory, disk, none):
            assert list(item) == ["image", "name", "subject"]
            assert isinstance(item["image"], MetaTensor)
            assert item["image"].shape == (1, 3, 4, 5)
            assert torch.equal(item["image"], none["image"])
            assert torch.equal(item["image"].affine, none["image"].affine)
            assert item["image"].meta.keys() == none["image"].meta.keys()
            assert item["name"] == none["name"]
    corners = [float(item["image"][0, 0, 0, 0]) for item in wholes[0]]
    assert corners[:6] == corners[6:]
    assert len(set(corners)) > 3  # the same view again, others in other epochs and of the other volume


@pytest.mark.parametrize("cache", MODES)
def test_affine_is_right_at_every_read(write_volume: Write, cache: str) -> None:
    data = items_of(write_volume("a.nii.gz"))
    dataset = make(cache, data, [LoadImaged("image"), EnsureChannelFirstd("image"), crop()])
    for epoch in range(4):
        view = KeyedDataset(dataset, seed=0)[epoch, 0]["image"]
        corner = view.affine[:3, 3] / torch.tensor([1.0, 2, 3])  # voxels of 1 x 2 x 3 mm, the file starts at 0 mm
        assert view[0, 0, 0, 0] == corner @ torch.tensor([1.0, 10, 100], dtype=torch.float64)
        assert len(view.applied_operations) == 1  # the crop
        assert "filename_or_obj" not in view.meta


@pytest.mark.parametrize("cache, calls", [("memory", 1), ("disk", 1), ("none", 3)])
def test_deterministic_part_runs_once(write_volume: Write, tmp_path: Path, cache: str, calls: int) -> None:
    count = Count(tmp_path / "calls")
    dataset = make(cache, items_of(write_volume("a.nii.gz")), [*load(), count, crop()])
    views = [dataset[0]["image"] for _ in range(3)]
    assert count.calls == calls
    assert not all(torch.equal(views[0], view) for view in views[1:]) or calls == 3  # the random part stays random


@pytest.mark.parametrize("cache", MODES)
def test_all_deterministic_or_all_random(write_volume: Write, cache: str) -> None:
    data = items_of(write_volume("a.nii.gz"))
    assert make(cache, data, load())[0]["image"].shape[0] == 1
    items = [make(cache, [{"image": torch.arange(7.0)[None]}], RandLambdad("image", torch.clone))[0]]
    assert torch.equal(items[0]["image"], torch.arange(7.0)[None])
    assert make(cache, data, Compose([Compose(load()), crop()]))[0]["image"].shape == (1, 3, 4, 5)  # nested


@pytest.mark.parametrize("cache", MODES)
def test_several_samples_per_item(write_volume: Write, cache: str) -> None:
    samples = RandSpatialCropSamplesd("image", roi_size=(3, 4, 5), num_samples=2, random_size=False)
    item = make(cache, items_of(write_volume("a.nii.gz")), [*load(), samples])[0]
    assert [sample["image"].shape for sample in item] == [(1, 3, 4, 5)] * 2


def test_disk_key_holds_every_parameter(write_volume: Write, cache: Path) -> None:
    data = items_of(write_volume("a.nii.gz"))
    tops = [float(cached_dataset(data, load(a_max), "disk")[0]["image"].max()) for a_max in (700.0, 1400.0, 700.0)]
    assert tops[0] == pytest.approx(654 / 700, abs=1e-5)
    assert tops[1] == pytest.approx(654 / 1400, abs=1e-5)
    assert tops[2] == tops[0]
    assert len(list((cache / "volumes").iterdir())) == 2


def test_disk_key_holds_the_file(write_volume: Write, cache: Path, tmp_path: Path) -> None:
    path = write_volume("a.nii.gz")
    dataset = make("disk", items_of(path), load(), cache_dir=tmp_path / "here")
    assert dataset[0]["image"].min() == 0
    write_volume("a.nii.gz", value=350)
    assert dataset[0]["image"].min() == 0.5
    assert len(list((tmp_path / "here").glob("*.pt"))) == 2
    assert not cache.exists()


def test_disk_key_holds_detached_voxels_and_dicom_slices(write_volume: Write, write_dicom: Write) -> None:
    from monai_ssl.data.dicom import itk_loading

    paths = [write_volume("a.mhd"), write_dicom("scan")]
    with itk_loading():
        dataset = make("disk", items_of(*paths), [LoadImaged("image"), EnsureChannelFirstd("image")])
        assert [float(dataset[index]["image"].min()) for index in range(2)] == [0, 0]
        header = paths[0].stat()
        write_volume("a.mhd", value=5)
        os.utime(paths[0], ns=(header.st_atime_ns, header.st_mtime_ns))  # only the voxels beside it are new
        write_dicom("scan", value=5)
        assert [float(dataset[index]["image"].min()) for index in range(2)] == [5, 5]


def test_disk_files_load_with_weights_only_and_name_no_patient(write_volume: Write, cache: Path) -> None:
    data = items_of(write_volume("PATIENT_0042.nii.gz"))
    dataset = make("disk", [{"image": data[0]["image"]}], [*load(), crop()])
    assert dataset[0]["image"].shape == (1, 3, 4, 5)
    (file,) = (cache / "volumes").iterdir()
    content = torch.load(file, weights_only=True)
    assert {key: type(value) for key, value in content.items()} == dict.fromkeys(content, torch.Tensor)
    assert b"PATIENT_0042" not in file.read_bytes()


def test_damaged_disk_file_is_replaced(write_volume: Write, cache: Path) -> None:
    dataset = make("disk", items_of(write_volume("a.nii.gz")), load())
    whole = dataset[0]["image"]
    (file,) = (cache / "volumes").iterdir()
    for content in (b"", b"nonsense" * 99, file.read_bytes()[:-40]):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="damaged and computed again"):
            assert torch.equal(dataset[0]["image"], whole)
        assert torch.equal(dataset[0]["image"], whole)


def test_failed_write_leaves_nothing(write_volume: Write, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make("disk", items_of(write_volume("a.nii.gz")), load())

    def full_disk(obj: Any, f: Path) -> None:
        Path(f).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        dataset[0]
    assert list((cache / "volumes").iterdir()) == []


def test_a_reader_keeps_its_file_while_it_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "entry.pt"
    file.write_text("old")
    with file.open() as reader:
        with atomic_path(file) as temporary:
            temporary.write_text("new")
            assert file.read_text() == "old"
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_values_that_cannot_be_stored_are_refused(write_volume: Write) -> None:
    data = items_of(write_volume("a.nii.gz"))
    dataset = make("disk", data, [*load(), Put(np.float64(0.5))])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"item a\.nii\.gz cannot be cached on disk.*DeleteItemsd"):
            dataset[0]
    stored = make("disk", data, [*load(), Put(np.arange(3))])
    assert [type(stored[0]["extra"]) for _ in range(2)] == [torch.Tensor] * 2


def test_lambda_in_the_deterministic_part(write_volume: Write) -> None:
    data = items_of(write_volume("a.nii.gz"))
    plus = [*load(), Lambdad("image", lambda image: image + 1)]
    with pytest.raises(ValueError, match=r"pickled .*replace a lambda by a function of a module.*'memory'"):
        make("disk", data, plus)
    named = make("disk", data, [*load(), Lambdad("image", shift_by_one)])
    assert torch.equal(named[0]["image"], make("memory", data, plus)[0]["image"])
    make("disk", data, [*load(), crop(), Lambdad("image", lambda image: image + 1)])[0]


def test_other_items_delete_nothing(write_volume: Write, cache: Path) -> None:
    dataset = make("disk", items_of(write_volume("a.nii.gz")), load())
    dataset[0]
    dataset.set_data(items_of(write_volume("b.nii.gz")))
    dataset[0]
    assert len(list((cache / "volumes").iterdir())) == 2


@pytest.mark.parametrize("cache", MODES)
def test_half_precision_halves_memory_and_disk(write_volume: Write, cache: str, tmp_path: Path) -> None:
    data = items_of(write_volume("a.nii.gz", np.random.RandomState(0).rand(24, 28, 32).astype(np.float32)))
    half = [*load(a_max=1), CastToTyped("image", dtype=torch.float16)]
    whole = [make(cache, data, steps, cache_dir=tmp_path / name) for steps, name in ((load(1), "full"), (half, "half"))]
    size = [dataset[0]["image"].nbytes for dataset in whole]
    assert size[1] * 2 == size[0]
    if cache == "memory":
        stored = [dataset._cache[0]["image"].untyped_storage().nbytes() for dataset in whole]
        assert stored == size
    if cache == "disk":
        files = [next((tmp_path / name).iterdir()).stat().st_size for name in ("full", "half")]
        assert files[0] - files[1] == pytest.approx(size[1], abs=512)
    views = []
    for steps in (load(1), half):
        dataset = KeyedDataset(make(cache, data, [*steps, crop(), CastToTyped("image", dtype=torch.float32)]), seed=1)
        views += [dataset[0]["image"], dataset[0]["image"]]
    assert all(view.dtype == torch.float32 for view in views)
    assert torch.equal(views[2], views[3])
    torch.testing.assert_close(views[2].as_tensor(), views[0].as_tensor(), atol=2**-11, rtol=0)


def test_cropped_volumes_do_not_keep_the_uncropped_memory() -> None:
    volume = torch.zeros(1, 40, 6, 7)
    volume[:, 10:14] = 1
    dataset = make("memory", [{"image": volume}], [CropForegroundd("image", source_key="image")])
    assert dataset._cache[0]["image"].untyped_storage().nbytes() == 4 * 6 * 7 * 4


@pytest.mark.parametrize("cache", MODES)
def test_without_meta_data(write_volume: Write, cache: str) -> None:
    data = items_of(write_volume("a.nii.gz"))
    steps = [LoadImaged("image"), EnsureChannelFirstd("image", channel_dim="no_channel")]
    make("disk", data, steps)[0]  # an entry with affine
    set_track_meta(False)
    try:
        item = make(cache, data, steps)[0]
        assert type(item["image"]) is torch.Tensor
        assert list(item) == ["image", "name", "subject"]
    finally:
        set_track_meta(True)


def read_all(data: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)  # threads of the parent do not outlive the fork; loaders do the same in their workers
    dataset = make("disk", data, load())
    for _ in range(3):
        assert [float(dataset[index]["image"].min()) for index in range(3)] == [0, 0.5, 1]


def test_processes_write_the_same_files_at_once(write_volume: Write, cache: Path) -> None:
    data = items_of(*(write_volume(f"{n}.nii.gz", value=350 * n) for n in range(3)))
    processes = [
        multiprocessing.get_context("fork").Process(target=read_all, args=(data,), daemon=True) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [file.suffix for file in (cache / "volumes").iterdir()] == [".pt"] * 3


SCRIPT = """
import sys
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd
from monai_ssl.data import cached_dataset
first = [LoadImaged("image"), EnsureChannelFirstd("image")]
steps = [*first, Orientationd("image", "RAS", labels=None), Spacingd("image", 1)]
cached_dataset([{"image": sys.argv[1], "name": "a"}], Compose(steps), "disk")[0]
"""


@pytest.mark.slow
def test_later_runs_find_the_files(write_volume: Write, cache: Path) -> None:
    path = str(write_volume("a.nii.gz"))
    for hash_seed in ("1", "2"):  # sets of strings are ordered differently in the two
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, "-c", SCRIPT, path], env=environment, check=True, timeout=300)
    assert len(list((cache / "volumes").iterdir())) == 1
