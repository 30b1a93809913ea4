# SPDX-License-Identifier: Apache-2.0
"""Losses, one class per file with a free function for each term."""

from __future__ import annotations

from .cpc import CPCLoss, binary, binary_scores, infonce, sum_exponent
from .multi_task import MultiTaskLoss
from .nt_xent import NTXentLoss
from .voco import VoCoLoss, base_similarity_loss, inter_volume_loss, overlap_logits, overlap_prediction_loss

__all__ = [
    "CPCLoss",
    "MultiTaskLoss",
    "NTXentLoss",
    "VoCoLoss",
    "base_similarity_loss",
    "binary",
    "binary_scores",
    "infonce",
    "inter_volume_loss",
    "overlap_logits",
    "overlap_prediction_loss",
    "sum_exponent",
]
