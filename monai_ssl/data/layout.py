# SPDX-License-Identifier: Apache-2.0
"""Which volumes, and which labels, a dataset folder or a datalist file names."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai_ssl.data.dicom import dicom_series, holds_dicom
from monai_ssl.data.files import is_volume, strip_suffix, suffixes

IMAGE_FOLDERS = {"images": "labels", "imagesTr": "labelsTr", "imagesTs": "labelsTs"}  # and where their labels are
_LABEL_FOLDERS = {"labels", "labelstr", "labelsts"}
_LABEL_NAME = re.compile(r"[_-](d?seg|segmentation|labels?|mask)$", re.IGNORECASE)
_CHANNEL = re.compile(r"_\d{4}$")


class Volume(NamedTuple):
    """One image of a dataset: what to load, its name, the path that tells its subject, and its label if it has one."""

    image: str | list[str]
    name: str
    place: str
    label: Any = None


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, with the count of the others."""
    others = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {others} more" if others > 0 else "")


def read_dataset(dataset_dir: str | os.PathLike[str], spatial_dims: int = 3) -> dict[str, list[Volume]]:
    """The volumes of a dataset, in the parts "training", "validation" and "test" that it has itself.

    Args:
        dataset_dir: a datalist (.json) or a folder; in this order: a folder with a datalist `dataset.json`; with
            `images` or `imagesTr` (labels of the same name in `labels`, `labelsTr`; `imagesTs` is the test part);
            any other folder, whose volumes are taken at any depth.
        spatial_dims: 2 takes pictures (.png, .jpg, .bmp) too.

    Raises:
        ValueError: nothing is there, no volume is found, or the datalist is wrong.
    """
    root = dataset_root(dataset_dir)
    datalist = datalist_file(root)
    if datalist is not None:
        parts = read_datalist(datalist)
    elif any((root / folder).is_dir() for folder in ("images", "imagesTr")):
        present = [folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()]
        found = {folder: _image_folder(root, folder, spatial_dims) for folder in present}
        parts = {"test": found.pop("imagesTs", []), "training": [volume for part in found.values() for volume in part]}
    else:
        parts = {"training": find_volumes(root, spatial_dims=spatial_dims)}
    return in_parts(parts, root, spatial_dims)


def dataset_root(dataset_dir: str | os.PathLike[str]) -> Path:
    """The absolute path of a dataset.

    Raises:
        ValueError: it is neither a folder nor a .json file.
    """
    root = Path(os.path.abspath(Path(dataset_dir).expanduser()))
    if not root.exists():
        raise ValueError(f"dataset_dir {root} does not exist")
    if root.suffix.lower() != ".json" and not root.is_dir():
        raise ValueError(f"dataset_dir {root} is neither a folder nor a datalist (.json)")
    return root


def datalist_file(root: Path) -> Path | None:
    """The datalist that a dataset is or holds; nnU-Net's newer dataset.json only describes the volumes."""
    if root.suffix.lower() == ".json":
        return root
    file = root / "dataset.json"
    return file if file.is_file() and "training" in _read_json(file) else None


def in_parts(parts: dict[str, list[Volume]], root: Path, spatial_dims: int = 3) -> dict[str, list[Volume]]:
    """All three parts, in order.

    Raises:
        ValueError: there is no volume.
    """
    if not any(parts.values()):
        supported = ", ".join(suffixes(spatial_dims))
        raise ValueError(f"no volumes found in {root}; supported: {supported}, folders with a DICOM series")
    return {part: parts.get(part, []) for part in ("training", "validation", "test")}


def find_volumes(root: Path, base: Path | None = None, spatial_dims: int = 3) -> list[Volume]:
    """All volumes at any depth below a folder, sorted by name; hidden files and label maps are left out.

    Args:
        root: the folder to search; links to files and folders are followed.
        base: the folder that names are relative to; default `root`.
        spatial_dims: 2 takes pictures too.
    """
    base = base or root
    volumes, label_maps, visited = [], [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder above
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and n.lower() not in _LABEL_FOLDERS)
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        for file in (file for file in files if is_volume(file.name, spatial_dims)):
            name = file.relative_to(base).as_posix()
            if _LABEL_NAME.search(strip_suffix(name)):
                label_maps.append(name)
            else:
                volumes.append(Volume(str(file), name, name))
        if holds_dicom(file for file in files if not is_volume(file.name)):
            volumes += _dicom_volumes(Path(folder), base)
    if label_maps:
        warnings.warn(f"left out as label maps, by their names: {name_some(label_maps)}", stacklevel=2)
    return sorted(volumes, key=lambda volume: volume.name)


