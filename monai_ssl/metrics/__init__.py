# SPDX-License-Identifier: Apache-2.0
"""Embedding health and pretext metrics."""

from __future__ import annotations

from .embedding_health import effective_rank, embedding_std, uniformity
from .overlap_prediction import OverlapPredictionMetric, constant_prediction_loss
from .retrieval import nearest_rows, retrieval_hits
from .surface_distance_mm import SurfaceDistanceMM

__all__ = [
    "OverlapPredictionMetric",
    "SurfaceDistanceMM",
    "constant_prediction_loss",
    "effective_rank",
    "embedding_std",
    "nearest_rows",
    "retrieval_hits",
    "uniformity",
]
