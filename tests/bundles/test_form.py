# SPDX-License-Identifier: Apache-2.0
"""The files of every bundle: what the Model Zoo's checks and MONAI's federated client want to find."""

from __future__ import annotations

import json
import logging
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow, verify_metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import monai_ssl

from .running import BUNDLES, NAMES, REPOSITORY, load_config
from .settings import OWN_ENCODER

SCHEMA_SHA256 = "cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678"
HEADINGS = (
    "Authors",
    "Tags",
    "Model Description",
    "Data",
    "Preprocessing",
    "Performance",
    "Additional Usage Steps",
    "System Configuration",
    "Limitations",
    "Citation",
    "References",
)
FILES = (
    "LICENSE",
    "docs/README.md",
    "configs/metadata.json",
    "configs/logging.conf",
    "configs/train.yaml",
    "configs/evaluate.yaml",
    "configs/multi_gpu_train.yaml",
    "configs/inference.yaml",
    "configs/tracking_mlflow.yaml",
)


@pytest.fixture
def metadata(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def committed(bundle: Path) -> list[Path]:
    """The files that are in git: not what a run in the checkout has left."""
    paths = [path for path in bundle.rglob("*") if path.is_file()]
    return [
        p for p in paths if p.relative_to(bundle).parts[0] not in ("models", "eval") and "__pycache__" not in p.parts
    ]


def constraints(name: str, python: str | None = None) -> dict[str, str]:
    """Package name -> pinned version, for the given or, in a file without markers, for any Python version."""
    lines = [line.strip() for line in (REPOSITORY / name).read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    if python is not None:
        pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert all(pin.marker is None or python for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def test_there_are_bundles() -> None:
    assert sorted(path.name for path in BUNDLES.iterdir() if path.is_dir()) == NAMES


def test_name_and_files(bundle: Path) -> None:
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", bundle.name)
    assert [name for name in FILES if not (bundle / name).is_file()] == []
    assert not (bundle / "scripts").exists(), "code lies in the package: MONAI does not put a bundle on the module path"
    assert "Apache License" in (bundle / "LICENSE").read_text()


def test_files_are_clean(bundle: Path) -> None:
    for path in committed(bundle):
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_size < 1_000_000, path
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), f"{path}: blanks at the end of a line"
        assert text.endswith("\n"), f"{path}: no newline at the end"
        assert not text.endswith("\n\n"), f"{path}: empty lines at the end"
        assert not re.search(r"/(home|Users|root|work|tmp)/", text), f"{path}: a path of one machine"


def test_json_has_the_form_of_the_zoo(bundle: Path) -> None:
    for path in (bundle / "configs").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=4) + "\n", path


def test_metadata_follows_the_schema(bundle: Path, metadata_schema: Path, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    file = str(bundle / "configs" / "metadata.json")
    verify_metadata(meta_file=file, filepath=str(metadata_schema), hash_val=SCHEMA_SHA256, hash_type="sha256")
    broken = tmp_path / "metadata.json"  # and it would be told
    broken.write_text(json.dumps({**json.loads(Path(file).read_text()), "supported_apps": []}))
    with pytest.raises(ValueError, match="not of type 'object'"):
        verify_metadata(
            meta_file=str(broken), filepath=str(metadata_schema), hash_val=SCHEMA_SHA256, hash_type="sha256"
        )


def test_metadata_says_what_the_zoo_asks(metadata: dict[str, Any]) -> None:
    assert metadata["schema"].endswith("/meta_schema_20240725.json")
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])
    assert metadata["version"] in metadata["changelog"]
    assert metadata["supported_apps"] == {}
    for key in ("name", "data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use"):
        assert metadata[key].strip(), key
    assert isinstance(metadata["eval_metrics"], dict)
    assert any(re.search(r"\d{4}\.\d{4,5}", reference) for reference in metadata["references"])
    assert "optional_packages_version" not in metadata


