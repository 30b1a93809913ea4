# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from volumes import coordinate_volume

from monai_ssl.data import BadVolumesError, build_datalist, check_volumes
from monai_ssl.data import facts as facts_module
from monai_ssl.data.facts import collect_facts, volume_facts
from monai_ssl.data.faults import image_fault, label_fault

pytestmark = pytest.mark.usefixtures("cache")
Write = Callable[..., Path]


def items_of(*paths: Path) -> list[dict[str, Any]]:
    return [{"image": str(path), "name": path.name} for path in paths]


def reason_of(path: Path, **arguments: Any) -> str:
    with pytest.raises(BadVolumesError) as caught:
        check_volumes(items_of(path), progress=False, **arguments)
    return caught.value.faults[str(path)]


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "nhdr", "mha", "mhd"])
def test_good_volumes_of_every_format_pass(write_volume: Write, suffix: str) -> None:
    data = items_of(write_volume(f"good.{suffix}"))
    assert check_volumes(data, pixdim=1, min_size=(5, 11, 19), progress=False) is data  # 6 voxels of 2 mm: 11 of 1 mm


def test_dicom_series_pass(tmp_path: Path, write_dicom: Write) -> None:
    data = build_datalist(write_dicom("scans/p1").parent, val_fraction=0)
    assert check_volumes(data, min_size=(5, 6, 7), progress=False) is data
    assert "8 needed" in reason_of(tmp_path / "scans" / "p1", min_size=8)


