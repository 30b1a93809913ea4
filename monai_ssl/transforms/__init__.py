# SPDX-License-Identifier: Apache-2.0
"""Pretext tasks as MONAI transforms."""

from __future__ import annotations

from .feature_affine import FeatureMapAffineD, FeatureMapAffined, FeatureMapAffineDict
from .voco_crops import (
    RandVoCoCrops,
    RandVoCoCropsD,
    RandVoCoCropsd,
    RandVoCoCropsDict,
    base_origins,
    overlap_fractions,
)

__all__ = [
    "FeatureMapAffineD",
    "FeatureMapAffineDict",
    "FeatureMapAffined",
    "RandVoCoCrops",
    "RandVoCoCropsD",
    "RandVoCoCropsDict",
    "RandVoCoCropsd",
    "base_origins",
    "overlap_fractions",
]
