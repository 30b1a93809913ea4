# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.transforms import LoadImage

from monai_ssl.data import build_datalist, number_volumes, select_labelled
from monai_ssl.data.dicom import is_dicom_file, itk_loading

pytestmark = pytest.mark.usefixtures("cache")
PARTS = ("training", "validation", "test")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(result: dict[str, list[dict[str, Any]]]) -> list[str]:
    return sorted(item["name"] for part in PARTS for item in result[part])


def subjects(result: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    return {item["name"]: item["subject"] for part in PARTS for item in result[part]}


def test_every_format_at_any_depth_and_nothing_hidden(tmp_path: Path) -> None:
    volumes = ["a.nii", "b/c.nii.gz", "b/d/e.nrrd", "b/d/f/g.nhdr", "h.mha", "i.mhd", "J.NII.GZ"]
    others = ["i.raw", "b/._c.nii.gz", ".hidden/k.nii.gz", "notes.txt", "l.png", "b/m.nii.gz.part"]
    result = build_datalist(touch(tmp_path, *volumes, *others), val_fraction=0)
    assert [item["name"] for item in result["training"]] == sorted(volumes)
    assert result["training"][0] == {
        "image": str(tmp_path / "J.NII.GZ"),
        "name": "J.NII.GZ",
        "subject": "J",
    }
    assert result["validation"] == result["test"] == []


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "a.nii.gz", "deep/b.nii.gz")
    data = touch(tmp_path / "data", "c.nii.gz")
    (data / "linked.nii.gz").symlink_to(store / "a.nii.gz")
    (data / "folder").symlink_to(store / "deep")
    (data / "loop").symlink_to(data)
    result = build_datalist(data, val_fraction=0)
    assert names(result) == ["c.nii.gz", "folder/b.nii.gz", "linked.nii.gz"]
    assert result["training"][2]["image"] == str(data / "linked.nii.gz")


def test_relative_dataset_dir_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "scans/a.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert build_datalist("scans", val_fraction=0)["training"][0]["image"] == str(tmp_path / "scans" / "a.nii.gz")


@pytest.mark.parametrize("tr", ["", "Tr"])
def test_labels_are_matched_and_never_images(tmp_path: Path, tr: str) -> None:
    images = [f"images{tr}/{name}" for name in ("a_0000.nii.gz", "b.mha", "sub/c.nii.gz")]
    labels = [f"labels{tr}/{name}" for name in ("a.nii.gz", "b.nii.gz", "sub/c.nii.gz")]
    touch(tmp_path, *images, *labels)
    assert names(build_datalist(tmp_path, val_fraction=0)) == sorted(images)
    items = build_datalist(tmp_path, val_fraction=0, with_labels=True)["training"]
    assert {item["name"]: item["label"] for item in items} == {
        image: str(tmp_path / label) for image, label in zip(images, labels)
    }
    assert all("label" not in item for item in build_datalist(tmp_path, val_fraction=0)["training"])


def test_label_maps_in_a_plain_folder_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "p1/t1.nii.gz", "p1/p1_seg.nii.gz", "p2/t1.nii.gz", "p2/labels/t1.nii.gz", "p3/mask-study.nii.gz")
    with pytest.warns(UserWarning, match=r"label maps.*p1/p1_seg\.nii\.gz"):
        result = build_datalist(tmp_path, val_fraction=0)
    assert names(result) == ["p1/t1.nii.gz", "p2/t1.nii.gz", "p3/mask-study.nii.gz"]


def test_missing_label_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz")
    with pytest.raises(ValueError, match=r"1 of 2 volumes have no label: images/b\.nii\.gz"):
        build_datalist(tmp_path, with_labels=True)


