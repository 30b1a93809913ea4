# SPDX-License-Identifier: Apache-2.0
"""A copy of a bundle in the form that MONAI's Model Zoo, ``monai.bundle.load`` and federated learning read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

MAX_BYTES = 25 * 1024**2
YAML_SUFFIXES = (".yaml", ".yml")
LEFT_OUT = ("eval", "__pycache__")
# Training also leaves checkpoints and reports that name the user's scans in models/: only these weights travel.
PRODUCTS = ("encoder", "unet_encoder", "unet_decoder")  # a file of weights and its provenance each
WEIGHTS = ("model.pt", "model.ts", "pretext.pt", *(f"{name}.{end}" for name in PRODUCTS for end in ("pt", "json")))
WANTED = (
    "LICENSE",
    "configs/logging.conf",
    "configs/train.*",
    "configs/evaluate.*",
    "configs/multi_gpu_train.*",
    "configs/inference.*",
    "docs/README.md",
    "models/model.pt",
)
PERSONAL_PATH = re.compile(r"/(?:home|Users)/\w")


def export_bundle(source: str | Path, output: str | Path) -> list[str]:
    """Copy a bundle and write a JSON twin of each of its YAML configurations.

    ``monai.bundle.load`` and ``MonaiAlgo`` open ``configs/<workflow>.json`` only; without it, ``load`` returns a state
    dict in place of a network. Nothing is written unless the whole bundle can be exported.

    Args:
        source: folder of the bundle.
        output: folder to write, absent or empty.

    Returns:
        One sentence for each thing that the Model Zoo asks for and the bundle lacks.

    Raises:
        ValueError: ``source`` is no bundle, ``output`` lies inside it, a file over 25 MB is not named in
            ``large_files.yml`` or differs from the hash stated there, or a configuration has no JSON form.
        FileExistsError: ``output`` exists and is not an empty folder.
    """
    source, output = Path(source), Path(output)
    if not (source / "configs" / "metadata.json").is_file():
        raise ValueError(f"{source} is not a bundle: it has no configs/metadata.json")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{output} lies inside the bundle {source}: choose a folder outside of it")
    files = bundle_files(source)
    missing = _check_large_files(source, files)
    twins = {path.with_suffix(".json"): _as_json(source / path) for path in files if _is_config(path)}
    for path in files:
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, output / path)
    for path, text in twins.items():
        (output / path).write_text(text, encoding="utf-8")
    return missing + _missing(output)


def bundle_files(source: Path) -> list[Path]:
    """The files of a bundle that travel, relative to it: no hidden files, logs, checkpoints or reports."""
    relative = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    visible = [path for path in relative if not any(p.startswith(".") or p in LEFT_OUT for p in path.parts)]
    return [path for path in visible if path.parts[0] != "models" or path.as_posix()[len("models/") :] in WEIGHTS]


def _is_config(path: Path) -> bool:
    return path.parent == Path("configs") and path.suffix in YAML_SUFFIXES


def _as_json(path: Path) -> str:
    """The configuration in the Zoo's JSON form: four blanks, keys as written, ASCII, newline at the end."""
    config = ConfigParser.load_config_file(path)
    try:
        text = json.dumps(config, indent=4) + "\n"
    except TypeError as error:
        raise ValueError(f"{path} has no JSON form: {error}") from error
    if json.loads(text) != config:  # JSON turns the keys of a mapping into strings
        raise ValueError(
            f"{path} has no JSON form: it changes when written as JSON, for example a key that is a number"
        )
    return text


def _check_large_files(source: Path, files: list[Path]) -> list[str]:
    """Refuse unnamed or changed large files; returns what is missing in the list of large files."""
    named = _large_files(source)
    unnamed = [p for p in files if (source / p).stat().st_size > MAX_BYTES and p.as_posix() not in named]
    if unnamed:
        sizes = ", ".join(f"{path} ({(source / path).stat().st_size / 1024**2:.0f} MB)" for path in unnamed)
        raise ValueError(f"over 25 MB and not named in large_files.yml: {sizes}")
    missing = []
    for path, entry in named.items():
        for key in ("url", "hash_val", "hash_type"):
            if not entry.get(key):
                missing.append(f"large_files.yml: {path} has no {key}")
        file = source / path
        if file.is_file() and entry.get("hash_val"):
            found = hashlib.new(entry.get("hash_type") or "sha256", file.read_bytes()).hexdigest()
            if found != entry["hash_val"]:
                raise ValueError(f"{file} differs from large_files.yml: its hash is {found}")
    return missing


def _large_files(source: Path) -> dict[str, dict[str, Any]]:
    for path in sorted(source.glob("large_files.*")):
        return {entry["path"]: entry for entry in ConfigParser.load_config_file(path)["large_files"]}
    return {}


def _missing(bundle: Path) -> list[str]:
    """What the Model Zoo asks for and the exported bundle lacks."""
    named = _large_files(bundle)
    missing = [f"{wanted} is missing" for wanted in WANTED if not any(bundle.glob(wanted)) and wanted not in named]
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    if metadata.get("version") not in metadata.get("changelog", {}):
        missing.append("configs/metadata.json: changelog has no entry for the version")
    for path in bundle_files(bundle):
        if path.suffix not in (".pt", ".ts") and PERSONAL_PATH.search((bundle / path).read_text("utf-8", "ignore")):
            missing.append(f"{path} holds a personal path")
    return missing
