# SPDX-License-Identifier: Apache-2.0
"""Volumes in: the embedded phantom, datalists, checks, caches and reproducible loading."""

from __future__ import annotations

from .caching import DiskCacheDataset, cached_dataset
from .checks import BadVolumesError, check_volumes
from .datalist import build_datalist, select_labelled
from .keyed import KeyedDataset, KeyedSampler

__all__ = [
    "BadVolumesError",
    "DiskCacheDataset",
    "KeyedDataset",
    "KeyedSampler",
    "build_datalist",
    "cached_dataset",
    "check_volumes",
    "select_labelled",
]
