# SPDX-License-Identifier: Apache-2.0
"""Losses, one class per file with a free function for each term."""

from __future__ import annotations

from .anatomical_embedding import AnatomicalEmbeddingLoss, info_nce, pair_contrast_loss
from .cpc import CPCLoss, binary, binary_scores, infonce, sum_exponent
from .gather import gather_with_grad
from .local_consistency_loss import LocalConsistencyLoss, local_consistency
from .multi_task import MultiTaskLoss
from .negative_cosine_loss import NegativeCosineLoss, negative_cosine
from .nt_xent import NTXentLoss
from .pair_sampling import (
    GlobalPairSampler,
    LocalPairSampler,
    PairSamples,
    choose,
    choose_negatives,
    valid_cells,
)
from .partition_contrastive import PartitionContrastiveLoss, masked_info_nce
from .region_contrastive import (
    RegionContrastiveLoss,
    published_regions,
    region_info_nce,
    region_negatives,
    region_starts,
    region_vectors,
)
from .registration import RegistrationLoss, embedding_loss, local_ncc_loss, ncc_loss, smoothness_loss
from .slice_pairs import slice_pairs
from .voco import VoCoLoss, base_similarity_loss, inter_volume_loss, overlap_logits, overlap_prediction_loss

__all__ = [
    "AnatomicalEmbeddingLoss",
    "CPCLoss",
    "GlobalPairSampler",
    "LocalConsistencyLoss",
    "LocalPairSampler",
    "MultiTaskLoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "PairSamples",
    "PartitionContrastiveLoss",
    "RegionContrastiveLoss",
    "RegistrationLoss",
    "VoCoLoss",
    "base_similarity_loss",
    "binary",
    "binary_scores",
    "choose",
    "choose_negatives",
    "embedding_loss",
    "gather_with_grad",
    "info_nce",
    "infonce",
    "inter_volume_loss",
    "local_consistency",
    "local_ncc_loss",
    "masked_info_nce",
    "ncc_loss",
    "negative_cosine",
    "overlap_logits",
    "overlap_prediction_loss",
    "pair_contrast_loss",
    "published_regions",
    "region_info_nce",
    "region_negatives",
    "region_starts",
    "region_vectors",
    "slice_pairs",
    "smoothness_loss",
    "sum_exponent",
    "valid_cells",
]
