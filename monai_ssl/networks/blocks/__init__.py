# SPDX-License-Identifier: Apache-2.0
"""Parts that several pretext networks share."""

from __future__ import annotations

from .encoder_features import EncoderFeatures
from .overlap_align import align_overlap, overlap_theta
from .projection_head import ProjectionHead
from .velocity_field import integrate_velocity

__all__ = [
    "EncoderFeatures",
    "ProjectionHead",
    "align_overlap",
    "integrate_velocity",
    "overlap_theta",
]
