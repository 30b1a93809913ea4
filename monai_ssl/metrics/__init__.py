# SPDX-License-Identifier: Apache-2.0
"""Embedding health, pretext metrics and scores of downstream tasks."""

from __future__ import annotations

from .class_scores import ClassScoreMetric, balanced_accuracy, roc_auc_per_class
from .elastic_matching import ElasticMatchingErrorMetric, wave_displacement
from .embedding_health import effective_rank, embedding_std, uniformity
from .matched_accuracy import MatchedAccuracyMetric, matched_accuracy, matched_chance
from .matching_error import (
    MatchingErrorMetric,
    center_point_matching,
    matching_distance,
    matching_summary,
    view_matching_error,
)
from .overlap_prediction import OverlapPredictionMetric, constant_prediction_loss
from .registration_quality import FoldingMetric, LandmarkErrorMetric
from .retrieval import nearest_rows, retrieval_hits
from .surface_distance_mm import SurfaceDistanceMM

__all__ = [
    "ClassScoreMetric",
    "ElasticMatchingErrorMetric",
    "FoldingMetric",
    "LandmarkErrorMetric",
    "MatchedAccuracyMetric",
    "MatchingErrorMetric",
    "OverlapPredictionMetric",
    "SurfaceDistanceMM",
    "balanced_accuracy",
    "center_point_matching",
    "constant_prediction_loss",
    "effective_rank",
    "embedding_std",
    "matched_accuracy",
    "matched_chance",
    "matching_distance",
    "matching_summary",
    "nearest_rows",
    "retrieval_hits",
    "roc_auc_per_class",
    "uniformity",
    "view_matching_error",
    "wave_displacement",
]