def _dicom_volumes(folder: Path, base: Path) -> list[Volume]:
    series = dicom_series(folder)
    place = folder.relative_to(base).as_posix() if folder != base else folder.name
    if len(series) == 1:
        return [Volume(str(folder), place, place)]
    # series that share a folder share the subject: place is the folder, name tells them apart
    return [Volume(str(path), f"{place}/{identifier}", place) for identifier, path in series.items()]


def _image_folder(root: Path, folder: str, spatial_dims: int) -> list[Volume]:
    """The volumes below `root/folder`; nnU-Net's `case_0000`, `case_0001` … are channels of one case."""
    label_root = root / IMAGE_FOLDERS[folder]
    files = _files(label_root, spatial_dims)
    labels = {strip_suffix(file.relative_to(label_root).as_posix()): str(file) for file in files}
    volumes = find_volumes(root / folder, root, spatial_dims)
    stems = {strip_suffix(volume.place) for volume in volumes}
    result = []
    for volume in volumes:
        stem = strip_suffix(volume.place)
        case = _CHANNEL.sub("", stem)
        keys = (stem.partition("/")[2], case.partition("/")[2])  # below the image folder, as below the label folder
        label = labels.get(keys[0]) or labels.get(keys[1])
        result.append(volume._replace(place=case if f"{case}_0000" in stems else volume.place, label=label))
    return result


def _files(folder: Path, spatial_dims: int) -> list[Path]:
    files = (file for file in folder.rglob("*") if is_volume(file.name, spatial_dims))
    return sorted(file for file in files if not file.name.startswith("."))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def read_datalist(file: Path, label_files: bool = True) -> dict[str, list[Volume]]:
    """The parts of a MONAI or Decathlon datalist; relative paths start at its folder.

    Args:
        file: JSON with lists "training", "validation" and "test" (or "testing"), those it has, of image paths or of
            mappings with "image" and perhaps "label"; an image may be a list of files, one per channel.
        label_files: a label that is a string is a path, else the name of a class.

    Raises:
        ValueError: the file is not such a list, an image is absent, or one image is in two parts.
    """
    content = _read_json(file)
    known = ("training", "validation", "test", "testing")
    if not isinstance(content, dict) or not any(isinstance(content.get(part), list) for part in known):
        raise ValueError(f'{file} has no list "training", "validation" or "test" of volumes')
    sections = {part: content.get(part) or [] for part in ("training", "validation", "test")}
    sections["test"] = sections["test"] or content.get("testing") or []
    parts = {
        part: [_entry(entry, file, f"{part}[{index}]", label_files) for index, entry in enumerate(entries)]
        for part, entries in sections.items()
    }
    seen: dict[str, str] = {}
    for part, volumes in parts.items():
        for volume in volumes:
            if seen.setdefault(str(volume.image), part) != part:
                raise ValueError(f"{file}: {volume.name} is in {seen[str(volume.image)]} and in {part}")
    images = [path for volumes in parts.values() for volume in volumes for path in as_list(volume.image)]
    require_files(images, file)
    return parts


def _entry(entry: Any, file: Path, where: str, label_files: bool) -> Volume:
    entry = entry if isinstance(entry, dict) else {"image": entry}
    paths = as_list(entry.get("image"))
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f'{file}: {where} has no path under "image"')
    resolved = [os.path.normpath(file.parent / path) for path in paths]
    label = entry.get("label")
    if label_files and isinstance(label, str):  # else a class or a list of numbers
        label = os.path.normpath(file.parent / label)
    inside = os.path.relpath(resolved[0], file.parent)
    name = Path(resolved[0] if inside.startswith("..") else inside).as_posix()
    return Volume(resolved[0] if len(resolved) == 1 else resolved, name, name, label)


def as_list(value: Any) -> list[Any]:
    """A list or tuple as a list, anything else as a list of one, None as an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def require_files(paths: Sequence[str], source: Path) -> None:
    """Raise a ValueError that names the first of the absent files and their count."""
    absent = [path for path in paths if not os.path.exists(path)]
    if absent:
        raise ValueError(f"{source} lists {len(absent)} files that do not exist: {name_some(absent)}")
