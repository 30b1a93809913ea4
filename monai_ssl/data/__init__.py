# SPDX-License-Identifier: Apache-2.0
"""Volumes in: the embedded phantom, datalists, checks, caches and reproducible loading."""

from __future__ import annotations

from .caching import DiskCacheDataset, cached_dataset
from .checks import BadVolumesError, check_volumes
from .datalist import build_datalist, select_labelled
from .keyed import KeyedDataset, KeyedSampler
from .phantom import PHANTOM_LABELS, PhantomVolume, torso_phantom
from .phantom_files import phantom_dir, write_phantom

__all__ = [
    "PHANTOM_LABELS",
    "BadVolumesError",
    "DiskCacheDataset",
    "KeyedDataset",
    "KeyedSampler",
    "PhantomVolume",
    "build_datalist",
    "cached_dataset",
    "check_volumes",
    "phantom_dir",
    "select_labelled",
    "torso_phantom",
    "write_phantom",
]
