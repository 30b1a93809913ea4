# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from monai_ssl.data import (
    PHANTOM_PHASES,
    BadVolumesError,
    build_class_datalist,
    build_datalist,
    check_volumes,
    class_weights,
    phantom_phase,
    select_labelled,
    torso_phantom,
    write_phantom,
    write_phantom_phases,
)

pytestmark = pytest.mark.usefixtures("cache")
PARTS = ("training", "validation", "test")
NAMES = ["benign", "malign"]
Lists = dict[str, list[dict[str, Any]]]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def labels(result: Lists) -> dict[str, int]:
    return {item["name"]: item["label"] for part in PARTS for item in result[part]}


def table(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder


# ---- the three sources -----------------------------------------------------------------------------------------------


def test_table(tmp_path: Path) -> None:
    """Names, numbers, blanks, a byte-order mark, another column and a file that is not listed."""
    touch(tmp_path, "a.nii.gz", "deep/b.nii.gz", "c.nii.gz", "unlisted.nii.gz")
    table(tmp_path, "\ufefflabel, age,file\nmalign,3,a.nii.gz\n 1 ,4,deep/b.nii.gz\nbenign,5,./c.nii.gz\n")
    result = build_class_datalist(tmp_path, NAMES, val_fraction=0)
    assert labels(result) == {"a.nii.gz": 1, "deep/b.nii.gz": 1, "c.nii.gz": 0}
    assert result["training"][1]["image"] == str(tmp_path / "deep" / "b.nii.gz")


def test_table_comes_before_label_maps(tmp_path: Path) -> None:
    touch(tmp_path, "images/p1.nii.gz", "labels/p1.nii.gz", "images/p2.nii.gz", "labels/p2.nii.gz")
    table(tmp_path, "file,label\nimages/p1.nii.gz,0\nimages/p2.nii.gz,1\n")
    items = build_class_datalist(tmp_path, NAMES, val_fraction=0)["training"]
    assert [(item["label"], item["subject"]) for item in items] == [(0, "p1"), (1, "p2")]
    segmentation = build_datalist(tmp_path, val_fraction=0, with_labels=True)["training"]
    assert segmentation[0]["label"] == str(tmp_path / "labels" / "p1.nii.gz")


@pytest.mark.parametrize("named", [True, False])
def test_datalist_with_numbers_or_names(tmp_path: Path, named: bool) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in "abcd"))
    entry = lambda name, k: {"image": f"{name}.nii.gz", "label": NAMES[k] if named else k}
    content = {"training": [entry("a", 0), entry("b", 1)], "validation": [entry("c", 1)], "test": ["d.nii.gz"]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    result = build_class_datalist(tmp_path / "list.json", NAMES, val_fraction=0.5)
    assert [len(result[part]) for part in PARTS] == [2, 1, 0]  # its own validation part; a test part without labels
    assert labels(result) == {"a.nii.gz": 0, "b.nii.gz": 1, "c.nii.gz": 1}


def test_a_folder_per_class(tmp_path: Path) -> None:
    """Equal names below two classes may be one patient, so that they are one subject."""
    touch(tmp_path, "benign/p1/ct.nii.gz", "benign/p1/mr.nii.gz", "benign/p2/ct.nii.gz", "malign/p1/ct.nii.gz")
    items = build_class_datalist(tmp_path, NAMES, val_fraction=0)["training"]
    assert [(item["name"], item["label"], item["subject"]) for item in items] == [
        ("benign/p1/ct.nii.gz", 0, "p1"),
        ("benign/p1/mr.nii.gz", 0, "p1"),
        ("benign/p2/ct.nii.gz", 0, "p2"),
        ("malign/p1/ct.nii.gz", 1, "p1"),
    ]


def test_phantom(tmp_path: Path) -> None:
    """Its class is the phase of contrast, in a table that is added to a folder without touching it."""
    folder = write_phantom(tmp_path / "phantom", 6, (8, 7, 6), seed=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert write_phantom_phases(folder) == folder
    assert {path: path.read_bytes() for path in before} == before
    rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
    assert rows[2] == {"file": "images/subject_002.nii.gz", "label": phantom_phase(2, seed=1)}
    assert write_phantom(folder, 6, (8, 7, 6), seed=1) == folder  # still the same phantom
    phantom = {"num_subjects": 12, "size": (4, 4, 4)}
    result = build_class_datalist("", PHANTOM_PHASES, val_fraction=0.2, phantom=phantom)
    assert Counter(labels(result).values()) == {0: 2, 1: 4, 2: 6}
    for part in PARTS[:2]:
        assert {item["label"] for item in result[part]} == {0, 1, 2}


def test_phase_can_be_seen() -> None:
    """In the aorta, whose label the phantom has: about 42 HU plain, more than 200 arterial, between them venous."""
    for subject in range(9):
        volume = torso_phantom(subject, (48, 40, 48))
        aorta = np.median(volume.image[volume.label == 5])
        assert phantom_phase(subject) == ("plain" if aorta < 80 else "venous" if aorta < 190 else "arterial"), aorta
    for name in ("subject", "seed"):
        with pytest.raises(ValueError, match=name):
            phantom_phase(**{"subject": 0, name: -1})


# ---- the split and the draw ------------------------------------------------------------------------------------------


def population(folder: Path, *counts: int) -> Path:
    """So many subjects of each class, with two volumes each."""
    files = [
        (f"c{k}p{n:02d}/{scan}.nii.gz", k) for k, count in enumerate(counts) for n in range(count) for scan in "ab"
    ]
    touch(folder, *(name for name, _ in files))
    return table(folder, "file,label\n" + "".join(f"{name},{k}\n" for name, k in files))


def test_split_by_subject_and_class(tmp_path: Path) -> None:
    split = lambda seed: build_class_datalist(population(tmp_path, 20, 5, 1), "abc", 0.1, 0.2, seed)
    with pytest.raises(ValueError, match="class_names"):
        split(0)  # a string is no list of names
    split = lambda seed: build_class_datalist(population(tmp_path, 20, 5, 1), ["a", "b", "c"], 0.1, 0.2, seed)
    result = split(0)
    counts = {part: Counter(item["label"] for item in result[part]) for part in PARTS}
    # of 20: 14, 2 and 4 subjects; of 5: 3, 1 and 1; the only one of its class is for training
    assert counts == {"training": {0: 28, 1: 6, 2: 2}, "validation": {0: 4, 1: 2}, "test": {0: 8, 1: 2}}
    subjects = [{item["subject"] for item in result[part]} for part in PARTS]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 26
    assert split(0) == result
    assert split(1) != result


def test_few_subjects_of_a_class(tmp_path: Path) -> None:
    """Training comes first, then validation, then the test part."""
    result = build_class_datalist(population(tmp_path, 2, 3), NAMES, 0.1, 0.1)
    counts = [Counter(item["label"] for item in result[part]) for part in PARTS]
    assert counts == [{0: 2, 1: 2}, {0: 2, 1: 2}, {1: 2}]
    with pytest.raises(ValueError, match="2 subjects cannot be split"):
        build_class_datalist(population(tmp_path / "two", 1, 1), NAMES, 0.1)


def test_subjects_of_two_classes_are_split_by_themselves(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/p{n}.nii.gz" for name in NAMES for n in range(4)))
    result = build_class_datalist(tmp_path, NAMES, 0.25)
    assert [len(result[part]) for part in PARTS] == [6, 2, 0]
    assert len({item["subject"] for item in result["validation"]}) == 1


def test_draws_hold_every_class_and_are_nested() -> None:
    items = [{"name": str(n), "label": 0 if n < 24 else 1 if n < 30 else 2} for n in range(32)]
    draws = {count: select_labelled(items, count, seed=4, by_class=True) for count in range(3, 33)}
    for count, draw in draws.items():
        assert {item["label"] for item in draw} == {0, 1, 2}
        assert draw == draws[32][:count]
    half = Counter(item["label"] for item in select_labelled(items, 0.5, seed=4, by_class=True))
    assert half[0] == 12 - (half[1] - 3) - (half[2] - 1)
    assert abs(half[1] - 3) <= 1
    assert select_labelled(items, 5, seed=5, by_class=True) != draws[5]


# ---- weights ---------------------------------------------------------------------------------------------------------


def of_classes(*counts: int) -> list[dict[str, int]]:
    return [{"label": k} for k, count in enumerate(counts) for _ in range(count)]


def test_balanced_weights_by_hand() -> None:
    """8 volumes of 2 classes, 6 and 2 of them: 8 / (2 * 6) and 8 / (2 * 2)."""
    items = of_classes(6, 2)
    weights = class_weights(items, NAMES)
    assert weights is not None
    assert weights.tolist() == pytest.approx([2 / 3, 2.0])
    assert (6 * weights[0]).item() == pytest.approx((2 * weights[1]).item())  # each class counts the same
    assert weights[[item["label"] for item in items]].mean().item() == pytest.approx(1)  # the step size stays


def test_other_weights(caplog: pytest.LogCaptureFixture) -> None:
    given = class_weights(of_classes(1, 1), NAMES, [1, 3])
    assert given is not None
    assert given.tolist() == [1, 3]
    assert class_weights(of_classes(1, 1), NAMES, "none") is class_weights(of_classes(1, 1), NAMES, None) is None
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        class_weights(of_classes(4, 0), NAMES, "none")
    assert "none of them of class malign" in caplog.text
    for wrong in ("inverse", [1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="balanced, none or 2 positive numbers"):
            class_weights(of_classes(1, 1), NAMES, wrong)


def test_a_class_that_is_missing_from_training() -> None:
    with pytest.raises(ValueError, match=r"4 volumes for training, none of them of class malign: raise num_labelled"):
        class_weights(of_classes(4, 0), NAMES)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of pictures, three formats, all of 6 x 5 voxels."""
    state = np.random.RandomState(0)
    for folder in NAMES:
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("p1.png", "p2.jpg", "p3.nii.gz"):
            voxels, file = (
                state.randint(1, 255, (6, 5)).astype(np.uint8),
                tmp_path / "data" / folder / f"{folder}{name}",
            )
            if name.endswith(".gz"):
                nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 3, 1, 1])), file)
            else:
                Image.fromarray(voxels.T).save(file)
    return tmp_path / "data"


def test_pictures_are_found_in_2d_only(pictures: Path) -> None:
    result = build_class_datalist(pictures, NAMES, val_fraction=0.3, spatial_dims=2)
    assert sorted(labels(result)) == sorted(
        f"{n}/{n}{name}" for n in NAMES for name in ("p1.png", "p2.jpg", "p3.nii.gz")
    )
    assert {item["subject"] for item in result["validation"]} < {f"{n}p{k}" for n in NAMES for k in (1, 2, 3)}
    assert len(build_class_datalist(pictures, NAMES, val_fraction=0)["training"]) == 2
    assert len(build_datalist(pictures, val_fraction=0, spatial_dims=2)["training"]) == 6


def test_pictures_are_checked_as_pictures(pictures: Path, write_volume: Callable[..., Path]) -> None:
    items = build_class_datalist(pictures, NAMES, val_fraction=0, spatial_dims=2)["training"]
    assert check_volumes(items, spatial_dims=2, min_size=(6, 5), progress=False) is items
    with pytest.raises(BadVolumesError, match=r"too small: 6 x 5 voxels, 7 x 5 needed"):
        check_volumes(items, spatial_dims=2, min_size=(7, 5), progress=False)
    with pytest.raises(BadVolumesError, match=r"1 of 1 .*(?s:.*)too small: 11 x 13 voxels at 1 x 1 mm, 12 x 13 needed"):
        check_volumes(items[2:3], spatial_dims=2, min_size=(12, 13), pixdim=1, progress=False)
    with pytest.raises(BadVolumesError, match="2D only: 6 x 5 voxels"):
        check_volumes(items, progress=False)
    with pytest.raises(BadVolumesError, match="3D: 5 x 6 x 7 voxels, but spatial_dims is 2"):
        check_volumes([{"image": str(write_volume("v.nii.gz"))}], spatial_dims=2, progress=False)
    label = write_volume("label.nii.gz", np.zeros((5, 5), np.uint8))
    with pytest.raises(BadVolumesError, match="label of 5 x 5 voxels on an image of 6 x 5"):
        check_volumes([{**items[2], "label": str(label)}], ("image", "label"), spatial_dims=2, progress=False)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,label\na.nii.gz,2\nb.nii.gz,0\n", r"1 of 2 labels are none of .*numbers 0 to 1: a\.nii\.gz \('2'\)"),
        ("file,label\na.nii.gz,malignant\nb.nii.gz,0\n", r"a\.nii\.gz \('malignant'\).*set class_names.* 0, malignant"),
        ("file,label\na.nii.gz,-1\nb.nii.gz,1.0\n", r"2 of 2 labels are none of"),
        ("file,label\na.nii.gz,\nb.nii.gz,0\n", r"1 of 2 volumes have no label: a\.nii\.gz.*labels\.csv"),
        ("file,label\na.nii.gz\nb.nii.gz,0\n", r"1 of 2 volumes have no label: a\.nii\.gz"),
        ("file,label\na.nii.gz,0\ngone.nii.gz,1\n", r"labels\.csv lists 1 files that do not exist: .*gone\.nii\.gz"),
        ("file,label\na.nii.gz,0\na.nii.gz,1\n", r"labels\.csv: several rows for a\.nii\.gz"),
        ("file,label\n,0\n", r"labels\.csv: a row names no file"),
        (
            "file;label\na.nii.gz;0\n",
            r"labels\.csv needs the columns file,label in its first line, which is 'file;label'",
        ),
        ("", r"labels\.csv needs the columns file,label"),
        ("file,label\n", "no volumes found"),
    ],
)
def test_wrong_tables(tmp_path: Path, text: str, message: str) -> None:
    table(touch(tmp_path, "a.nii.gz", "b.nii.gz"), text)
    with pytest.raises(ValueError, match=message) as caught:
        build_class_datalist(tmp_path, NAMES, val_fraction=0)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "files, message",
    [
        (["a.nii.gz"], r"has no labels: add labels\.csv \(columns file,label\) or one subfolder per class"),
        (["images/a.nii.gz", "images/b.nii.gz"], r"2 of 2 labels are none of class_names .*images/a\.nii\.gz"),
        ([], "no volumes found"),
    ],
)
def test_folders_without_labels(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_class_datalist(touch(tmp_path, *files), NAMES, val_fraction=0)


def test_a_datalist_of_label_maps_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "seg.nii.gz")
    content = {"training": [{"image": "a.nii.gz", "label": "seg.nii.gz"}, {"image": "a.nii.gz", "label": True}]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 of 2 labels are none of class_names .*'seg\.nii\.gz'.*True"):
        build_class_datalist(tmp_path, NAMES, val_fraction=0)


@pytest.mark.parametrize("names", ["ab", ["a"], [], ["a", "a"]])
def test_wrong_class_names(tmp_path: Path, names: Any) -> None:
    with pytest.raises(ValueError, match="class_names must be a list of two or more different names"):
        build_class_datalist(tmp_path, names)
