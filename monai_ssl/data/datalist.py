# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from monai_ssl.data.files import strip_suffix
from monai_ssl.data.layout import IMAGE_FOLDERS, Volume, as_list, name_some, read_dataset, require_files

__all__ = ["build_datalist", "select_labelled"]

_BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)")
logger = logging.getLogger(__name__)


def build_datalist(
    dataset_dir: str | os.PathLike[str],
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    with_labels: bool = False,
    subject_pattern: str | None = None,
    phantom: Mapping[str, Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The training, validation and test items of a dataset, split by subject.

    A part that the dataset has itself (a datalist's "validation" and "test", `imagesTs`) is used as it is; the others
    are drawn from the training volumes. The draw ranks subjects by a hash of seed and subject, so that new subjects
    move few of the others. The subject is the BIDS `sub-…`; else the first folder where several folders hold the
    volumes (below `images` too); else the file name.

    Args:
        dataset_dir: a folder or a datalist, see `monai_ssl.data.layout.read_dataset`; '' for the embedded phantom.
        val_fraction: share of the subjects for validation, at least one if above 0.
        test_fraction: share of the subjects for the test part, at least one if above 0.
        seed: of the split.
        with_labels: items carry "label"; every training and validation volume must have one.
        subject_pattern: regular expression, searched in each item's name; its first group is the subject.
        phantom: arguments of `write_phantom`, for an empty `dataset_dir`.

    Returns:
        "training", "validation" and "test": lists of items with "image" (a path, a DICOM folder or a list of paths, one
        per channel), "name" (relative to the dataset), "subject" and perhaps "label".

    Raises:
        ValueError: no volumes, a missing label, a name without subject, or too few subjects to split.
    """
    if not str(dataset_dir):
        dataset_dir = _write_phantom(phantom or {})
    parts = read_dataset(dataset_dir)
    pool = [volume for volumes in parts.values() for volume in volumes]
    subjects = dict(zip([volume.name for volume in pool], _subjects(pool, subject_pattern)))
    lists = {
        part: [_item(volume, subjects[volume.name], with_labels) for volume in volumes]
        for part, volumes in parts.items()
    }
    if with_labels:
        _require_labels(lists, Path(dataset_dir))
    wanted = {"validation": val_fraction, "test": test_fraction}
    split = _split(lists["training"], {part: 0.0 if lists[part] else share for part, share in wanted.items()}, seed)
    result = {part: lists[part] if part != "training" and lists[part] else split[part] for part in lists}
    for part, items in result.items():
        logger.info(f"{part}: {len(items)} volumes of {len({item['subject'] for item in items})} subjects")
    return result


def select_labelled(items: Sequence[Any], num_labelled: int | float, seed: int = 0) -> list[Any]:
    """A random draw of labelled items; with the same seed a smaller draw is the beginning of a larger one.

    Args:
        items: items of a datalist.
        num_labelled: a count (int) or a share of the items (float above 0, at most 1; at least one item).
        seed: of the draw.

    Raises:
        ValueError: the number is neither, or above the number of items.
    """
    if isinstance(num_labelled, bool) or not isinstance(num_labelled, (int, float)):
        raise ValueError(f"num_labelled must be a count (int) or a share (float), got {num_labelled!r}")
    if isinstance(num_labelled, float):
        if not 0 < num_labelled <= 1:
            raise ValueError(f"num_labelled as a share must be above 0 and at most 1, got {num_labelled}")
        count = max(1, _round(num_labelled * len(items)))
    else:
        count = num_labelled
    if not 1 <= count <= len(items):
        raise ValueError(f"num_labelled {num_labelled} asks for {count} of {len(items)} labelled items")
    return sorted(items, key=lambda item: _rank(seed, str(item.get("name", item.get("image")))))[:count]


def _write_phantom(arguments: Mapping[str, Any]) -> Path:
    from monai_ssl.data import phantom_dir, write_phantom

    return write_phantom(phantom_dir(**arguments), **arguments)


def _item(volume: Volume, subject: str, with_labels: bool) -> dict[str, Any]:
    item = {"image": volume.image, "name": volume.name, "subject": subject}
    if with_labels and volume.label is not None:
        item["label"] = volume.label
    return item


def _require_labels(lists: dict[str, list[dict[str, Any]]], source: Path) -> None:
    """Raise if a volume has no label; a test part wholly without labels, as in challenges, is dropped."""
    if not any("label" in item for item in lists["test"]):
        if lists["test"]:
            logger.warning(f"{source}: the {len(lists['test'])} test volumes have no labels and are left out")
        lists["test"] = []
    items = [item for part in lists.values() for item in part]
    missing = [item["name"] for item in items if "label" not in item]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of {len(items)} volumes have no label: {name_some(missing)}. Labels have the "
            'same file names in labels/ (labelsTr/) beside images/ (imagesTr/), or stand under "label" in dataset.json'
        )
    paths = [path for item in items for path in as_list(item["label"]) if isinstance(path, str)]
    require_files(paths, source)


def _subjects(volumes: Sequence[Volume], pattern: str | None) -> list[str]:
    if pattern is not None:
        return [_subject_by_pattern(volume.name, re.compile(pattern)) for volume in volumes]
    folders = [PurePosixPath(volume.place).parts[:-1] for volume in volumes]
    # folders above all volumes do not tell subjects apart
    depth = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders)))
    return [_subject(volume.place, depth) for volume in volumes]


def _subject_by_pattern(name: str, pattern: re.Pattern[str]) -> str:
    match = pattern.search(name)
    if not pattern.groups or match is None or match.group(1) is None:
        raise ValueError(f"subject_pattern {pattern.pattern!r} finds no subject (its first group) in {name}")
    return match.group(1)


def _subject(place: str, depth: int) -> str:
    bids = _BIDS_SUBJECT.search(place)
    if bids:
        return bids.group(1)
    parts = PurePosixPath(place).parts[depth:]
    for position, folder in enumerate(parts[:-1]):
        if folder in IMAGE_FOLDERS:  # a folder of the layout, not of a subject
            return "/".join([*parts[:position], strip_suffix(parts[position + 1])])
    return strip_suffix(parts[0])


def _split(items: list[dict[str, Any]], shares: dict[str, float], seed: int) -> dict[str, list[dict[str, Any]]]:
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"the share of subjects for {part} must be at least 0 and below 1, got {share}")
    ranked = sorted({item["subject"] for item in items}, key=lambda subject: _rank(seed, subject))
    count = {part: max(1, _round(share * len(ranked))) if share else 0 for part, share in shares.items()}
    if len(ranked) <= sum(count.values()):
        raise ValueError(
            f"{len(ranked)} subjects cannot be split into training, {count['validation']} for validation and "
            f"{count['test']} for testing: set the shares to 0, or say with subject_pattern what a subject is "
            f"(found: {name_some(ranked)})"
        )
    first, last = count["validation"], len(ranked) - count["test"]  # the test part does not move the validation part
    part_of = {
        subject: "validation" if rank < first else "training" if rank < last else "test"
        for rank, subject in enumerate(ranked)
    }
    return {
        part: [item for item in items if part_of[item["subject"]] == part]
        for part in ("training", "validation", "test")
    }


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _round(number: float) -> int:
    return int(number + 0.5)
