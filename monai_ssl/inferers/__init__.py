# SPDX-License-Identifier: Apache-2.0
"""Inferers for networks whose output grid is coarser than their input."""

from __future__ import annotations

from .feature_map import FeatureMapInferer

__all__ = ["FeatureMapInferer"]
