# SPDX-License-Identifier: Apache-2.0
"""One class per volume: where the labels come from, how volumes are split by them, and what a class weighs."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_ssl.data.datalist import as_items, phantom_folder
from monai_ssl.data.layout import (
    Volume,
    datalist_file,
    dataset_root,
    find_volumes,
    in_parts,
    name_some,
    read_datalist,
    require_files,
)
from monai_ssl.data.phantom_files import write_phantom_phases
from monai_ssl.data.split import split_lists

__all__ = ["build_class_datalist", "class_weights"]

LABELS_FILE = "labels.csv"
logger = logging.getLogger(__name__)


def build_class_datalist(
    dataset_dir: str | os.PathLike[str],
    class_names: Sequence[str],
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    subject_pattern: str | None = None,
    phantom: Mapping[str, Any] | None = None,
    spatial_dims: int = 3,
) -> dict[str, list[dict[str, Any]]]:
    """The training, validation and test items of a dataset with one class per volume.

    As `build_datalist`, with three sources of labels. A label is one of `class_names` or its place in them, from 0:
     - a folder with `labels.csv`, columns `file` (relative to the folder) and `label`; it lists the volumes;
     - a datalist .json (or a folder with `dataset.json`) whose items have a "label";
     - a folder with one subfolder per class, named like it. Equal names below two classes are one subject.

    Each class is split by itself, so that its share is the same in all parts: at least one of its subjects goes to
    training, then to validation, then to the test part. Subjects with several classes count as a class of their own.

    Args:
        dataset_dir: see above; '' for the embedded phantom, whose class is its contrast phase, `PHANTOM_PHASES`.
        class_names: the classes, in the order of the network's outputs.
        val_fraction: share of each class's subjects for validation.
        test_fraction: share of each class's subjects for the test part.
        seed: of the split.
        subject_pattern: regular expression, searched in each item's name; its first group is the subject.
        phantom: arguments of `write_phantom`, for an empty `dataset_dir`.
        spatial_dims: 2 finds pictures (.png, .jpg, .bmp) too.

    Returns:
        "training", "validation" and "test": lists of items with "image", "name", "subject" and "label", an int.

    Raises:
        ValueError: fewer than two classes, no volumes, labels that are absent or no class, or too few subjects.
    """
    names = [str(name) for name in class_names]
    if isinstance(class_names, str) or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"class_names must be a list of two or more different names, got {class_names!r}")
    if not str(dataset_dir):
        dataset_dir = write_phantom_phases(phantom_folder(phantom or {}))
    root = dataset_root(dataset_dir)
    lists = as_items(_read_classes(root, spatial_dims), subject_pattern, with_labels=True)
    if lists["test"] and not any("label" in item for item in lists["test"]):  # as in challenges
        logger.warning(f"{root}: the {len(lists['test'])} test volumes have no labels and are left out")
        lists["test"] = []
    _number_classes([item for part in lists.values() for item in part], names, root)
    return split_lists(lists, val_fraction, test_fraction, seed, by_class=True)


def class_weights(
    items: Sequence[Mapping[str, Any]], class_names: Sequence[str], weights: str | Sequence[float] | None = "balanced"
) -> torch.Tensor | None:
    """What an error on each class counts in the loss.

    Balanced weights are N / (K * N_c) for N items of K classes, N_c of them of class c: each class counts the same in
    total, and the mean weight of an item is 1.

    Args:
        items: the training items, with "label" from 0 to K - 1.
        class_names: the K classes.
        weights: "balanced", "none", or one positive number per class, used as it is.

    Returns:
        weights (K), or None for "none".

    Raises:
        ValueError: `weights` is none of these, or "balanced" with a class that no item has.
    """
    names = [str(name) for name in class_names]
    count = Counter(int(item["label"]) for item in items)
    absent = [name for label, name in enumerate(names) if not count[label]]
    if absent:
        text = f"{len(items)} volumes for training, none of them of class {name_some(absent)}"
        if weights == "balanced":
            raise ValueError(
                f"{text}: raise num_labelled (at least one per class, {len(names)}) or lower val_fraction and "
                "test_fraction, add volumes, or take the class out of class_names; --class_weights none trains without"
            )
        logger.warning(f"{text}: the network cannot learn it")
    if weights == "balanced":
        return torch.tensor([len(items) / (len(names) * count[label]) for label in range(len(names))])
    if weights is None or weights == "none":
        return None
    numbers = [] if isinstance(weights, str) else [float(weight) for weight in weights]
    if len(numbers) != len(names) or not all(0 < number < float("inf") for number in numbers):
        raise ValueError(f"class_weights must be balanced, none or {len(names)} positive numbers, got {weights!r}")
    return torch.tensor(numbers)


def _read_classes(root: Path, spatial_dims: int) -> dict[str, list[Volume]]:
    """The volumes with their labels as they are written."""
    datalist = datalist_file(root)
    if (root / LABELS_FILE).is_file():
        parts = {"training": _read_table(root / LABELS_FILE)}
    elif datalist is not None:
        parts = read_datalist(datalist, label_files=False)
    else:
        parts = {"training": _class_folders(root, spatial_dims)}
    return in_parts(parts, root, spatial_dims)


def _read_table(file: Path) -> list[Volume]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = list(reader.fieldnames or [])
        if not {"file", "label"} <= set(columns):
            raise ValueError(f"{file} needs the columns file,label in its first line, which is {','.join(columns)!r}")
        rows = [(str(row["file"] or "").strip(), str(row["label"] or "").strip()) for row in reader]
    repeated = [name for name, number in Counter(name for name, _ in rows).items() if number > 1]
    if repeated or any(not name for name, _ in rows):
        raise ValueError(f"{file}: {'several rows for ' + name_some(repeated) if repeated else 'a row names no file'}")
    volumes = [
        Volume(os.path.normpath(file.parent / name), Path(name).as_posix(), Path(name).as_posix(), label or None)
        for name, label in rows
    ]
    require_files([str(volume.image) for volume in volumes], file)
    return volumes


def _class_folders(root: Path, spatial_dims: int) -> list[Volume]:
    result = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for volume in find_volumes(folder, spatial_dims=spatial_dims):
            # the class tells no subject
            result.append(volume._replace(name=f"{folder.name}/{volume.name}", label=folder.name))
    if not result and find_volumes(root, spatial_dims=spatial_dims):
        raise ValueError(f"{root} has no labels: add {LABELS_FILE} (columns file,label) or one subfolder per class")
    return result


def _number_classes(items: Sequence[dict[str, Any]], names: Sequence[str], source: Path) -> None:
    """Replace each label by the number of its class."""
    missing = [item["name"] for item in items if "label" not in item]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of {len(items)} volumes have no label: {name_some(missing)}. Write it into "
            f'{LABELS_FILE} or under "label" in the datalist, or take the volumes out'
        )
    numbers = [_class_number(item["label"], names) for item in items]
    wrong = [f"{item['name']} ({item['label']!r})" for item, number in zip(items, numbers) if number is None]
    if wrong:
        found = sorted({str(item["label"]) for item in items})
        raise ValueError(
            f"{source}: {len(wrong)} of {len(items)} labels are none of class_names {list(names)} nor their numbers 0 "
            f"to {len(names) - 1}: {name_some(wrong)}. Correct them or set class_names; the labels found are "
            f"{name_some(found, 12)}"
        )
    for item, number in zip(items, numbers):
        item["label"] = number


def _class_number(label: Any, names: Sequence[str]) -> int | None:
    """The class of a label: its name, else its number."""
    text = str(label)
    if text in names:
        return list(names).index(text)
    return int(text) if text.isascii() and text.isdigit() and int(text) < len(names) else None
