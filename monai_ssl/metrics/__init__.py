# SPDX-License-Identifier: Apache-2.0
"""Embedding health and pretext metrics."""

from __future__ import annotations

from .surface_distance_mm import SurfaceDistanceMM

__all__ = ["SurfaceDistanceMM"]
