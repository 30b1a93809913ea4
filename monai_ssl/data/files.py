# SPDX-License-Identifier: Apache-2.0
"""Volume files: their suffixes, what identifies their content, and writing so that no reader sees half a file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_DETACHED_HEADERS = (".nhdr", ".mhd")


def suffixes(spatial_dims: int = 3) -> tuple[str, ...]:
    """The suffixes of files that are taken as images; in 2D pictures too."""
    return VOLUME_SUFFIXES + PICTURE_SUFFIXES if spatial_dims == 2 else VOLUME_SUFFIXES


def is_volume(name: str, spatial_dims: int = 3) -> bool:
    """Whether a file name ends like an image that MONAI reads with NiBabel or ITK, in 2D also with PIL."""
    return name.lower().endswith(suffixes(spatial_dims))


def strip_suffix(name: str) -> str:
    """A file name or path without its image suffix; other names stay as they are."""
    for suffix in VOLUME_SUFFIXES + PICTURE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def cache_root() -> Path:
    """The folder for everything that can be computed again: `$MONAI_SSL_CACHE`, else `~/.cache/monai_ssl`."""
    return Path(os.environ.get("MONAI_SSL_CACHE") or Path.home() / ".cache" / "monai_ssl").expanduser().absolute()


def is_first_process() -> bool:
    """Whether this process shows progress: all but the first of a distributed run (`RANK`) keep quiet."""
    return os.environ.get("RANK", "0") == "0"


def file_signature(image: str | os.PathLike[str] | Sequence[str]) -> list[list[str | int]]:
    """Path, size in bytes and modification time in ns of every file that makes up one image.

    Args:
        image: a file, a folder with a DICOM series, or a list of them (one per channel).

    Raises:
        OSError: a file is absent.
    """
    if not isinstance(image, (str, os.PathLike)):
        return [entry for part in image for entry in file_signature(part)]
    path = Path(os.path.abspath(image))
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    elif path.name.lower().endswith(_DETACHED_HEADERS):  # the voxels lie in a file beside the header
        files = sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(f"{strip_suffix(path.name)}."))
    else:
        files = [path]
    states = [(str(file), file.stat()) for file in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it takes the place of `path` when the block ends without an error.

    Two processes may write the same file: each reader sees one of the two whole files. The folder is made if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:80]}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
