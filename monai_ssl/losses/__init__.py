# SPDX-License-Identifier: Apache-2.0
"""Losses, one class per file with a free function for each term."""

from __future__ import annotations

from .voco import VoCoLoss, base_similarity_loss, inter_volume_loss, overlap_logits, overlap_prediction_loss

__all__ = ["VoCoLoss", "base_similarity_loss", "inter_volume_loss", "overlap_logits", "overlap_prediction_loss"]
