# SPDX-License-Identifier: Apache-2.0
"""Registration from anatomical embeddings."""

from __future__ import annotations

from .fields import compose, folding, from_normalised, jacobian_determinant, to_ddf, to_normalised
from .points import foreground_mask, grid_points
from .result import Registration

__all__ = [
    "Registration",
    "compose",
    "folding",
    "foreground_mask",
    "from_normalised",
    "grid_points",
    "jacobian_determinant",
    "to_ddf",
    "to_normalised",
]
