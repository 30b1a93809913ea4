# SPDX-License-Identifier: Apache-2.0
"""What one volume file holds, read once and remembered until the file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from monai.transforms import EnsureChannelFirst, LoadImage
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from monai_ssl.data.dicom import itk_loading
from monai_ssl.data.files import atomic_path, cache_root, file_signature, is_first_process

Image = str | Sequence[str]
Facts = dict[str, Any]
_FORMAT = 2  # of a remembered entry
_MAX_REMEMBERED = 100_000
logger = logging.getLogger(__name__)


def volume_facts(image: Image) -> Facts:
    """Read an image the way training does and say what it holds.

    Args:
        image: a file, a folder with a DICOM series, or a list of files (one per channel).

    Returns:
        `shape` (channel first), `affine` (rows), `nonfinite` (a count of voxels), `constant` and `range` (least and
        largest value, None where some are not finite); or only `error`.
    """
    try:
        with itk_loading():
            volume = EnsureChannelFirst()(LoadImage(image_only=True)(image))
    except Exception as error:  # a file can be broken in any way; its reason goes into the report
        first_line = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first_line[:200]}"}
    values = volume.as_tensor()
    nonfinite = values.numel() - int(torch.isfinite(values).sum())
    limits = [float(end) for end in values.aminmax()] if values.numel() and not nonfinite else None
    return {
        "shape": list(volume.shape),
        "affine": volume.affine.tolist(),
        "nonfinite": nonfinite,
        "constant": limits is not None and limits[0] == limits[1],
        "range": limits,
    }


def collect_facts(images: Sequence[Image], num_workers: int | None = None, progress: bool = True) -> list[Facts]:
    """The facts of many images, read in parallel; those of unchanged files come from the cache folder.

    Worker processes are those of torch's `DataLoader`, as in training: what loads here loads there. Failures are not
    remembered.

    Args:
        images: see `volume_facts`.
        num_workers: processes; 0 reads in this one, None takes up to 8, and none for a handful of files.
        progress: show a bar, in the first process of a distributed run.
    """
    keys = [_key(image) for image in images]
    known = _load_remembered()
    unread = [index for index, key in enumerate(keys) if key not in known]
    facts = [known.get(key, {}) for key in keys]
    loader = DataLoader(
        _FactsDataset([images[index] for index in unread]),
        batch_size=None,
        num_workers=_workers(len(unread)) if num_workers is None else num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # the global one must be as before: it initialises the networks
    )
    quiet = not (progress and unread and is_first_process())
    bar = tqdm(loader, desc="Checking volumes", disable=quiet)
    for found, index in zip(bar, unread):
        facts[index] = found
    _remember({keys[index]: facts[index] for index in unread if keys[index] and "error" not in facts[index]})
    return facts


class _FactsDataset(Dataset[Facts]):
    def __init__(self, images: list[Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Facts:
        return volume_facts(self.images[index])


def _unchanged(item: Any) -> Any:
    return item


def _workers(count: int) -> int:
    if count < 8:
        return 0
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _key(image: Image) -> str:
    try:
        signature = file_signature(image)
    except OSError:
        return ""  # never remembered
    return hashlib.sha256(json.dumps([_FORMAT, monai.__version__, signature]).encode()).hexdigest()


def _memory_file() -> Path:
    return cache_root() / "checks.json"


def _load_remembered() -> dict[str, Facts]:
    try:
        remembered = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _remember(new: dict[str, Facts]) -> None:
    if not new:
        return
    merged = {**_load_remembered(), **new}  # another process may have written meanwhile
    try:
        with atomic_path(_memory_file()) as temporary:
            temporary.write_text(json.dumps(dict(list(merged.items())[-_MAX_REMEMBERED:])), encoding="utf-8")
    except OSError as error:
        logger.warning(f"checked volumes cannot be remembered in {_memory_file()}: {error}")
