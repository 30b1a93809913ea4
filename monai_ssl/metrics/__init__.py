# SPDX-License-Identifier: Apache-2.0
"""Embedding health, pretext metrics and scores of downstream tasks."""

from __future__ import annotations

from .class_scores import ClassScoreMetric, balanced_accuracy, roc_auc_per_class
from .embedding_health import effective_rank, embedding_std, uniformity
from .matched_voxels import MatchedAccuracyMetric, matched_accuracy, matched_chance
from .overlap_prediction import OverlapPredictionMetric, constant_prediction_loss
from .retrieval import nearest_rows, retrieval_hits
from .surface_distance_mm import SurfaceDistanceMM

__all__ = [
    "ClassScoreMetric",
    "MatchedAccuracyMetric",
    "OverlapPredictionMetric",
    "SurfaceDistanceMM",
    "balanced_accuracy",
    "constant_prediction_loss",
    "effective_rank",
    "embedding_std",
    "matched_accuracy",
    "matched_chance",
    "nearest_rows",
    "retrieval_hits",
    "roc_auc_per_class",
    "uniformity",
]
