# SPDX-License-Identifier: Apache-2.0
"""Pretext tasks as MONAI transforms."""

from __future__ import annotations

from .feature_affine import FeatureMapAffineD, FeatureMapAffineDict, FeatureMapAffined

__all__ = ["FeatureMapAffineD", "FeatureMapAffineDict", "FeatureMapAffined"]
