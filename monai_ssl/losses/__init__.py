# SPDX-License-Identifier: Apache-2.0
"""Losses, one class per file with a free function for each term."""

from __future__ import annotations

from .cpc import CPCLoss, binary, binary_scores, infonce, sum_exponent
from .gather import gather_with_grad
from .local_consistency_loss import LocalConsistencyLoss, local_consistency
from .multi_task import MultiTaskLoss
from .negative_cosine_loss import NegativeCosineLoss, negative_cosine
from .nt_xent import NTXentLoss
from .partition_contrastive import PartitionContrastiveLoss, masked_info_nce
from .region_contrastive import (
    RegionContrastiveLoss,
    published_regions,
    region_info_nce,
    region_negatives,
    region_starts,
    region_vectors,
)
from .slice_pairs import slice_pairs
from .voco import VoCoLoss, base_similarity_loss, inter_volume_loss, overlap_logits, overlap_prediction_loss

__all__ = [
    "CPCLoss",
    "LocalConsistencyLoss",
    "MultiTaskLoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "PartitionContrastiveLoss",
    "RegionContrastiveLoss",
    "VoCoLoss",
    "base_similarity_loss",
    "binary",
    "binary_scores",
    "gather_with_grad",
    "infonce",
    "inter_volume_loss",
    "local_consistency",
    "masked_info_nce",
    "negative_cosine",
    "overlap_logits",
    "overlap_prediction_loss",
    "published_regions",
    "region_info_nce",
    "region_negatives",
    "region_starts",
    "region_vectors",
    "slice_pairs",
    "sum_exponent",
]