def test_pins(metadata: dict[str, Any]) -> None:
    """The Zoo installs the pins on Python 3.10, so they are those of constraints-py310.txt."""
    pinned = constraints("constraints-py310.txt")
    required = metadata["required_packages_version"]
    assert required.pop("monai-ssl") == monai_ssl.__version__
    assert {"nibabel", "pytorch-ignite", "pyyaml"} <= set(required)
    versions = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    versions |= {"numpy": metadata["numpy_version"], **required}
    assert versions == {name: pinned[canonicalize_name(name)] for name in versions}


def test_constraints_agree() -> None:
    assert constraints("constraints-py310.txt") == constraints("constraints.txt", python="3.10")
    for python in ("3.11", "3.12", "3.13"):
        assert constraints("constraints.txt", python).keys() == constraints("constraints-py310.txt").keys()


def test_constraints_satisfy_the_package() -> None:
    pinned = constraints("constraints-py310.txt")
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    for requirement in map(Requirement, lines.split()):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_ssl_block(bundle: Path, metadata: dict[str, Any]) -> None:
    export = metadata["ssl"]["export"]
    assert export["torchscript"] in ("script", "trace", "none")
    assert isinstance(export["onnx"], bool)
    assert export["torchscript"] == "script" or export["reason"].strip()
    if "finetuning" in bundle.name:
        return
    block = metadata["ssl"]
    assert re.fullmatch(r"\d{4}\.\d{4,5}", block["arxiv"])
    assert block["method"]
    # a part of a MONAI network, but where the published encoder cannot be built of one
    own = "monai_ssl.networks." if bundle.name in OWN_ENCODER else "monai.networks.nets."
    assert block["encoder"]["_target_"].startswith(own)
    assert isinstance(block["encoder"]["attribute"], str)
    assert {"orientation", "spacing", "window", "roi"} <= set(block["preprocessing"])
    assert {"name", "licence"} <= set(block["data"])
    config = load_config(bundle, "train.yaml")
    length = "iterations" if "max_iterations" in config else "epochs"
    assert block[length] == config[f"max_{length}"]
    assert isinstance(block["seed"], int)


def test_readme(bundle: Path, metadata: dict[str, Any]) -> None:
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    assert [name for name in HEADINGS if name not in headings] == []
    assert not re.search(r"^[A-Z]{4,}$", text, re.MULTILINE), "a place holder is left"
    for reference in metadata["references"]:
        assert re.sub(r"arXiv:", "", reference) in text


STANDING_ALONE = ("finetune.yaml", "all_stages.yaml", "match.yaml", "register.yaml", "track_lesions.yaml")


def test_readme_names_parameters_that_exist(bundle: Path) -> None:
    """An unknown override is accepted in silence, so a misspelt name in the table would never be noticed."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| *parameter *\|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE | re.IGNORECASE)
    assert table, "docs/README.md has no table of parameters"
    named = {name for row in table[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    config = load_config(bundle, "train.yaml")
    assert named - set(config) == set()
    assert {"dataset_dir", "seed", "max_epochs", "batch_size", "num_workers", "resume"} <= named
    for line in text.splitlines():
        if "-m monai_ssl" in line:  # a command of the package
            continue
        alone = next((file for file in STANDING_ALONE if file in line), None)
        combined = re.findall(r"'configs/(\w+\.yaml)'", line) or ["train.yaml"]
        own = load_config(bundle, *([alone] if alone else combined))
        for option in re.findall(r" --(?!config_file|tracking|standalone|nproc|nnodes|node_rank|rdzv)(\w+)", line):
            assert option in own, f"--{option}"


def test_logging_conf_is_accepted(bundle: Path) -> None:
    logging.getLogger().handlers.clear()
    ConfigWorkflow(str(bundle / "configs" / "train.yaml"), logging_file=str(bundle / "configs" / "logging.conf"))
    assert logging.getLogger().handlers