def test_images_ts_is_the_test_part(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz")
    assert [item["name"] for item in build_datalist(tmp_path, val_fraction=0)["test"]] == ["imagesTs/b.nii.gz"]
    assert build_datalist(tmp_path, val_fraction=0, with_labels=True)["test"] == []


def test_nnunet_channels_are_one_subject(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/c1_0000.nii.gz", "imagesTr/c1_0001.nii.gz", "imagesTr/c2_0000.nii.gz", "imagesTr/d_7.nii")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "numTraining": 3}')  # nnU-Net's: no list
    assert set(subjects(build_datalist(tmp_path, val_fraction=0)).values()) == {"c1", "c2", "d_7"}


def test_decathlon_json(tmp_path: Path) -> None:
    pairs = [{"image": f"./imagesTr/h_{n}.nii.gz", "label": f"./labelsTr/h_{n}.nii.gz"} for n in range(4)]
    touch(tmp_path, *(path for pair in pairs for path in pair.values()), "imagesTs/t.nii.gz", "unlisted.nii.gz")
    content = {"training": pairs, "test": ["./imagesTs/t.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    result = build_datalist(tmp_path, val_fraction=0.25)
    assert [len(result[part]) for part in PARTS] == [3, 1, 1]
    assert subjects(result)["imagesTr/h_2.nii.gz"] == "h_2"
    labelled = build_datalist(tmp_path / "dataset.json", val_fraction=0.25, with_labels=True, test_fraction=0.25)
    assert [len(labelled[part]) for part in PARTS] == [2, 1, 1]  # the unlabelled test part gives way to a drawn one
    for item in labelled["training"]:
        assert item["label"] == item["image"].replace("images", "labels")


def test_own_validation_part_is_not_split_again(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.nii.gz" for n in "abcde"))
    content = {"training": ["a.nii.gz", "b.nii.gz"], "validation": [{"image": "c.nii.gz"}], "testing": ["d.nii.gz"]}
    file = tmp_path / "my_list.json"
    file.write_text(json.dumps(content))
    result = build_datalist(file, val_fraction=0.5)
    assert {part: [item["name"][0] for item in result[part]] for part in PARTS} == {
        "training": ["a", "b"],
        "validation": ["c"],
        "test": ["d"],
    }


def test_json_channels_and_class_labels(tmp_path: Path) -> None:
    touch(tmp_path, "t1.nii.gz", "t2.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {"training": [{"image": ["t1.nii.gz", "t2.nii.gz"], "label": 1}, {"image": "t1.nii.gz", "label": 0}]}
        )
    )
    items = build_datalist(tmp_path, val_fraction=0, with_labels=True)["training"]
    assert items[0]["image"] == [str(tmp_path / "t1.nii.gz"), str(tmp_path / "t2.nii.gz")]
    assert [item["label"] for item in items] == [1, 0]


@pytest.mark.parametrize("part", ["validation", "test", "testing"])
def test_held_out_volumes_alone(tmp_path: Path, part: str) -> None:
    file = touch(tmp_path, "a.nii.gz", "b.nii.gz") / "list.json"
    file.write_text(json.dumps({part: ["a.nii.gz", "b.nii.gz"]}))
    lists = build_datalist(file, val_fraction=0.2)
    assert {name: len(items) for name, items in lists.items() if items} == {part.removesuffix("ing"): 2}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"training": [f"x{n}.nii.gz" for n in range(7)]}, r"7 files that do not exist: .*x0\.nii\.gz.* and 2 more"),
        ({"train": ["a.nii.gz"]}, 'has no list "training"'),
        ({"training": [{"img": "a.nii.gz"}]}, r"training\[0\] has no path under"),
        ({"training": ["a.nii.gz"], "validation": ["a.nii.gz"]}, "is in training and in validation"),
        ({"training": []}, "no volumes found"),
        ("{training", "not valid JSON"),
    ],
)
def test_wrong_datalists(tmp_path: Path, content: Any, message: str) -> None:
    file = touch(tmp_path, "a.nii.gz") / "list.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build_datalist(file)


def test_absent_label_file_is_named(tmp_path: Path) -> None:
    file = touch(tmp_path, "a.nii.gz") / "list.json"
    file.write_text(json.dumps({"training": [{"image": "a.nii.gz", "label": "gone.nii.gz"}]}))
    assert len(build_datalist(file, val_fraction=0)["training"]) == 1
    with pytest.raises(ValueError, match=r"1 files that do not exist: .*gone\.nii\.gz"):
        build_datalist(file, val_fraction=0, with_labels=True)


