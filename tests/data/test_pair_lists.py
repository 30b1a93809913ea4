# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import Dataset

from monai_ssl.data import (
    PairDataset,
    held_out_pairs,
    known_pairs,
    paired_volumes,
    read_registration_pairs,
    registration_pairs,
)


def volumes(names: str, labels: str = "") -> list[dict[str, Any]]:
    return [
        {"image": f"{n}.nii.gz", "name": f"{n}.nii.gz"} | ({"label": f"{n}_l.nii"} if n in labels else {})
        for n in names
    ]


def named(pairs: list[dict[str, Any]]) -> list[str]:
    return [pair["name"] for pair in pairs]


def test_all_ordered_pairs_of_training_and_a_ring_of_the_others() -> None:
    pairs = registration_pairs({"training": volumes("abc"), "validation": volumes("de"), "test": volumes("fgh")})
    assert sorted(named(pairs["training"])) == ["a to b", "a to c", "b to a", "b to c", "c to a", "c to b"]
    assert named(pairs["validation"]) == ["d to e", "e to d"]
    assert named(pairs["test"]) == ["f to g", "g to h", "h to f"]
    assert pairs["test"][0] == {"moving": "f.nii.gz", "fixed": "g.nii.gz", "name": "f to g"}


def test_draw_depends_on_the_seed_alone_and_repeats_no_pair() -> None:
    data = {"training": volumes("abcdefg")}
    first, again, other = (registration_pairs(data, 20, seed)["training"] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(named(first))) == 20
    assert all(pair["moving"] != pair["fixed"] for pair in first)
    assert len(registration_pairs(data, 1000)["training"]) == 42


def test_labels_where_both_have_them() -> None:
    pairs = registration_pairs({"test": volumes("abc", labels="ab")})["test"]
    assert [("moving_label" in p, "fixed_label" in p) for p in pairs] == [(True, True), (False, False), (False, False)]
    assert pairs[0]["moving_label"] == "a_l.nii"


@pytest.mark.parametrize("count, empty", [(0, True), (1, True), (2, False)])
def test_a_part_with_too_few_volumes_has_no_pairs(count: int, empty: bool) -> None:
    assert (registration_pairs({"validation": volumes("abc"[:count])})["validation"] == []) is empty


def test_held_out_pairs_are_those_of_the_test_before_validation() -> None:
    parts: dict[str, Any] = {"training": [{"name": "t"}], "validation": [{"name": "v"}], "test": [{"name": "x"}]}
    assert held_out_pairs(parts) == parts["test"]
    assert held_out_pairs({**parts, "test": []}) == parts["validation"]
    for empty in ({**parts, "test": [], "validation": []}, {"training": parts["training"]}):
        with pytest.raises(ValueError, match=r"raise val_fraction\), or a file of pairs \(--pairs\)"):
            held_out_pairs(empty)


def test_what_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"a\.nii\.gz alone"):
        registration_pairs({"training": volumes("a")})
    with pytest.raises(ValueError, match="num_pairs"):
        registration_pairs({"training": volumes("ab")}, 0)


def write(folder: Path, content: Any) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "a_l.nii", "b_l.nii"):
        (folder / name).touch()
    file = folder / "pairs.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_file_of_pairs_is_relative_to_itself(tmp_path: Path) -> None:
    pair = {"moving": "a.nii.gz", "fixed": "b.nii.gz", "moving_label": "a_l.nii", "fixed_label": "b_l.nii"}
    points = {"moving_points": [[1, 2, 3]], "fixed_points": [[4, 5, 6]]}
    pairs = read_registration_pairs(write(tmp_path, {"training": [pair], "test": [{**pair, **points, "name": "x"}]}))
    assert pairs["training"][0]["moving"] == str(tmp_path / "a.nii.gz")
    assert pairs["training"][0]["name"] == "a to b"
    assert pairs["validation"] == []
    assert pairs["test"][0]["fixed_points"] == [[4, 5, 6]]
    assert pairs["test"][0]["name"] == "x"
    listed = read_registration_pairs(write(tmp_path, [pair]))
    assert listed["training"] == listed["validation"] == listed["test"]
    found = paired_volumes(listed)["test"]
    assert [(v["image"], v["label"]) for v in found] == [
        (str(tmp_path / f"{n}.nii.gz"), str(tmp_path / f"{n}_l.nii")) for n in "ab"
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("not JSON", "no JSON"),
        ([], "must hold a list"),
        ({"train": []}, "must hold a list"),
        ([{"moving": "a.nii.gz"}], "moving and fixed"),
        ([{"moving": "a.nii.gz", "fixed": "b.nii.gz", "mask": "c"}], "may have"),
        ([{"moving": "a.nii.gz", "fixed": "b.nii.gz", "moving_label": "a_l.nii"}], "one image alone"),
        ([{"moving": "a.nii.gz", "fixed": "b.nii.gz", "moving_points": [[0, 0, 0]]}], "same places"),
    ],
)
def test_what_is_wrong_with_a_file_of_pairs(content: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_registration_pairs(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, [{"moving": "a.nii.gz", "fixed": "nothing.nii.gz"}])
    with pytest.raises(FileNotFoundError, match=r"fixed .*nothing\.nii\.gz"):
        read_registration_pairs(file)


def test_pairs_of_volumes_that_were_left_out_go_too() -> None:
    pairs = registration_pairs({"test": volumes("abc")})
    left = known_pairs(pairs, {"test": volumes("ab")})
    assert named(left["test"]) == ["a to b"]


def test_items_are_pairs_of_volumes_which_load_once_each() -> None:
    data = volumes("abc")
    loaded = Dataset([{"image": torch.tensor(float(n))} for n in range(3)])
    pairs = registration_pairs({"test": data})["test"]
    dataset = PairDataset(loaded, data, pairs, lambda item: {**item, "sum": item["moving"] + 10 * item["fixed"]})
    assert [dataset[n]["sum"].item() for n in range(3)] == [10, 21, 2]
    assert dataset[2]["moving_file"] == "c.nii.gz"
    assert dataset[2]["fixed_file"] == "a.nii.gz"
    with pytest.raises(ValueError, match=r"not in data: .*c\.nii\.gz"):
        PairDataset(loaded, data[:2], pairs, lambda item: item)
