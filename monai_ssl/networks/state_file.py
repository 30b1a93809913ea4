# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint files: never unpickling code, never leaving half a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_file", "read_state_dict", "write_atomic"]

_NESTED = ("state_dict", "model", "network")  # names under which training checkpoints keep the weights


def load_file(file: str | Path) -> Any:
    """``torch.load`` on the CPU with ``weights_only=True``.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file is truncated, or no PyTorch file, or holds more than tensors and plain values.
    """
    try:
        Path(file).open("rb").close()  # an absent file raises here; OSError from torch.load means a damaged one
    except FileNotFoundError as e:
        reason = "no such checkpoint: run the training that writes it first, or correct the path"
        raise FileNotFoundError(e.errno, reason, str(file)) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle raises almost anything
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ValueError(
            f"{file} cannot be read as a checkpoint: it is truncated, no PyTorch file, or holds objects besides "
            f"tensors and plain values, which weights_only=True refuses ({reason})"
        ) from e


def read_state_dict(file: str | Path) -> dict[str, Any]:
    """The state dict in a file, looked up under "state_dict", "model" or "network" where it is nested.

    Raises:
        ValueError: as :func:`load_file`, or no state dict is found, or several.
    """
    content = load_file(file)
    while isinstance(content, dict) and not any(isinstance(v, torch.Tensor) for v in content.values()):
        nested = [name for name in _NESTED if isinstance(content.get(name), dict)]
        if len(nested) != 1:
            found = f"several of {nested}" if nested else f"top-level keys {list(content)[:8]}"
            raise ValueError(f"{file} holds no single state dict: {found}; save the network's state dict alone")
        content = content[nested[0]]
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected a state dict")
    return content


def write_atomic(file: Path, write: Callable[[Path], Any]) -> None:
    """``write`` to a temporary name in the same folder, then rename: readers see the old file or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
