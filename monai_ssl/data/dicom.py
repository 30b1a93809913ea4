# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from monai.utils import optional_import

from monai_ssl.data.files import cache_root

itk, _ = optional_import("itk")

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


@contextmanager
def itk_loading() -> Iterator[None]:
    """ITK loads its modules on first use and SWIG warns meanwhile; as an error, that warning ends the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type [Ss]wig", DeprecationWarning)
        yield


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix or, with no suffix of letters only, by `DICM` at byte 128."""
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES:
        return True
    if path.name.upper() == "DICOMDIR" or suffix[1:].isalpha():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(files: Iterable[Path]) -> bool:
    """Whether one of the files of a folder is DICOM."""
    return any(is_dicom_file(file) for file in files)


def dicom_series(folder: Path) -> dict[str, Path]:
    """One readable folder for each DICOM series in `folder`, by series identifier.

    The series are told apart and ordered like MONAI's `ITKReader` does. It reads a folder as one series and takes the
    first of several (and a list of files as channels), so a folder with several series is shown to it as one folder of
    links per series, in the cache.

    Args:
        folder: a folder with DICOM files.
    """
    with itk_loading():
        names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")  # series date
    names.SetDirectory(str(folder))
    identifiers = sorted(names.GetSeriesUIDs())
    if len(identifiers) == 1:
        return {identifiers[0]: folder}
    return {identifier: _link_series(folder, identifier, names.GetFileNames(identifier)) for identifier in identifiers}


def _link_series(folder: Path, identifier: str, files: Iterable[str]) -> Path:
    targets = [os.path.abspath(file) for file in files]
    digest = hashlib.sha256("\n".join([str(folder), identifier, *targets]).encode()).hexdigest()
    place = cache_root() / "dicom" / digest[:32]
    place.mkdir(parents=True, exist_ok=True)
    for number, target in enumerate(targets):
        link = place / f"{number:06d}.dcm"
        try:
            link.symlink_to(target)
        except FileExistsError:  # an earlier start, or another process of this one
            continue
        except OSError as error:
            raise ValueError(
                f"{folder} holds several DICOM series and links to them cannot be made in {place} ({error}): "
                "put each series in a folder of its own"
            ) from error
    return place
