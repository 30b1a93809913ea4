# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_ssl.__main__ import main
from monai_ssl.apps import load_matcher, read_markups, write_markups
from monai_ssl.data import torso_phantom
from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    MergedEmbeddingNet,
    make_provenance,
    rebuild_network,
    save_pretrained,
)

SPACING = 8.0


def network(**options: Any) -> AnatomicalEmbeddingNet:
    torch.manual_seed(0)
    encoder = AnisotropicResNet(base_channels=8)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, embed_dim=6, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with weights, two phantoms and their landmarks."""
    root = tmp_path_factory.mktemp("matching")
    (root / "bundle" / "models").mkdir(parents=True)
    net = network()
    torch.save(MergedEmbeddingNet.sharing(net).state_dict(), root / "bundle" / "models" / "model.pt")
    described = {"_target_": "monai_ssl.networks.AnisotropicResNet", "base_channels": 8}
    origin = make_provenance("SAM", "2012.02383", described, {"orientation": "SPL", "spacing": [SPACING] * 3})
    save_pretrained(net.encoder, root / "bundle" / "models" / "encoder.pt", origin)
    landmarks = {}
    for name, subject in (("a", 0), ("b", 1)):
        volume = torso_phantom(subject, (48, 40, 48))
        nib.save(nib.Nifti1Image(volume.image.astype(np.int16), volume.affine), root / f"{name}.nii.gz")
        landmarks[name] = {k: v.tolist() for k, v in volume.landmarks.items()}
    (root / "landmarks.json").write_text(json.dumps(landmarks))
    return root


def landmark(folder: Path, scan: str, name: str) -> list[float]:
    return json.loads((folder / "landmarks.json").read_text())[scan][name]


def match(folder: Path, *arguments: str, model: str = "bundle", query: str = "b.nii.gz") -> int:
    given = ["--model", str(folder / model), "--template", str(folder / "a.nii.gz"), "--query", str(folder / query)]
    return main(["match", *given, *arguments])


def test_match(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative coordinates, several points, all files; the same answer as by hand."""
    points = [landmark(folder, "a", "kidney_left"), landmark(folder, "a", "heart")]
    texts = [",".join(f"{v:.4f}" for v in point) for point in points]
    assert texts[0].startswith("-")
    out = tmp_path / "out"
    assert match(folder, "--point", texts[0], "--point", texts[1], "--output_dir", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines[:2]] == ["1:", "2:"]
    names = ["match_1.png", "match_2.png", "match_source.mrk.json", "match_target.mrk.json", "tracking.csv"]
    assert sorted(file.name for file in out.iterdir()) == [*names, "tracking.json"]
    with (out / "tracking.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    matcher = load_matcher(folder / "bundle")
    expected = matcher.match(
        folder / "a.nii.gz", folder / "b.nii.gz", [[float(v) for v in t.split(",")] for t in texts]
    )
    found = [[float(row[f"target_{axis}"]) for axis in "xyz"] for row in rows]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.points, atol=1e-6, rtol=0)
    assert f"({', '.join(f'{v:.1f}' for v in found[0])}) mm RAS, score {float(expected.score[0]):.3f}" in lines[0]
    assert matcher.prepare(folder / "a.nii.gz").shape == (1, 48, 40, 48)  # the spacing of the bundle's training
    assert matcher.body_threshold == pytest.approx(-17.37, abs=0.01)


