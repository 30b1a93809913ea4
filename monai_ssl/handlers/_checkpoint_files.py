# SPDX-License-Identifier: Apache-2.0
"""Numbered checkpoint files that are either whole or not there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from monai_ssl.networks.state_file import load_file, write_atomic

logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint_iteration=(\d+)\.pt")


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """File of the checkpoint after ``iteration``."""
    return directory / f"checkpoint_iteration={iteration:06d}.pt"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files in the folder, oldest first; empty if there is no such folder."""
    found = [path for path in directory.glob("checkpoint_iteration=*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))  # type: ignore[index]


def write_checkpoint(content: Any, directory: Path, iteration: int, keep: int) -> None:
    """Write the checkpoint of an iteration whole, then remove all but the newest ``keep``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(checkpoint_path(directory, iteration), lambda temporary: torch.save(content, temporary))
    for old in list_checkpoints(directory)[:-keep]:
        old.unlink()


def remove_unfinished(directory: Path) -> None:
    """Remove what killed processes had begun to write."""
    for temporary in directory.glob(".checkpoint_iteration=*.tmp"):
        temporary.unlink()


def renumber(path: Path, iteration: int) -> None:
    """Iterations count differently now: leave this one file, under the number that it has in the new count."""
    for other in list_checkpoints(path.parent):
        if other != path:
            other.unlink()
    os.replace(path, checkpoint_path(path.parent, iteration))


def load_newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest readable checkpoint; damaged newer ones are set aside as ``<name>.damaged`` with a warning.

    Returns:
        its path and content, None if the folder holds no checkpoint.

    Raises:
        RuntimeError: when there are checkpoints, but none can be read.
    """
    paths = list_checkpoints(directory)
    damaged: list[Path] = []
    for path in reversed(paths):
        try:
            content = load_file(path)
        except ValueError as error:
            logger.warning("%s; trying the checkpoint before it.", error)
            damaged.append(path)
            continue
        for other in damaged:
            os.replace(other, other.with_name(other.name + ".damaged"))
        return path, content
    if paths:
        raise RuntimeError(f"None of the checkpoints in {directory} can be read; the newest is {paths[-1].name}.")
    return None


def plain(value: Any, name: str) -> Any:
    """Copy of nested state with nothing in it that ``torch.load(weights_only=True)`` refuses.

    Raises:
        TypeError: naming the entry that cannot be stored; better now than when the run is to be resumed.
    """
    if isinstance(value, MetaTensor):
        return value.as_tensor()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (torch.Tensor, str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry, f"{name}[{i}]") for i, entry in enumerate(value))
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold.")
