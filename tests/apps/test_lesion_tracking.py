# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from embedding_fields import GEOMETRY, PERMUTED, StridedNet, coordinate_image, ct, resnet

from monai_ssl.apps import PointMatcher, read_markups, read_pairs, track_lesions, write_markups
from monai_ssl.transforms.view_geometry import transform_points

SIZE = (30, 20, 50)
INDEX = torch.tensor([[15.0, 10, 25], [10, 8, 20], [19, 12, 31]], dtype=torch.float64)
RAS = transform_points(PERMUTED, INDEX)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans of three channels that show their own coordinates, the second one 4 mm to the right of the patient."""
    folder = tmp_path_factory.mktemp("scans")
    shift = torch.eye(4, dtype=torch.float64)
    shift[0, 3] = -4
    for name, shows in (("first", None), ("second", shift)):
        image = coordinate_image(PERMUTED, SIZE, shows)
        nib.save(nib.Nifti1Image(image.as_tensor().movedim(0, -1).numpy(), PERMUTED.numpy()), folder / f"{name}.nii")
    return folder


def matcher() -> PointMatcher:
    return PointMatcher(StridedNet(), GEOMETRY)


def pair(scans: Path, **others: Any) -> dict[str, Any]:
    files = {"source": str(scans / "first.nii"), "target": str(scans / "second.nii")}
    return {"id": "p1", **files, "points": RAS.tolist(), **others}


def shifted(points: torch.Tensor, x: float) -> torch.Tensor:
    return points + torch.tensor([x, 0, 0], dtype=torch.float64)


def test_files_read_back(scans: Path, tmp_path: Path) -> None:
    truth = shifted(RAS, 4).tolist()
    given = pair(scans, labels=["a", "b", "c"], truth=[truth[0], None, truth[2]], radius_mm=[0.001, 5, 8])
    rows = track_lesions(matcher(), [given], tmp_path / "out", min_score=0.5)
    assert [row["lesion"] for row in rows] == ["a", "b", "c"]
    found = torch.tensor([[row[f"target_{axis}"] for axis in "xyz"] for row in rows], dtype=torch.float64)
    assert (found - shifted(RAS, 4)).norm(dim=1).max() < 1.5
    assert all(0.9 < row["score"] <= 1 and row["accepted"] and row["cycle_error_mm"] < 1.5 for row in rows)
    assert rows[0]["distance_mm"] == pytest.approx(float((found[0] - torch.tensor(truth[0])).norm()), abs=1e-6)
    assert "distance_mm" not in rows[1]

    content = json.loads((tmp_path / "out" / "tracking.json").read_text())
    assert content["rows"] == rows
    assert content["space"] == "RAS"
    assert content["weights_sha256"] == matcher().weights_sha256
    summary = content["summary"]
    assert (summary["lesions"], summary["accepted"], summary["points"]) == (3, 3, 2)
    distances = [rows[0]["distance_mm"], rows[2]["distance_mm"]]
    assert summary["MED_mm"] == pytest.approx(sum(distances) / 2)
    assert (summary["CPM@10mm_plain"], summary["CPM@10mm_min_radius"], summary["CPM@Radius"]) == (1, 0.5, 0.5)

    with (tmp_path / "out" / "tracking.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert ",".join(table[0]) == (
        "pair,lesion,source,target,source_x,source_y,source_z,target_x,target_y,target_z,score,cycle_error_mm,accepted,"
        "truth_x,truth_y,truth_z,radius_mm,distance_mm"
    )
    for row, line in zip(rows, table):
        assert {key: str(value) for key, value in row.items()} == {key: line[key] for key in row}
    assert table[1]["truth_x"] == table[1]["distance_mm"] == ""

    for end, points in (("source", RAS), ("target", found)):
        marked, labels = read_markups(tmp_path / "out" / f"p1_{end}.mrk.json")
        torch.testing.assert_close(marked, points, atol=1e-9, rtol=0)
        assert labels == ["a", "b", "c"]
    markup = json.loads((tmp_path / "out" / "p1_target.mrk.json").read_text())["markups"][0]
    assert markup["coordinateSystem"] == "LPS"
    first = markup["controlPoints"][0]
    x, y, z = found[0].tolist()
    assert first["position"] == [-x, -y, z]
    assert float(first["description"]) == pytest.approx(rows[0]["score"], abs=1e-4)
    assert first["selected"] is True


def test_each_image_is_embedded_once(scans: Path, tmp_path: Path) -> None:
    points = matcher()
    copy = tmp_path / "copy.nii"
    copy.write_bytes((scans / "second.nii").read_bytes())
    chain = [pair(scans, id=str(k)) for k in range(3)]
    chain[0]["target"] = str(copy)  # not needed again, unlike the other scan of its pair
    chain[2]["source"], chain[2]["target"] = chain[2]["target"], chain[2]["source"]
    loads: list[Any] = []
    embedding, points.embedding = points.embedding, lambda image: loads.append(image) or embedding(image)  # type: ignore
    track_lesions(points, chain, tmp_path / "out")
    assert sum(isinstance(image, str) for image in loads) == 3
    assert points.network.calls == 2  # the copy is known by its content
    assert len(list((tmp_path / "out").glob("*.mrk.json"))) == 6


@pytest.mark.parametrize("space", ["RAS", "LPS", "voxel"])
def test_spaces_give_the_same_rows(scans: Path, tmp_path: Path, space: str) -> None:
    """Whatever the points are given in, tables are in RAS."""
    to = {"RAS": lambda p: p, "LPS": lambda p: p * torch.tensor([-1, -1, 1])}
    to["voxel"] = lambda p: transform_points(torch.linalg.inv(PERMUTED), p)
    given = {"points": to[space](RAS).tolist(), "truth": to[space](shifted(RAS, 4)).tolist(), "space": space}
    rows = track_lesions(matcher(), [pair(scans, **given)], tmp_path, cycle=False)
    for row, source in zip(rows, RAS.tolist()):
        assert [row[f"source_{axis}"] for axis in "xyz"] == pytest.approx(source, abs=1e-6)
        assert [row[f"truth_{axis}"] for axis in "xyz"] == pytest.approx([source[0] + 4, *source[1:]], abs=1e-6)
        assert row["distance_mm"] < 1.5
        assert row["cycle_error_mm"] is None


def test_json_and_csv_in(scans: Path, tmp_path: Path) -> None:
    """Files with paths relative to themselves; the table that tracking writes can be read again."""
    plain = pair(scans, labels=["a", "b", "c"], truth=shifted(RAS, 4).tolist(), radius_mm=7.5)
    rows = track_lesions(matcher(), [plain], tmp_path / "out")
    relative = {**plain, "source": "first.nii", "target": "second.nii"}
    (scans / "pairs.json").write_text(json.dumps([relative]))
    assert read_pairs(scans / "pairs.json") == read_pairs([plain])
    again = track_lesions(matcher(), scans / "pairs.json", tmp_path / "again")
    assert again == rows
    assert read_pairs(tmp_path / "out" / "tracking.csv") == read_pairs([plain])
    lines = [
        "source,target,source_x,source_y,source_z",
        *(f"first.nii,second.nii,{x},{y},{z}" for x, y, z in RAS.tolist()),
    ]
    (scans / "few.csv").write_text("\n".join(lines))
    few = read_pairs(scans / "few.csv")[0]
    assert few == {**read_pairs([pair(scans)])[0], "id": "1"}
    assert few["labels"] == ["1", "2", "3"]


def test_filters_are_kept_in_the_table(scans: Path, tmp_path: Path) -> None:
    rows = track_lesions(matcher(), [pair(scans)], tmp_path, min_score=1.0)
    assert not any(row["accepted"] for row in rows)
    content = json.loads((tmp_path / "p1_target.mrk.json").read_text())
    assert [point["selected"] for point in content["markups"][0]["controlPoints"]] == [False] * 3


FAULTS = [
    ({"points": [[1, 2]]}, r"pair p1: points must be \[\[x, y, z\]"),
    ({"points": [[1, 2, "x"]]}, r"pair p1: points holds 'x'"),
    ({"points": []}, "pair p1: no points"),
    ({"points": [[1.0, 2, float("nan")]]}, "pair p1: points holds nan"),
    ({"target": None}, r"pair p1: missing \['target'\]"),
    ({"label": "a"}, r"pair p1: missing \[\], unknown \['label'\]"),
    ({"labels": ["a"]}, "pair p1: labels must be a list of 3"),
    ({"truth": [[1, 2, 3]]}, "pair p1: truth must be a list of 3"),
    ({"radius_mm": [1, 2]}, "pair p1: radius_mm must be a list of 3"),
    ({"space": "ras"}, "pair p1: space must be one of RAS, LPS, voxel"),
    ({"id": "../p"}, "the id names files"),
    ({"points": [[0, 0, 0]], "space": "RAS"}, r"pair p1: points outside of their image, rows \[0\]"),
]


@pytest.mark.parametrize("change, message", FAULTS)
def test_faults_name_the_pair(scans: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        track_lesions(matcher(), [pair(scans, **change)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faults_of_files(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="appear more than once: p1"):
        read_pairs([pair(scans), pair(scans)])
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs([])
    with pytest.raises(FileNotFoundError, match=r"pair p1: .*absent.nii does not exist"):
        track_lesions(matcher(), [pair(scans, target="absent.nii")], tmp_path)
    (tmp_path / "a.json").write_text('{"id": 1}')
    with pytest.raises(ValueError, match=r"a.json must hold a list of pairs, got dict"):
        read_pairs(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("id,source")
    with pytest.raises(ValueError, match=r"b.json is no JSON file"):
        read_pairs(tmp_path / "b.json")
    (tmp_path / "c.csv").write_text("source,target,x,y,z\na,b,1,2,3\n")
    with pytest.raises(ValueError, match=r"c.csv lacks the columns source_x, source_y, source_z"):
        read_pairs(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("pair,source,target,source_x,source_y,source_z\np,a,b,1,2,3\np,a,c,1,2,3\n")
    with pytest.raises(ValueError, match="pair p have other scans"):
        read_pairs(tmp_path / "d.csv")
    with pytest.raises(OSError, match=r"none.json"):
        read_pairs(tmp_path / "none.json")
    picture = PointMatcher(resnet(2), lambda image: image)
    with pytest.raises(ValueError, match="tracked in volumes"):
        track_lesions(picture, [{"source": (flat := ct(size=(8, 8))), "target": flat, "points": [[1, 1, 1]]}], tmp_path)


def test_markups_by_hand(tmp_path: Path) -> None:
    """RAS (10, 20, 30) is stored as LPS (-10, -20, 30), with the entries of version 1.0.3 of the schema."""
    file = write_markups(tmp_path / "new" / "a.mrk.json", [[10, 20, 30]], ["lesion"], ["0.9"], [False])
    content = json.loads(file.read_text())
    assert content == {
        "@schema": "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
        "markups-schema-v1.0.3.json#",
        "markups": [
            {
                "type": "Fiducial",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "controlPoints": [
                    {
                        "id": "1",
                        "label": "lesion",
                        "description": "0.9",
                        "position": [-10.0, -20.0, 30.0],
                        "selected": False,
                        "positionStatus": "defined",
                    }
                ],
            }
        ],
    }
    assert read_markups(file)[0].tolist() == [[10, 20, 30]]
    content["markups"][0]["coordinateSystem"] = "RAS"
    content["markups"][0]["controlPoints"].append({"positionStatus": "undefined"})
    file.write_text(json.dumps(content))
    assert read_markups(file)[0].tolist() == [[-10, -20, 30]]
    content["markups"][0]["coordinateUnits"] = "um"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected mm"):
        read_markups(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"a.mrk.json is no file of markups"):
        read_markups(file)
    with pytest.raises(ValueError, match=r"finite points \(P, 3\)"):
        write_markups(file, [[1, 2]], ["a"])
    with pytest.raises(ValueError, match="1 points, 2 labels"):
        write_markups(file, [[1, 2, 3]], ["a", "b"])
