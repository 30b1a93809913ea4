# SPDX-License-Identifier: Apache-2.0
"""Volumes in: the embedded phantom, datalists, checks, caches and reproducible loading."""

from __future__ import annotations

from .caching import DiskCacheDataset, cached_dataset
from .checks import BadVolumesError, check_volumes
from .class_labels import build_class_datalist, class_weights
from .datalist import build_datalist, number_volumes
from .keyed import KeyedDataset, KeyedSampler
from .pair_dataset import PairDataset
from .pair_lists import held_out_pairs, known_pairs, paired_volumes, read_registration_pairs, registration_pairs
from .phantom import PHANTOM_LABELS, PHANTOM_PHASES, PhantomVolume, phantom_phase, torso_phantom
from .phantom_files import phantom_dir, write_phantom, write_phantom_phases
from .prepare_batch import PrepareSliceBatch
from .split import select_labelled

__all__ = [
    "PHANTOM_LABELS",
    "PHANTOM_PHASES",
    "BadVolumesError",
    "DiskCacheDataset",
    "KeyedDataset",
    "KeyedSampler",
    "PairDataset",
    "PhantomVolume",
    "PrepareSliceBatch",
    "build_class_datalist",
    "build_datalist",
    "cached_dataset",
    "check_volumes",
    "class_weights",
    "held_out_pairs",
    "known_pairs",
    "number_volumes",
    "paired_volumes",
    "phantom_dir",
    "phantom_phase",
    "read_registration_pairs",
    "registration_pairs",
    "select_labelled",
    "torso_phantom",
    "write_phantom",
    "write_phantom_phases",
]
