# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: a plain JSON dictionary that travels inside a state dict, and beside it as ``.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from .. import __version__
from .state_file import load_file

__all__ = ["KEY", "complete_provenance", "make_provenance", "read_provenance"]

KEY = "monai_ssl"  # name of the entry in the state dict's `_metadata`, which strict loading ignores
_FILE = re.compile(
    r"^(/|~|\\\\|[A-Za-z]:[\\/]|file:)|\.(nii|nii\.gz|nrrd|nhdr|mha|mhd|dcm|dicom|ima|mgz|npy|npz)$", re.IGNORECASE
)
_PATH_KEY = re.compile(r"(^|_)(dir|root|path|file|folder)$")


def make_provenance(
    method: str,
    arxiv: str,
    network: Mapping[str, Any],
    preprocessing: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    num_volumes: int | None = None,
) -> dict[str, Any]:
    """The dictionary for :func:`save_pretrained`, from what a bundle knows; tuples and numpy numbers become plain.

    Args:
        method: name of the pretext method.
        arxiv: its arXiv id.
        network: class name and arguments of the network that the weights fit. A bundle writes it as an expression,
            ``$dict(_target_='monai.networks.nets.UNet', ...)``: a mapping with ``_target_`` would be built instead.
        preprocessing: what was done to the volumes (orientation, spacing in mm, intensity window, roi).
        settings: parameters of the run. Entries that name places (``dataset_dir``, absolute paths, image files) are
            left out; the rest is stored with its sha256, so that equal runs in different folders agree.
        num_volumes: number of training volumes.

    Raises:
        TypeError: ``network`` is not a mapping.
        ValueError: a value is not plain JSON.
    """
    if not isinstance(network, Mapping):
        raise TypeError(
            f"network must be a mapping of class name and arguments, got {type(network).__name__}; in a bundle write "
            '"$dict(_target_=..., ...)", since a mapping with _target_ is built'
        )
    kept = {k: v for k, v in _plain(settings or {}).items() if not _PATH_KEY.search(k) and not any(_file_names(v))}
    provenance = {
        "method": method,
        "arxiv": arxiv,
        "network": _plain(network),
        "preprocessing": _plain(preprocessing or {}),
        "settings": kept,
        "settings_sha256": _sha256(kept),
        "num_volumes": _plain(num_volumes),
    }
    _check_json(provenance)
    return provenance


def complete_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Check a provenance and add date, package versions and, where settings are given, their hash.

    Raises:
        ValueError: a value is not plain JSON, or looks like the name of a file or folder.
    """
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance must be a dictionary, got {type(provenance).__name__}")
    done = dict(provenance)
    _check_json(done)
    names = list(_file_names(done))
    if names:
        raise ValueError(f"provenance must not name files or folders, which may identify patients: {names[:3]}")
    if "settings" in done:
        done.setdefault("settings_sha256", _sha256(done["settings"]))
    done["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = {"monai_ssl": __version__, "monai": monai.__version__, "torch": torch.__version__}
    done["versions"] = {name: str(v) for name, v in {**versions, "numpy": np.__version__}.items()}
    return done


def read_provenance(file: str | Path) -> dict[str, Any] | None:
    """The provenance inside a file of :func:`save_pretrained`; None where there is none.

    Raises:
        ValueError: the file cannot be read as a checkpoint.
    """
    metadata = getattr(load_file(file), "_metadata", None)
    return metadata.get(KEY) if isinstance(metadata, dict) else None


def _plain(value: Any) -> Any:
    """Mappings, sequences and numpy scalars as what JSON knows; anything else is left for the check to name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value


def _check_json(value: Any, place: str = "provenance") -> None:
    # exact types: np.float64 is a float, and makes the file unreadable for torch.load(weights_only=True)
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{place}: key {key!r} is {type(key).__name__}, JSON needs str")
            _check_json(item, f"{place}[{key!r}]")
    elif type(value) is list:
        for i, item in enumerate(value):
            _check_json(item, f"{place}[{i}]")
    elif (
        type(value) not in (str, int, float, bool, type(None))
        or value in (float("inf"), -float("inf"))
        or value != value
    ):
        raise ValueError(f"{place} is {value!r} ({type(value).__name__}), not plain JSON; make_provenance() converts")


def _file_names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _FILE.search(value):
            yield value
    elif isinstance(value, dict):
        for item in [*value, *value.values()]:
            yield from _file_names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _file_names(item)


def _sha256(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
