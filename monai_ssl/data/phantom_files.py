# SPDX-License-Identifier: Apache-2.0
"""The torso phantom as a folder of NIfTI files, written once and read by the code that reads patients' scans."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_ssl.data.files import atomic_path
from monai_ssl.data.phantom import PHANTOM_LABELS, phantom_grid, phantom_phase, torso_phantom

# Raise it whenever the same arguments give other volumes: folders of an older generator are then refused.
GENERATOR_VERSION = 1
DEFAULT_SIZE = (96, 80, 64)
MANIFEST = "manifest.json"


def phantom_dir(
    num_subjects: int = 24,
    size: int | Sequence[int] = DEFAULT_SIZE,
    spacing: float | Sequence[float] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Default folder of a written phantom, below `$MONAI_SSL_CACHE` or `~/.cache/monai_ssl`.

    The name holds a hash of the generator's version and of the arguments, which are those of `write_phantom`;
    `num_workers` is taken so that one dict serves both, and does not count.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    manifest = _manifest(num_subjects, size, spacing, seed)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:10]
    root = os.environ.get("MONAI_SSL_CACHE") or Path.home() / ".cache" / "monai_ssl"
    return Path(root).expanduser() / f"phantom-{num_subjects}x{'x'.join(map(str, manifest['size']))}-{digest}"


def write_phantom(
    directory: str | os.PathLike[str],
    num_subjects: int = 24,
    size: int | Sequence[int] = DEFAULT_SIZE,
    spacing: float | Sequence[float] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Write subjects 0 to `num_subjects - 1` of the torso phantom to a folder, or return it if they are there already.

    The folder holds `images/subject_000.nii.gz` (int16, HU), `labels/subject_000.nii.gz` (uint8, `PHANTOM_LABELS`),
    `landmarks/subject_000.json` (RAS+ world mm), `dataset.json` in the form of the Medical Segmentation Decathlon, and
    `manifest.json`. It appears under its name only when complete, also when several processes write it at once.

    Args:
        directory: the folder; `phantom_dir` gives the default place. Its parent is made if need be.
        num_subjects: how many.
        size: voxels per axis (x, y, z).
        spacing: mm per voxel and axis; None spreads the field of view over the size, 4 x 4 x 6 mm at the default.
        seed: of the whole population.
        num_workers: threads; None for up to 4.

    Raises:
        ValueError: an argument is out of range; the message names it.
        FileExistsError: the folder holds something else.
    """
    manifest = _manifest(num_subjects, size, spacing, seed)
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
        raise ValueError(f"num_workers must be None or a whole number from 0, got {num_workers!r}.")
    directory = Path(directory)
    if _is_complete(directory, manifest):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # beside its final place: a rename is atomic only within one file system
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    try:
        _write_all(partial, manifest, num_workers or min(4, os.cpu_count() or 1))
        try:
            partial.rename(directory)
        except OSError:
            # another process was first; its folder is as good as this one if it says so
            if not _is_complete(directory, manifest):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def write_phantom_phases(directory: str | os.PathLike[str]) -> Path:
    """Write `labels.csv` into a folder of `write_phantom`: the contrast phase of each volume, as a class to learn.

    Columns `file` and `label` (one of `PHANTOM_PHASES`). All other files, and labels that are there, stay as they are.

    Args:
        directory: the folder; it may have been written earlier.

    Returns:
        the folder.

    Raises:
        OSError: the folder is not one of `write_phantom`.
    """
    directory = Path(directory)
    labels = directory / "labels.csv"
    if labels.is_file():
        return directory
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    names = sorted(path.name for path in (directory / "images").iterdir())
    with atomic_path(labels) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows([f"images/{name}", phantom_phase(k, manifest["seed"])] for k, name in enumerate(names))
    return directory


def _manifest(
    num_subjects: int, size: int | Sequence[int], spacing: float | Sequence[float] | None, seed: int
) -> dict[str, Any]:
    """What decides on the content of the folder, in a form that JSON gives back unchanged."""
    for name, value, least in (("num_subjects", num_subjects, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}.")
    counts, step = phantom_grid(size, spacing)
    arguments = {"num_subjects": int(num_subjects), "size": list(counts), "spacing": list(step), "seed": int(seed)}
    return {"generator": f"torso_phantom {GENERATOR_VERSION}", **arguments}


def _is_complete(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether the folder holds this phantom; False if there is nothing yet."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    remedy = "Choose another folder, or delete this one to have it written anew."
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise FileExistsError(f"{directory} exists and is not a folder of phantoms. {remedy}") from None
    if found != manifest:
        present = found if isinstance(found, dict) else {}
        other = [f"{key} {present.get(key)!r} instead of {value!r}" for key, value in manifest.items()]
        other = [text for text, (key, value) in zip(other, manifest.items()) if present.get(key) != value]
        raise FileExistsError(f"{directory} holds other phantoms: {', '.join(other) or 'more arguments'}. {remedy}")
    return True


def _write_all(directory: Path, manifest: dict[str, Any], num_workers: int) -> None:
    """Write every file of the folder, the manifest last."""
    for part in ("images", "labels", "landmarks"):
        (directory / part).mkdir(parents=True)
    count = manifest["num_subjects"]
    names = [f"subject_{number:0{max(3, len(str(count - 1)))}d}" for number in range(count)]
    with ThreadPoolExecutor(num_workers) as pool:
        done = pool.map(lambda number: _write_subject(directory, names[number], number, manifest), range(count))
        for _ in tqdm(done, total=count, desc="writing the phantom", leave=False):
            pass
    dataset = {
        "name": "torso phantom",
        "description": "procedural torso CT, no patient data",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for name, value in PHANTOM_LABELS.items()},
        "numTraining": count,
        "numTest": 0,
        "training": [{"image": f"./images/{name}.nii.gz", "label": f"./labels/{name}.nii.gz"} for name in names],
        "test": [],
    }
    (directory / "dataset.json").write_text(json.dumps(dataset, indent=4) + "\n", encoding="utf-8")
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def _write_subject(directory: Path, name: str, number: int, manifest: dict[str, Any]) -> None:
    volume = torso_phantom(number, manifest["size"], manifest["spacing"], manifest["seed"])
    for part, values in (("images", volume.image.astype(np.int16)), ("labels", volume.label)):
        image = nib.Nifti1Image(values, volume.affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(volume.affine, code=1)
        image.set_sform(volume.affine, code=1)
        nib.save(image, directory / part / f"{name}.nii.gz")
    points = {key: [round(float(value), 3) for value in point] for key, point in volume.landmarks.items()}
    text = json.dumps({"space": "RAS+ world, mm", "points": points}, indent=4)
    (directory / "landmarks" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
