# SPDX-License-Identifier: Apache-2.0
"""Registration from anatomical embeddings."""

from __future__ import annotations

from .points import foreground_mask, grid_points

__all__ = ["foreground_mask", "grid_points"]