ARRAYS = {
    "2d": (coordinate_volume()[:, :, 0], "2D only: 5 x 6 voxels"),
    "one slice": (coordinate_volume()[:, :1], "2D only: 5 x 1 x 7 voxels"),
    "nan": (np.where(coordinate_volume() > 650, np.nan, coordinate_volume()), "4 of 210 voxels are NaN or infinite"),
    "infinite": (np.where(coordinate_volume() > 650, -np.inf, coordinate_volume()), "4 of 210 voxels are NaN"),
    "all nan": (np.full((5, 6, 7), np.nan, np.float32), "210 of 210 voxels are NaN"),
    "constant": (np.full((5, 6, 7), -1024, np.float32), "constant"),
    "empty": (np.zeros((0, 6, 7), np.float32), "empty: no voxels"),
    "vectors": (np.random.RandomState(0).rand(5, 6, 7, 1, 3).astype(np.float32), "4 axes besides the channel"),
    "colour": (np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "cannot be read (TypeError"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_bad_contents(write_volume: Write, name: str) -> None:
    array, reason = ARRAYS[name]
    assert reason in reason_of(write_volume("bad.nii.gz", array))


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha"])
def test_truncated_files(write_volume: Write, suffix: str) -> None:
    path = write_volume(f"bad.{suffix}", np.random.RandomState(0).rand(5, 6, 7).astype(np.float32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert reason_of(path).startswith("cannot be read (")


@pytest.mark.parametrize("name", ["text.nii.gz", "text.nii", "text.nrrd", "text.mha"])
@pytest.mark.parametrize("content", ["", "these are not the voxels you are looking for\n" * 30])
def test_text_under_a_volume_name(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert reason_of(tmp_path / name).startswith("cannot be read (")


def test_wrong_suffix_and_absent_file(tmp_path: Path, write_volume: Write) -> None:
    write_volume("a.mha").rename(tmp_path / "a.nii.gz")
    assert "cannot be read" in reason_of(tmp_path / "a.nii.gz")
    assert "cannot be read (FileNotFoundError" in reason_of(tmp_path / "gone.nii.gz")


def test_detached_voxels_absent(tmp_path: Path, write_volume: Write) -> None:
    path = write_volume("a.mhd")
    check_volumes(items_of(path), progress=False)
    (tmp_path / "a.raw").unlink()
    assert "cannot be read" in reason_of(path)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_unusable_affine(value: float) -> None:
    facts = {"shape": [1, 5, 6, 7], "affine": np.diag([1, value, 1, 1]).tolist(), "nonfinite": 0, "constant": False}
    assert image_fault(facts) == "the affine is singular or not finite"


TURNED = np.array([[0, 0, 2.0, 3], [-1.5, 0, 0, 4], [0, 1.2, 0, 5], [0, 0, 0, 1]])
OBLIQUE = np.array([[0.9, -0.3, 0, 0], [0.3, 0.9, 0.1, 0], [0, -0.1, 2.5, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("affine", [np.diag([1.0, 2, 3, 1]), TURNED, OBLIQUE])
@pytest.mark.parametrize("pixdim", [None, 1.5, (0.7, 1.1, 4)])
def test_size_is_that_of_the_training_transforms(affine: np.ndarray, pixdim: Any) -> None:
    volume: Any = MetaTensor(torch.rand(1, 15, 16, 17), affine=torch.as_tensor(affine))
    volume = Orientation("RAS", labels=None)(volume)
    if pixdim is not None:
        volume = Spacing(pixdim)(volume)
    size = tuple(volume.shape[1:])
    facts = {"shape": [1, 15, 16, 17], "affine": affine.tolist(), "nonfinite": 0, "constant": False}
    assert image_fault(facts, pixdim, size) is None
    for axis in range(3):
        needed = tuple(n + (axis == i) for i, n in enumerate(size))
        assert "too small" in (image_fault(facts, pixdim, needed) or "")


def test_too_small_says_both_sizes_and_what_to_do(write_volume: Write) -> None:
    reason = reason_of(write_volume("a.nii.gz"), pixdim=(2, 2, 2), min_size=(3, 6, 32))
    assert reason == (
        "too small: 3 x 6 x 10 voxels at 2 x 2 x 2 mm (RAS), 3 x 6 x 32 needed: "
        "lower roi_size, num_partitions or pixdim, or pad with SpatialPadd"
    )


def test_size_of_other_orientations() -> None:
    """TURNED has the stored axes 2, 0, 1 along R, A, S: sizes are those of the axes that training sees."""
    facts = {"shape": [1, 15, 16, 3], "affine": TURNED.tolist(), "nonfinite": 0, "constant": False}
    sizes = {"RAS": (3, 15, 16), "SAR": (16, 15, 3), None: (15, 16, 3)}
    for axcodes, size in sizes.items():
        assert image_fault(facts, None, size, axcodes=axcodes) is None
        for axis in range(3):
            reason = image_fault(facts, None, [n + (axis == i) for i, n in enumerate(size)], axcodes=axcodes)
            assert reason is not None
            told = f"too small: {' x '.join(map(str, size))} voxels{f' ({axcodes})' if axcodes else ''}, "
            assert reason.startswith(told)


def test_number_of_channels_that_the_network_takes(write_volume: Write) -> None:
    series = np.stack([coordinate_volume()] * 2, axis=-1)
    path = write_volume("a.nii.gz", series)
    assert reason_of(path, in_channels=1) == "2 channels, where in_channels is 1"
    items = [{"image": str(path)}]
    assert check_volumes(items, in_channels=2, progress=False) == items


def test_stray_number_of_channels(write_volume: Write) -> None:
    series = np.stack([coordinate_volume()] * 4, axis=-1)
    usual = [write_volume(f"{n}.nii.gz") for n in range(3)]
    stray = write_volume("series.nii.gz", series)
    with pytest.raises(BadVolumesError) as caught:
        check_volumes(items_of(*usual, stray), progress=False)
    assert caught.value.faults == {str(stray): "4 channels, where 3 volumes have 1"}
    check_volumes(items_of(stray, write_volume("other.nii.gz", series)), progress=False)


FACTS = {
    "shape": [1, 5, 6, 7],
    "affine": np.diag([1.0, 2, 3, 1]).tolist(),
    "nonfinite": 0,
    "constant": False,
    "range": [0.0, 3.0],
}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"constant": True}, None),  # nothing of interest in this scan
        ({"shape": [1, 5, 6, 8]}, "label of 5 x 6 x 8 voxels on an image of 5 x 6 x 7"),
        ({"affine": np.diag([1.2, 2, 3, 1]).tolist()}, "0.8 mm off its image"),  # 4 voxels of 0.2 mm to the far corner
        ({"affine": np.diag([1.1, 2, 3, 1]).tolist()}, None),  # 0.4 mm, less than half a voxel
        ({"nonfinite": 3}, "3 voxels are NaN"),
        ({"error": "OSError: no"}, "cannot be read (OSError: no)"),
    ],
)
def test_label_faults(change: dict[str, Any], reason: str | None) -> None:
    fault = label_fault({**FACTS, **change}, FACTS)
    assert fault is None if reason is None else reason in (fault or "")


@pytest.mark.parametrize(
    "limits, reason",
    [
        ([0.0, 3.0], None),
        ([0.0, 4.0], "values from 0 to 4, where num_classes 4 allows 0 to 3"),
        ([-1.0, 3.0], "values from -1 to 3, where num_classes 4"),
    ],
)
def test_labels_of_too_many_classes(limits: list[float], reason: str | None) -> None:
    fault = label_fault({**FACTS, "range": limits}, FACTS, num_classes=4)
    assert fault is None if reason is None else reason in (fault or "")
    assert label_fault({**FACTS, "range": limits}, FACTS) is None


def test_labels_are_checked_with_their_images(write_volume: Write) -> None:
    item = {"image": str(write_volume("images/a.nii.gz")), "label": str(write_volume("labels/a.nii.gz"))}
    shifted = {**item, "label": str(write_volume("labels/b.nii.gz", affine=TURNED))}
    assert check_volumes([item], keys=("image", "label"), progress=False) == [item]
    check_volumes([shifted], progress=False)
    with pytest.raises(BadVolumesError, match=r"labels/b\.nii\.gz: label lies up to"):
        check_volumes([item, shifted], keys=("image", "label"), progress=False)
    with pytest.raises(BadVolumesError, match=r"labels/a\.nii\.gz: values from .* where num_classes 2 allows 0 to 1"):
        check_volumes([item], keys=("image", "label"), progress=False, num_classes=2)
    classes = [{**item, "label": 1}]
    assert check_volumes(classes, keys=("image", "label"), progress=False) is classes


def bad_dataset(write_volume: Write) -> tuple[dict[str, list[dict[str, Any]]], list[Path]]:
    good = [write_volume(f"good{n}.nii.gz", value=n) for n in range(4)]
    bad = [write_volume("flat.nii.gz", np.ones((5, 6, 7))), write_volume("slice.nii.gz", np.ones((5, 6)))]
    return {"training": items_of(*good[:3], *bad), "validation": items_of(good[3]), "test": []}, bad


def test_default_stops_with_one_report(write_volume: Write, tmp_path: Path) -> None:
    data, bad = bad_dataset(write_volume)
    with pytest.raises(BadVolumesError) as caught:
        check_volumes(data, report_dir=tmp_path / "models", progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 6 volumes cannot be used:"
    assert lines[1] == f"  {bad[0]}: constant: all voxels have the same value"
    assert lines[2] == f"  {bad[1]}: 2D only: 5 x 6 voxels"
    assert "--skip_bad true" in lines[3]
    assert not (tmp_path / "models").exists()


def test_skip_bad_goes_on_and_writes_the_list(write_volume: Write, tmp_path: Path) -> None:
    data, bad = bad_dataset(write_volume)
    report = tmp_path / "models" / "skipped_volumes.txt"
    with pytest.warns(UserWarning, match=r"2 of 6 volumes are left out: listed in .*skipped_volumes\.txt") as caught:
        kept = check_volumes(data, skip_bad=True, report_dir=report.parent, progress=False)
    assert len(caught) == 1
    assert kept == {**data, "training": data["training"][:3]}
    assert len(data["training"]) == 5
    assert [line.split("\t")[0] for line in report.read_text().splitlines()] == [str(path) for path in bad]
    assert report.read_text().splitlines()[1].split("\t")[1] == "2D only: 5 x 6 voxels"
    assert check_volumes(kept, skip_bad=True, report_dir=report.parent, progress=False) is kept
    assert not report.exists()  # no list of an earlier run beside a run that skipped nothing


def test_skip_bad_does_not_empty_a_part(write_volume: Write) -> None:
    data, _ = bad_dataset(write_volume)
    with pytest.raises(ValueError, match="no volume is left in validation"):
        check_volumes({**data, "validation": data["training"][3:]}, skip_bad=True, progress=False)


@pytest.mark.parametrize("spoil", [False, True])
def test_too_few_volumes_for_a_batch(write_volume: Write, tmp_path: Path, spoil: bool) -> None:
    items = [{"image": str(write_volume(f"{i}.nii.gz"))} for i in range(3)]
    data = {"training": items[:2], "validation": items[2:]}
    assert check_volumes(data, num_workers=0, min_training=2) is data
    if spoil:
        Path(items[0]["image"]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"too few, a whole batch needs \d: lower batch_size or val_fraction"):
        check_volumes(data, num_workers=0, skip_bad=spoil, report_dir=tmp_path, min_training=2 if spoil else 3)


def test_report_names_the_series_of_a_shared_folder(tmp_path: Path, write_dicom: Write) -> None:
    for number in range(2):
        write_dicom("scans/p1", f"1.2.826.0.{number}")
    data = build_datalist(tmp_path / "scans", val_fraction=0)
    with pytest.raises(BadVolumesError, match=r"  p1/1\.2\.826\.0\.1.* \(.*dicom.*\): too small"):
        check_volumes(data, min_size=9, progress=False)


def test_second_start_reads_only_what_changed(write_volume: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_volume(f"{n}.nii.gz", value=n) for n in range(3)]
    read: list[str] = []

    def counted(image: str) -> dict[str, Any]:
        read.append(image)
        return volume_facts(image)

    monkeypatch.setattr(facts_module, "volume_facts", counted)
    check_volumes(items_of(*paths), progress=False)
    assert read == [str(path) for path in paths]
    with pytest.raises(BadVolumesError):  # other settings judge the same facts
        check_volumes(items_of(*paths), min_size=9, progress=False)
    assert len(read) == 3
    write_volume("1.nii.gz", np.full((5, 6, 7), np.nan))
    assert "NaN" in reason_of(paths[1])
    assert read[3:] == [str(paths[1])]
    paths[1].write_text("broken for now")
    for _ in range(2):
        assert "cannot be read" in reason_of(paths[1])
    assert len(read) == 6  # a failure may have passed by the next start


def test_broken_memory_is_rebuilt(write_volume: Write, cache: Path) -> None:
    data = items_of(write_volume("a.nii.gz"))
    for content in ("", '{"half', "[1, 2]"):
        cache.mkdir(exist_ok=True)
        (cache / "checks.json").write_text(content)
        assert check_volumes(data, progress=False) is data
        assert len(json.loads((cache / "checks.json").read_text())) == 1


def test_unwritable_memory_is_no_error(write_volume: Write, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    data = items_of(write_volume("a.nii.gz"))
    assert check_volumes(data, progress=False) is data
    assert "cannot be remembered" in caplog.text


def test_concurrent_checks_leave_a_whole_memory(write_volume: Write, cache: Path) -> None:
    paths = [write_volume(f"{n}.nii.gz", value=n) for n in range(6)]
    threads = [threading.Thread(target=collect_facts, args=([str(path)], 0, False)) for path in paths for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(key) == 64 for key in json.loads((cache / "checks.json").read_text()))
    assert [path.name for path in cache.iterdir()] == ["checks.json"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_agree_and_leave_the_generator_alone(write_volume: Write, num_workers: int) -> None:
    data, bad = bad_dataset(write_volume)
    torch.manual_seed(0)
    with pytest.raises(BadVolumesError) as caught:
        check_volumes(data, num_workers=num_workers, progress=False)
    assert list(caught.value.faults) == [str(path) for path in bad]
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)  # else networks would start differently where volumes are remembered


def test_progress_bar_in_the_first_process_only(
    write_volume: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    check_volumes(items_of(write_volume("a.nii.gz")))
    assert "Checking volumes" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    check_volumes(items_of(write_volume("b.nii.gz")))
    assert "Checking volumes: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("folder, count", [("hippocampus", 130), ("openkbp", 72)])
def test_real_volumes_pass(test_data: Path, folder: str, count: int) -> None:
    data = build_datalist(test_data / folder, with_labels=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # on a machine with one core
        assert check_volumes(data, keys=("image", "label"), min_size=16, num_workers=2, progress=False) is data
    assert os.path.getsize(Path(os.environ["MONAI_SSL_CACHE"]) / "checks.json") > count * 100
