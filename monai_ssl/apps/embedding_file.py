# SPDX-License-Identifier: Apache-2.0
"""Embeddings as files: plain tensors and numbers, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_ssl.data.files import atomic_path
from monai_ssl.networks.state_file import load_file

from .image_embedding import ImageEmbedding

__all__ = ["read_embedding", "write_embedding"]

logger = logging.getLogger(__name__)


def write_embedding(file: Path, embedding: ImageEmbedding) -> None:
    """Write an embedding; the file appears whole or not at all, and its folder is made.

    Args:
        file: to write.
        embedding: its fields become the entries of one dictionary.
    """
    content = {field.name: _plain(getattr(embedding, field.name)) for field in dataclasses.fields(embedding)}
    with atomic_path(file) as temporary:
        torch.save(content, temporary)


def read_embedding(file: Path, device: torch.device | str = "cpu") -> ImageEmbedding | None:
    """The embedding in a file; None where there is none, or, with a warning in the log, where it is damaged.

    Args:
        file: of :func:`write_embedding`.
        device: of the maps.
    """
    if not file.is_file():
        return None
    try:
        found = load_file(file)
        maps, norms = ([m.to(device) for m in found.pop(name)] for name in ("maps", "norms"))
        sizes = {name: tuple(found.pop(name)) for name in ("size", "source_size", "padded_size")}
        return ImageEmbedding(maps=maps, norms=norms, **sizes, **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged and is written anew: %s", file, error)
        return None


def _plain(value: Any) -> Any:
    """On the CPU, tensors and lists only."""
    if isinstance(value, Tensor):
        return value.cpu()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
