# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from monai_ssl.data.files import strip_suffix
from monai_ssl.data.layout import IMAGE_FOLDERS, Volume, as_list, name_some, read_dataset, require_files
from monai_ssl.data.split import split_lists

__all__ = ["build_datalist", "number_volumes"]

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
    spatial_dims: int = 3,
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
        spatial_dims: 2 finds pictures (.png, .jpg, .bmp) too.

    Returns:
        "training", "validation" and "test": lists of items with "image" (a path, a DICOM folder or a list of paths, one
        per channel), "name" (relative to the dataset), "subject" and perhaps "label".

    Raises:
        ValueError: no volumes, a missing label, a name without subject, or too few subjects to split.
    """
    if not str(dataset_dir):
        dataset_dir = phantom_folder(phantom or {})
    lists = as_items(read_dataset(dataset_dir, spatial_dims), subject_pattern, with_labels)
    if with_labels:
        _require_labels(lists, Path(dataset_dir))
    return split_lists(lists, val_fraction, test_fraction, seed)


def number_volumes(
    lists: Mapping[str, Sequence[Mapping[str, Any]]], image_key: str = "image"
) -> dict[str, list[dict[str, Any]]]:
    """A datalist whose items carry "volume", the number of their scan: equal where the image is, else different.

    Contrastive methods must not take two crops or slices of one scan for two patients. The numbers depend on the
    datalist alone, so they are the same in all processes; parts have no number in common unless they share a scan.

    Args:
        lists: parts of a dataset, as :func:`build_datalist` returns them.
        image_key: key of the path, or list of paths, of the scan.

    Returns:
        new items in the same order.

    Raises:
        KeyError: an item has no image.
    """
    numbers: dict[str, int] = {}
    return {
        part: [{**item, "volume": numbers.setdefault(str(item[image_key]), len(numbers))} for item in items]
        for part, items in lists.items()
    }


def as_items(
    parts: Mapping[str, Sequence[Volume]], subject_pattern: str | None, with_labels: bool
) -> dict[str, list[dict[str, Any]]]:
    """Volumes as items of a datalist, with their subjects."""
    pool = [volume for volumes in parts.values() for volume in volumes]
    subjects = dict(zip([volume.name for volume in pool], _subjects(pool, subject_pattern)))
    return {
        part: [_item(volume, subjects[volume.name], with_labels) for volume in volumes]
        for part, volumes in parts.items()
    }


def phantom_folder(arguments: Mapping[str, Any]) -> Path:
    """The folder of the embedded phantom, written now if need be."""
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
