# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_ssl.data.facts import Facts, collect_facts
from monai_ssl.data.faults import image_fault, label_fault
from monai_ssl.data.files import atomic_path
from monai_ssl.data.layout import as_list, name_some

__all__ = ["BadVolumesError", "check_volumes"]

Items = list[dict[str, Any]]
SKIPPED_FILE = "skipped_volumes.txt"


class BadVolumesError(ValueError):
    """Volumes that cannot be trained on.

    Args:
        faults: the reason for each file.
        total: the number of volumes that were checked.
    """

    def __init__(self, faults: Mapping[str, str], total: int) -> None:
        self.faults = dict(faults)
        lines = [f"  {file}: {reason}" for file, reason in faults.items()]
        super().__init__(
            "\n".join([f"{len(faults)} of {total} volumes cannot be used:", *lines])
            + "\nRepair or remove them, or go on without them: --skip_bad true"
        )


def check_volumes(
    data: Any,
    keys: Sequence[str] = ("image",),
    pixdim: float | Sequence[float] | None = None,
    min_size: int | Sequence[int] | None = None,
    skip_bad: bool = False,
    report_dir: str | os.PathLike[str] | None = None,
    num_workers: int | None = None,
    progress: bool = True,
    min_training: int = 1,
    spatial_dims: int = 3,
    axcodes: str | None = "RAS",
    in_channels: int | None = None,
    num_classes: int | None = None,
) -> Any:
    """Read every volume once, before training, and stop with one report of those that cannot be used.

    Faults of an image: unreadable, empty, fewer than 2 voxels along an axis or another number of axes, NaN or infinite,
    constant, an affine that is singular, fewer voxels than `min_size` after resampling, another number of channels than
    `in_channels` or most. A label must be readable, finite, below `num_classes`, and on the grid of its image. Files
    that were read before and have not changed are not read again.

    Args:
        data: the lists of `build_datalist`, or one list of items.
        keys: what to check in each item; "label" is checked as the label of "image". Items without a key are passed.
        pixdim: voxel size in mm of training, after `Orientationd(axcodes)`; None keeps the file's own.
        min_size: least number of voxels per axis that the pipeline needs, such as its `roi_size`.
        skip_bad: go on without the faulty volumes, with a warning and the list in `report_dir`.
        report_dir: where `skipped_volumes.txt` (path, tab, reason) is written; the folder of the checkpoint.
        num_workers: processes that read; 0 for none, None for up to 8.
        progress: show a progress bar.
        min_training: least number of volumes in the part "training", such as one whole batch.
        spatial_dims: 3, or 2 for pictures, whose `pixdim` and `min_size` are in the file's own order of axes.
        axcodes: orientation that training gives the volumes, which `pixdim` and `min_size` are in; None: as stored.
        in_channels: number of channels that the network takes; None: what most images have.
        num_classes: of the labels, with the background; None: any.

    Returns:
        `data` itself or, with `skip_bad`, without the faulty items.

    Raises:
        BadVolumesError: volumes are faulty and `skip_bad` is false.
        ValueError: no volume is left in a part that had some, or too few for training.
    """
    parts = dict(data) if isinstance(data, Mapping) else {"data": list(data)}
    items = [item for part in parts.values() for item in part]
    images = {path: item[key] for item in items for key, path in _checked(item, keys).items()}
    facts = dict(zip(images, collect_facts(list(images.values()), num_workers, progress)))
    needs = (pixdim, min_size, spatial_dims, axcodes, in_channels)
    faults = _faults(items, keys, facts, lambda found: image_fault(found, *needs), num_classes)
    shown = _named(items, faults)
    if faults and not skip_bad:
        raise BadVolumesError(shown, len(images))
    if skip_bad and report_dir is not None:
        _write_report(Path(report_dir) / SKIPPED_FILE, shown)
    kept = {part: _without(entries, keys, faults) for part, entries in parts.items()} if faults else parts
    if not faults:
        _check_number(kept, min_training)
        return data
    empty = [part for part, entries in parts.items() if entries and not kept[part]]
    if empty:
        raise ValueError(f"no volume is left in {', '.join(empty)}") from BadVolumesError(shown, len(images))
    _check_number(kept, min_training)
    where = f"listed in {Path(report_dir) / SKIPPED_FILE}" if report_dir is not None else name_some(list(shown))
    warnings.warn(f"{len(faults)} of {len(images)} volumes are left out: {where}", stacklevel=2)
    return kept if isinstance(data, Mapping) else kept["data"]


def _check_number(parts: Mapping[str, Items], min_training: int) -> None:
    number = len(parts.get("training", ()))
    if "training" in parts and number < min_training:
        raise ValueError(
            f"{number} volumes for training are too few, a whole batch needs {min_training}: "
            "lower batch_size or val_fraction, or add volumes"
        )


def _checked(item: dict[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """The files of an item by key; a label that is a number has none."""
    files = {key: as_list(item.get(key)) for key in keys}
    return {key: ", ".join(paths) for key, paths in files.items() if paths and isinstance(paths[0], str)}


def _faults(
    items: Items,
    keys: Sequence[str],
    facts: Mapping[str, Facts],
    fault_of: Callable[[Facts], str | None],
    num_classes: int | None,
) -> dict[str, str]:
    faults: dict[str, str] = {}
    channels: dict[str, dict[str, int]] = {}
    for item in items:
        files = _checked(item, keys)
        for key, path in files.items():
            if key == "label":
                fault = label_fault(facts[path], facts.get(files.get("image", "")), num_classes)
            else:
                fault = fault_of(facts[path])
            if fault is not None:
                faults[path] = fault
            elif key != "label":
                channels.setdefault(key, {})[path] = facts[path]["shape"][0]
    for counts in channels.values():
        usual, number = Counter(counts.values()).most_common(1)[0]
        others = {path: count for path, count in counts.items() if count != usual}
        faults |= {path: f"{count} channels, where {number} volumes have {usual}" for path, count in others.items()}
    return faults


def _named(items: Items, faults: Mapping[str, str]) -> dict[str, str]:
    """The reasons by path; a path that does not show an image's name, such as links to one DICOM series, gets it."""
    names = {", ".join(as_list(item["image"])): str(item.get("name", "")) for item in items if "image" in item}
    return {
        path if names.get(path, "") in path else f"{names[path]} ({path})": reason for path, reason in faults.items()
    }


def _without(items: Items, keys: Sequence[str], faults: Mapping[str, str]) -> Items:
    return [item for item in items if not any(path in faults for path in _checked(item, keys).values())]


def _write_report(file: Path, faults: Mapping[str, str]) -> None:
    if not faults:
        file.unlink(missing_ok=True)  # of an earlier run
        return
    with atomic_path(file) as temporary:
        temporary.write_text("".join(f"{path}\t{reason}\n" for path, reason in faults.items()), encoding="utf-8")