def test_points_from_files_and_other_spaces(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ras = landmark(folder, "a", "heart")
    write_markups(tmp_path / "p.mrk.json", [ras], ["heart"])
    (tmp_path / "p.csv").write_text(f"label,x,y,z\nheart,{-ras[0]},{-ras[1]},{ras[2]}\n")
    options = [
        "--no_picture",
        "--no_cycle",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    answers = []
    for points in (
        ["--points", str(tmp_path / "p.mrk.json")],
        ["--points", str(tmp_path / "p.csv"), "--space", "LPS"],
        ["--point", ",".join(map(str, ras))],
    ):
        assert match(folder, *options, *points) == 0
        answers.append(capsys.readouterr().out.splitlines()[0].split(": ", 1))
        assert "back within" not in answers[-1][1]
    assert [name for name, _ in answers] == ["heart", "heart", "1"]
    assert answers[0][1] == answers[1][1] == answers[2][1]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not list((tmp_path / "o").glob("*.png"))


def test_reasons(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--no_picture", "--cache_dir", str(folder / "cache"), "--output_dir", str(tmp_path)]
    heart = ",".join(map(str, landmark(folder, "a", "heart")))
    for arguments, reason in (
        (["--point", heart, "--min_score", "1"], "NOT accepted: score too low"),
        (["--point", heart, "--max_cycle_mm", "0"], "NOT accepted: comes back too far away"),
        (["--point", "-188,156,0"], "NOT accepted: point or answer outside of the body"),
    ):
        assert match(folder, *options, *arguments) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(reason)


def test_track(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["heart", "liver", "spine_T8"]
    entry = {"id": "p", "source": "a.nii.gz", "target": "b.nii.gz", "labels": names, "radius_mm": 15}
    entry |= {"points": [landmark(folder, "a", n) for n in names], "truth": [landmark(folder, "b", n) for n in names]}
    (folder / "pairs.json").write_text(json.dumps([entry]))
    given = ["--model", str(folder / "bundle" / "models" / "model.pt"), "--pairs", str(folder / "pairs.json")]
    assert main(["track", *given, "--output_dir", str(tmp_path), "--max_cycle_mm", "1000"]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert printed["lesions"] == printed["points"] == "3"
    summary = json.loads((tmp_path / "tracking.json").read_text())["summary"]
    for name in ("MED_mm", "MED_z_mm", "CPM@10mm_plain", "CPM@10mm_min_radius", "CPM@Radius"):
        assert printed[name] == f"{summary[name]:.3f}"
    assert read_markups(tmp_path / "p_target.mrk.json")[1] == names


FAULTS = [
    (["--point", "1,2"], "--point 1,2 is no point, expected three numbers"),
    (["--point", "1,2,x"], "--point 1,2,x is no point"),
    ([], "either by --point X,Y,Z, as often as needed, or by --points FILE"),
    (["--point", "1000,0,0"], "points outside of their image, rows [0]: (1000, 0, 0); in RAS it lies between (-192,"),
    (["--point", "0,0,0", "--min_score", "1.3"], "min_score 1.3 accepts nothing"),
    (["--point", "0,0,0", "--slab_size", "30"], "slab_size must be a whole number"),
    (["--point", "0,0,0", "--device", "cuda:77"], "device cuda:77 cannot be used"),
    (["--point", "0,0,0", "--spacing", "-2"], "preprocessing {'orientation': 'SPL', 'spacing': -2.0"),
    (["--points", "none.csv"], "none.csv"),
]


@pytest.mark.parametrize("arguments, message", FAULTS)
def test_faults(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert match(folder, *arguments, "--output_dir", str(tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_faults_of_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str, **others: str) -> str:
        assert match(folder, "--point", "0,0,0", *arguments, **others) == 1
        return capsys.readouterr().err

    assert "b9.nii.gz does not exist" in error(query="b9.nii.gz")
    assert "landmarks.json cannot be read as an image" in error(query="landmarks.json")
    (folder / "untrained").mkdir(exist_ok=True)
    assert "untrained holds no models/model.pt: train the bundle first" in error(model="untrained")
    assert "none.pt" in error(model="none.pt")
    assert "landmarks.json cannot be read as a checkpoint" in error(model="landmarks.json")
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), folder / "other.pt")
    assert "other.pt holds no network that can be recognised: its keys begin with ['weight', 'bias']" in error(
        model="other.pt"
    )
    (tmp_path / "list.json").write_text("[]")
    assert "list.json must hold a provenance, a dictionary" in error("--provenance", str(tmp_path / "list.json"))


OPTIONS = [{}, {"semantic": True}, {"local_levels": (1, 3), "global_level": 2}, {"local_levels": [0]}]


@pytest.mark.parametrize("options", OPTIONS)
def test_networks_are_recognised_by_their_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    net = network(**options).eval()
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "model.pt")
    found = load_matcher(tmp_path / "model.pt", device="cpu").network.eval()
    image = torch.randn(1, 1, 8, 32, 16)
    with torch.no_grad():
        for one, other in zip(net(image), found(image), strict=True):
            assert torch.equal(one, other)


def test_released_names(tmp_path: Path) -> None:
    """A file with the names of the released checkpoints, of 64 base channels and 128 wide."""
    encoder = AnisotropicResNet()
    net = AnatomicalEmbeddingNet(encoder, encoder.channels)
    heads = {"local_head.": "neck.", "global_head.": "read_out_head."}
    state = {}
    for name, value in net.state_dict().items():
        for ours, theirs in heads.items():
            if name.startswith(ours):
                name = name.replace(ours, theirs).replace("lateral.", "lateral_convs.").replace("smooth", "fpn_convs.0")
                layer, _, kind = name.rpartition(".")
                name = f"{layer}.conv.{kind}"
        layer, _, kind = name.removeprefix("encoder.").rpartition(".")
        if name.startswith("encoder."):
            last = layer.rpartition(".")[2]
            if "downsample" in layer:
                layer = layer.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
            elif last.startswith("bn"):
                layer = layer[: -len(last)] + f"conv{last[2:]}.bn"
            else:
                layer += ".conv"
            name = f"backbone.{layer}.{kind}"
        state[name] = value
    torch.save({"state_dict": state}, tmp_path / "SAM.pth")
    matcher = load_matcher(tmp_path / "SAM.pth", device="cpu")
    for name, value in matcher.network.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])
    torch.save({"state_dict": {**state, "backbone.conv1.conv.bias": torch.zeros(64)}}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"more.pth does not fit the released network"):
        load_matcher(tmp_path / "more.pth")


def test_other_networks_are_rebuilt_from_their_provenance(tmp_path: Path) -> None:
    backbone = {"_target_": "monai.networks.nets.ResNetFeatures", "model_name": "resnet10", "pretrained": False}
    described = {
        "_target_": "monai_ssl.networks.AnatomicalEmbeddingNet",
        "attribute": "encoder",
        "encoder": {**backbone, "in_channels": 1},
        "channels": [64, 64, 128, 256, 512],
        "embed_dim": 5,
    }
    net = rebuild_network(described)
    assert isinstance(net, AnatomicalEmbeddingNet)
    origin = make_provenance("SAM", "2012.02383", described, {"spacing": 3, "scaled": [0, 1], "intensity": [-100, 300]})
    save_pretrained(net, tmp_path / "model.pt", origin)
    matcher = load_matcher(tmp_path / "model.pt", device="cpu")
    assert matcher.network.embed_dim == 5
    assert matcher.body_threshold == pytest.approx(-1)
    for name, value in matcher.network.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_a_provenance_builds_networks_only() -> None:
    for target in (
        "torch.nn.Linear",
        "os.system",
        "monai_ssl.networks.load_pretrained",
        "subprocess.Popen",
        "evil.UNet",
    ):
        with pytest.raises(ValueError, match=rf"{target} is no network of"):
            rebuild_network({"_target_": target})
    with pytest.raises(ValueError, match=r"AnisotropicResNet cannot be built as described: .*banana"):
        rebuild_network({"_target_": "AnisotropicResNet", "banana": 1})
    with pytest.raises(ValueError, match="mapping with _target_"):
        rebuild_network({"spatial_dims": 3})


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("match", "track"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "--model" in capsys.readouterr().out