@pytest.mark.parametrize(
    "files, message",
    [
        ([], r"no volumes found in .*supported: \.nii\.gz, .*DICOM"),
        (["a.png", "b.txt", "c.nii.gz.zip"], "no volumes found"),
        (["only.nii.gz"], "1 subjects cannot be split"),
    ],
)
def test_folders_without_enough_volumes(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_datalist(touch(tmp_path, *files))


def test_wrong_dataset_dir(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        build_datalist(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder nor a datalist"):
        build_datalist(touch(tmp_path, "a.nii.gz") / "a.nii.gz")


@pytest.mark.parametrize(
    "files, expected",
    [
        (["a.nii.gz", "b.nrrd"], ["a", "b"]),
        (["p1/x/ct.nii.gz", "p1/y/ct.nii.gz", "p2/ct.nii.gz"], ["p1", "p1", "p2"]),
        (["all/p1/ct.nii.gz", "all/p2/ct.nii.gz"], ["p1", "p2"]),  # the folder above all of them is no subject
        (["all/a.nii.gz", "all/b.nii.gz"], ["a", "b"]),
        (["raw/sub-01/ses-1/sub-01_T1w.nii.gz", "raw/sub-01_x.nii.gz"], ["sub-01", "sub-01"]),
        (["brain/images/a.nii.gz", "neck/images/a.nii.gz", "neck/images/p/b.nii.gz"], ["brain/a", "neck/a", "neck/p"]),
        (["images/p1/a.nii.gz", "images/p1/b.nii.gz", "images/p2/a.nii.gz"], ["p1", "p1", "p2"]),
    ],
)
def test_subject(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    result = build_datalist(touch(tmp_path, *files), val_fraction=0)
    assert [item["subject"] for item in result["training"]] == expected


def test_subject_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "P7_scan1.nii.gz", "P7_scan2.nii.gz", "P8_scan1.nii.gz")
    result = build_datalist(tmp_path, val_fraction=0.5, subject_pattern=r"(P\d+)_")
    assert subjects(result) == {"P7_scan1.nii.gz": "P7", "P7_scan2.nii.gz": "P7", "P8_scan1.nii.gz": "P8"}
    assert {item["subject"] for item in result["training"]}.isdisjoint(item["subject"] for item in result["validation"])
    for pattern in (r"(Q\d+)_", r"P\d+"):
        with pytest.raises(ValueError, match=re.escape(repr(pattern)) + r".*P7_scan1\.nii\.gz"):
            build_datalist(tmp_path, subject_pattern=pattern)


def test_split_is_by_subject_seeded_and_stable(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p{n:02d}/scan{m}.nii.gz" for n in range(20) for m in range(2)))
    first = build_datalist(tmp_path, val_fraction=0.1, test_fraction=0.2, seed=3)
    assert [len(first[part]) for part in PARTS] == [28, 4, 8]
    parts = [{item["subject"] for item in first[part]} for part in PARTS]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 20
    assert first == build_datalist(tmp_path, val_fraction=0.1, test_fraction=0.2, seed=3)
    assert first["validation"] == build_datalist(tmp_path, val_fraction=0.1, seed=3)["validation"]
    assert any(build_datalist(tmp_path, seed=seed)["validation"] != first["validation"] for seed in range(3))
    touch(tmp_path, "p20/scan0.nii.gz")
    grown = build_datalist(tmp_path, val_fraction=0.1, test_fraction=0.2, seed=3)
    part_of = [{item["name"]: part for part in PARTS for item in result[part]} for result in (first, grown)]
    moved = {os.path.dirname(name) for name, part in part_of[0].items() if part_of[1][name] != part}
    assert len(moved) <= 2  # one at each border, since the counts stay 2 and 4


@pytest.mark.parametrize(
    "shares, message", [((1.0, 0.0), "below 1"), ((-0.1, 0.0), "at least 0"), ((0.5, 0.5), "split")]
)
def test_wrong_shares(tmp_path: Path, shares: tuple[float, float], message: str) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    with pytest.raises(ValueError, match=message):
        build_datalist(tmp_path, *shares)


def test_small_share_still_validates(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    assert len(build_datalist(tmp_path, val_fraction=0.01)["validation"]) == 1


@pytest.mark.parametrize("suffix", [".dcm", "", ".17"])
def test_dicom_folder_is_one_volume(tmp_path: Path, write_dicom: Any, suffix: str) -> None:
    write_dicom("scans/p1/ct", suffix=suffix)
    touch(tmp_path, "scans/p1/ct/DICOMDIR", "scans/readme.txt", "scans/p2/x.nii.gz")
    items = build_datalist(tmp_path / "scans", val_fraction=0)["training"]
    assert [(item["name"], item["subject"]) for item in items] == [("p1/ct", "p1"), ("p2/x.nii.gz", "p2")]
    with itk_loading():
        volume = LoadImage(image_only=True)(items[0]["image"])
    assert volume.shape == (5, 6, 7)
    assert volume[3, 4, 5] == 543  # x + 10 y + 100 z: slices in order, although the file names run backwards
    np.testing.assert_allclose(np.abs(np.diag(volume.affine)), [1, 2, 3, 1])


def test_series_in_one_folder_are_volumes_of_one_subject(tmp_path: Path, write_dicom: Any, cache: Path) -> None:
    write_dicom("scans/p1", "1.2.826.0.1")
    write_dicom("scans/p1", "1.2.826.0.2", value=1000)
    write_dicom("scans/p2", "1.2.826.0.3", value=2000)
    for _ in range(2):  # the second start finds the links of the first
        result = build_datalist(tmp_path / "scans", val_fraction=0.5)
    items = sorted(result["training"] + result["validation"], key=lambda item: item["name"])
    assert [item["subject"] for item in items] == ["p1", "p1", "p2"]
    assert items[0]["name"].startswith("p1/1.2.826.0.1")
    with itk_loading():
        corners = [float(LoadImage(image_only=True)(item["image"])[0, 0, 0]) for item in items]
    assert corners == [0, 1000, 2000]
    assert Path(items[0]["image"]).is_relative_to(cache)
    assert items[2]["image"] == str(tmp_path / "scans" / "p2")


def test_series_of_a_single_folder_cannot_be_split(tmp_path: Path, write_dicom: Any) -> None:
    for number in range(2):
        write_dicom("scans", f"1.2.826.0.{number}")
    assert set(subjects(build_datalist(tmp_path / "scans", val_fraction=0)).values()) == {"scans"}
    with pytest.raises(ValueError, match="1 subjects cannot be split"):
        build_datalist(tmp_path / "scans", val_fraction=0.5)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("IM_0001", b"\0" * 128 + b"DICM", True),
        ("1.2.840.17", b"\0" * 128 + b"DICM", True),
        ("IM_0001", b"\0" * 132, False),
        ("a.DCM", b"", True),
        ("a.txt", b"\0" * 128 + b"DICM", False),
        ("DICOMDIR", b"\0" * 128 + b"DICM", False),
    ],
)
def test_what_is_dicom(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_dicom_file(tmp_path / name) == expected


@pytest.mark.parametrize("folder, count", [("hippocampus", 130), ("openkbp", 72)])
def test_real_volumes(test_data: Path, folder: str, count: int) -> None:
    result = build_datalist(test_data / folder, val_fraction=0.1, test_fraction=0.1, with_labels=True)
    assert sum(len(result[part]) for part in PARTS) == count
    assert len(set(names(result))) == len(set(subjects(result).values())) == count
    assert [len(result[part]) for part in PARTS[1:]] == [round(count * 0.1)] * 2
    assert all(Path(item["label"]).name == Path(item["image"]).name for part in PARTS for item in result[part])


def test_phantom_takes_the_same_way(tmp_path: Path) -> None:
    phantom = {"num_subjects": 3, "size": (16, 18, 20)}
    result = build_datalist("", val_fraction=0.34, with_labels=True, phantom=phantom)
    assert [len(result[part]) for part in PARTS] == [2, 1, 0]
    for item in result["training"]:
        assert Path(item["image"]).is_file()
        assert Path(item["label"]).is_file()


ITEMS = [{"name": f"{n}.nii.gz"} for n in range(20)]


def test_select_labelled_draws_are_nested() -> None:
    draws = [select_labelled(ITEMS, count, seed=1) for count in (2, 8, 0.5, 1.0)]
    assert [len(draw) for draw in draws] == [2, 8, 10, 20]
    assert draws[1][:2] == draws[0]
    assert draws[3][:10] == draws[2]
    assert select_labelled(ITEMS[::-1], 8, seed=1) == draws[1]
    assert select_labelled(ITEMS, 8, seed=2) != draws[1]
    assert len(select_labelled(ITEMS, 0.001, seed=0)) == 1


@pytest.mark.parametrize("number", [0, -1, 21, 0.0, 1.5, True, "2"])
def test_select_labelled_refuses(number: Any) -> None:
    with pytest.raises(ValueError, match="num_labelled"):
        select_labelled(ITEMS, number, seed=0)


def test_volumes_are_numbered(tmp_path: Path) -> None:
    """One number per scan over all parts, the same on every call; entries of one scan share it."""
    lists = build_datalist(touch(tmp_path, *(f"sub-{i}/ct.nii.gz" for i in range(9))), 0.3, 0.3)
    lists["training"].append(lists["training"][0])
    numbered = number_volumes(lists)
    assert numbered == number_volumes(lists)
    items = [item for part in PARTS for item in numbered[part]]
    assert sorted({item["volume"] for item in items}) == list(range(9))
    assert {item["volume"]: item["name"] for item in items}.keys() == set(range(9))
    assert numbered["training"][0]["volume"] == numbered["training"][-1]["volume"]
    assert [[{**item, "volume": None} for item in numbered[part]] for part in PARTS] == [
        [{**item, "volume": None} for item in lists[part]] for part in PARTS
    ]
    assert "volume" not in lists["training"][0]


def test_channels_in_several_files_are_one_volume() -> None:
    lists = {"training": [{"image": ["a/t1.nii", "a/t2.nii"]}, {"image": ["b/t1.nii", "b/t2.nii"]}]}
    assert [item["volume"] for item in number_volumes(lists)["training"]] == [0, 1]
    with pytest.raises(KeyError, match="scan"):
        number_volumes(lists, image_key="scan")
