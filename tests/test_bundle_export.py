# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from monai_ssl.__main__ import main
from monai_ssl.bundle_export import MAX_BYTES, export_bundle

TRAIN = "bundle_root: .  # a comment\nnetwork_def: {_target_: torch.nn.Conv3d, in_channels: 1, name: 'å'}\n"
FILES = {
    "LICENSE": "Apache-2.0\n",
    "configs/metadata.json": json.dumps({"version": "0.1.0", "changelog": {"0.1.0": "first"}}),
    "configs/train.yaml": TRAIN,
    "configs/evaluate.yaml": "run: [$1]\n",
    "configs/multi_gpu_train.yaml": "device: cpu\n",
    "configs/inference.yaml": "run: [$1]\n",
    "configs/logging.conf": "[loggers]\nkeys=root\n",
    "docs/README.md": "text\n",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "toy"


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_yaml_gets_a_json_twin_and_nothing_else_changes(bundle: Path, tmp_path: Path) -> None:
    missing = export_bundle(bundle, tmp_path / "out")
    twin = (tmp_path / "out" / "configs" / "train.json").read_text()
    assert json.loads(twin) == {
        "bundle_root": ".",
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "name": "å"},
    }
    assert twin.startswith('{\n    "bundle_root"')
    assert twin.endswith("}\n")
    assert "\\u00e5" in twin
    for name, text in FILES.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert missing == ["models/model.pt is missing"]


def test_only_weights_travel(bundle: Path, tmp_path: Path) -> None:
    kept = ["models/model.pt", "models/pretext.pt"]
    kept += [f"models/{name}.{end}" for name in ("encoder", "unet_encoder", "unet_decoder") for end in ("pt", "json")]
    left = [
        "models/checkpoint_2.pt",
        "models/bad_volumes.csv",
        "eval/curves.csv",
        "docs/.hidden",
        "configs/__pycache__/x",
    ]
    for name in kept + left:
        write(bundle / name)
    assert export_bundle(bundle, tmp_path / "out") == []
    assert all((tmp_path / "out" / name).is_file() for name in kept)
    assert not any((tmp_path / "out" / name).exists() for name in left)


def test_large_file_must_be_named_with_its_hash(bundle: Path, tmp_path: Path) -> None:
    write(bundle / "models" / "model.pt")
    with (bundle / "models" / "model.pt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"25 MB.*models/model.pt"):
        export_bundle(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    entry = f"large_files:\n- path: models/model.pt\n  url: https://example.org/model.pt\n  hash_val: '{digest}'\n"
    write(bundle / "large_files.yml", entry)
    assert export_bundle(bundle, tmp_path / "out") == ["large_files.yml: models/model.pt has no hash_type"]
    assert (tmp_path / "out" / "models" / "model.pt").stat().st_size == MAX_BYTES + 1
    write(bundle / "large_files.yml", entry.replace(digest[:4], "0000") + "  hash_type: sha256\n")
    with pytest.raises(ValueError, match=digest):
        export_bundle(bundle, tmp_path / "other")


def test_a_named_large_file_may_be_elsewhere(bundle: Path, tmp_path: Path) -> None:
    write(
        bundle / "large_files.yml", "large_files:\n- {path: models/model.pt, url: u, hash_val: h, hash_type: sha256}\n"
    )
    assert export_bundle(bundle, tmp_path / "out") == []


def test_says_what_is_missing(bundle: Path, tmp_path: Path) -> None:
    (bundle / "LICENSE").unlink()
    (bundle / "configs" / "inference.yaml").unlink()
    write(bundle / "docs" / "README.md", "data in /home/someone/scans\n")
    write(bundle / "configs" / "metadata.json", '{"version": "0.2.0", "changelog": {"0.1.0": ""}}')
    assert export_bundle(bundle, tmp_path / "out") == [
        "LICENSE is missing",
        "configs/inference.* is missing",
        "models/model.pt is missing",
        "configs/metadata.json: changelog has no entry for the version",
        "docs/README.md holds a personal path",
    ]


def test_refuses_yaml_that_json_would_change(bundle: Path, tmp_path: Path) -> None:
    write(bundle / "configs" / "train.yaml", "labels: {0: background, 1: liver}\n")
    with pytest.raises(ValueError, match=r"train.yaml has no JSON form"):
        export_bundle(bundle, tmp_path / "out")
    write(bundle / "configs" / "train.yaml", "day: 2026-01-02\n")
    with pytest.raises(ValueError, match=r"train.yaml has no JSON form"):
        export_bundle(bundle, tmp_path / "out")


def test_wrong_folders(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a bundle: it has no configs/metadata.json"):
        export_bundle(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="inside the bundle"):
        export_bundle(bundle, bundle / "release")
    write(tmp_path / "full" / "file")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_bundle(bundle, tmp_path / "full")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_bundle(bundle, tmp_path / "full" / "file")
    (tmp_path / "empty").mkdir()
    export_bundle(bundle, tmp_path / "empty")


def test_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export_bundle", str(bundle), str(tmp_path / "out")]) == 0
    assert "models/model.pt is missing" in capsys.readouterr().out
    assert main(["export_bundle", str(bundle), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path / 'out'} exists and is not an empty folder\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "export_bundle" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])
