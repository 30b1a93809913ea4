# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged

from monai_ssl.data import PHANTOM_LABELS, build_datalist, phantom_dir, phantom_files, torso_phantom, write_phantom

ARGUMENTS = {"num_subjects": 3, "size": (20, 17, 13), "spacing": (18, 19, 30.5), "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("cache") / "deep" / "phantom", **ARGUMENTS, num_workers=2)


def test_files_are_the_volumes_and_read_back_with_the_same_affine(folder):
    items = load_decathlon_datalist(str(folder / "dataset.json"), data_list_key="training")
    assert [Path(item["image"]).name for item in items] == [f"subject_00{k}.nii.gz" for k in range(3)]
    for subject, item in enumerate(items):
        read = LoadImaged(("image", "label"))(item)
        ours = torso_phantom(subject, ARGUMENTS["size"], ARGUMENTS["spacing"], ARGUMENTS["seed"])
        for key, values in (("image", ours.image), ("label", ours.label)):
            assert np.array_equal(np.asarray(read[key]), values)
            assert np.allclose(read[key].affine, ours.affine, atol=1e-4)
            stored = nib.load(item[key])  # MONAI's reader may take either form of the affine
            assert np.allclose(stored.get_sform(), ours.affine, atol=1e-4)
            assert np.allclose(stored.get_qform(), ours.affine, atol=1e-4)
            assert read[key].meta["qform_code"] == read[key].meta["sform_code"] == 1
        assert read["image"].meta["bitpix"] == 16
        text = json.loads((folder / "landmarks" / f"subject_00{subject}.json").read_text())
        assert text["points"].keys() == ours.landmarks.keys()
        assert all(np.allclose(text["points"][name], point, atol=1e-3) for name, point in ours.landmarks.items())


def test_dataset_json_is_of_the_decathlon_form(folder):
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["modality"] == {"0": "CT"}
    assert dataset["labels"] == {str(value): name for name, value in PHANTOM_LABELS.items()}
    assert dataset["training"][1] == {
        "image": "./images/subject_001.nii.gz",
        "label": "./labels/subject_001.nii.gz",
    }
    assert (dataset["name"], dataset["numTraining"]) == ("torso phantom", 3)


def test_a_written_folder_is_reused_untouched(folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(phantom_files, "torso_phantom", lambda *_: pytest.fail("written again"))
    assert write_phantom(str(folder), **{**ARGUMENTS, "size": list(ARGUMENTS["size"])}, num_workers=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("change", [{"num_subjects": 2}, {"size": (20, 17, 14)}, {"spacing": None}, {"seed": 8}])
def test_a_folder_of_other_phantoms_is_refused(folder, change):
    with pytest.raises(FileExistsError, match=next(iter(change))) as caught:
        write_phantom(folder, **{**ARGUMENTS, **change})
    assert str(folder) in str(caught.value)
    assert "Choose another folder" in str(caught.value)


def test_a_folder_of_an_older_generator_is_refused(folder, monkeypatch):
    monkeypatch.setattr(phantom_files, "GENERATOR_VERSION", phantom_files.GENERATOR_VERSION + 1)
    with pytest.raises(FileExistsError, match="generator 'torso_phantom"):
        write_phantom(folder, **ARGUMENTS)


def test_a_folder_or_file_of_the_user_is_refused_and_left_alone(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"a patient")
    for place in (tmp_path, tmp_path / "scan.nii.gz"):
        with pytest.raises(FileExistsError, match="not a folder of phantoms"):
            write_phantom(place, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "made").mkdir()
    write_phantom(tmp_path / "made", num_subjects=1, size=4)
    assert (tmp_path / "made" / "images" / "subject_000.nii.gz").is_file()


@pytest.mark.parametrize("killed", [False, True])
def test_interrupted_writing_is_not_taken_as_complete(tmp_path, monkeypatch, killed):
    whole = phantom_files.torso_phantom

    def interrupted(subject: int, *rest: object) -> object:
        if subject == 1:
            raise KeyboardInterrupt
        return whole(subject, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(phantom_files, "torso_phantom", interrupted)
        if killed:  # no time to tidy up
            patch.setattr(phantom_files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(tmp_path / "phantom", 2, 4, num_workers=1)
    assert not (tmp_path / "phantom").exists()
    assert len(list(tmp_path.iterdir())) == killed
    write_phantom(tmp_path / "phantom", 2, 4)
    assert len(list((tmp_path / "phantom" / "images").iterdir())) == 2


def test_two_writers_at_once_leave_one_whole_folder(tmp_path, monkeypatch):
    together = threading.Barrier(2)
    write_all = phantom_files._write_all

    def write_and_wait(*arguments: object) -> None:
        write_all(*arguments)
        together.wait(timeout=60)  # both are done before the first renames

    monkeypatch.setattr(phantom_files, "_write_all", write_and_wait)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: write_phantom(tmp_path / "phantom", 2, 4, num_workers=1), range(2)))
    assert paths == [tmp_path / "phantom"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]
    assert len(list((tmp_path / "phantom" / "labels").iterdir())) == 2


def test_default_place_follows_the_arguments_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_SSL_CACHE", str(tmp_path / "here"))
    place = phantom_dir(**ARGUMENTS)
    assert place.parent == tmp_path / "here"
    assert place == phantom_dir(**{**ARGUMENTS, "size": list(ARGUMENTS["size"])}, num_workers=5)
    changes = ({"num_subjects": 4}, {"size": 20}, {"spacing": 2.0}, {"seed": 8})
    assert len({place, *(phantom_dir(**{**ARGUMENTS, **change}) for change in changes)}) == 5
    assert phantom_dir(size=(96, 80, 64)) == phantom_dir(spacing=(4, 4, 6))
    monkeypatch.setattr(phantom_files, "GENERATOR_VERSION", -1)
    assert phantom_dir(**ARGUMENTS) != place
    monkeypatch.delenv("MONAI_SSL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert phantom_dir().parent == tmp_path / ".cache" / "monai_ssl"


def test_datalist_without_a_dataset_is_the_phantom(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_SSL_CACHE", str(tmp_path))
    arguments = {"num_subjects": 4, "size": [6, 5, 4], "num_workers": 1}
    parts = build_datalist("", val_fraction=0.25, with_labels=True, phantom=arguments)
    items = parts["training"] + parts["validation"]
    assert (len(parts["training"]), len(parts["validation"])) == (3, 1)
    for item in items:
        read = LoadImaged(("image", "label"))(item)
        assert tuple(read["image"].shape) == tuple(read["label"].shape) == (6, 5, 4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_subjects", {"num_subjects": 0}),
        ("num_subjects", {"num_subjects": 2.0}),
        ("size", {"size": (4, 4)}),
        ("spacing", {"spacing": 0}),
        ("seed", {"seed": -1}),
        ("num_workers", {"num_workers": -1}),
    ],
)
def test_bad_arguments_are_named(tmp_path, name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        write_phantom(tmp_path / "phantom", **arguments)
    assert not list(tmp_path.iterdir())
