# SPDX-License-Identifier: Apache-2.0
"""Parts that several pretext networks share."""

from __future__ import annotations

from .encoder_features import EncoderFeatures
from .projection_head import ProjectionHead

__all__ = ["EncoderFeatures", "ProjectionHead"]
