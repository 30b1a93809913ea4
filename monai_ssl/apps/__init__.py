# SPDX-License-Identifier: Apache-2.0
"""What pretrained networks are used for: points found again in other scans, lesions tracked, scans registered."""

from __future__ import annotations

from .image_embedding import ImageEmbedding
from .lesion_pairs import read_pairs
from .lesion_tracking import track_lesions, tracking_summary
from .markups import read_markups, write_markups
from .model_file import load_matcher
from .point_matcher import PointMatcher, PointMatches
from .point_matching import (
    map_norms,
    match_points,
    refine_peak,
    sample_embedding,
    similarity,
    similarity_map,
    stable_matches,
)
from .preprocessing import embedding_transform
from .registration import (
    Registration,
    compose,
    folding,
    foreground_mask,
    from_normalised,
    grid_points,
    jacobian_determinant,
    to_ddf,
    to_normalised,
)

__all__ = [
    "ImageEmbedding",
    "PointMatcher",
    "PointMatches",
    "Registration",
    "compose",
    "embedding_transform",
    "folding",
    "foreground_mask",
    "from_normalised",
    "grid_points",
    "jacobian_determinant",
    "load_matcher",
    "map_norms",
    "match_points",
    "read_markups",
    "read_pairs",
    "refine_peak",
    "sample_embedding",
    "similarity",
    "similarity_map",
    "stable_matches",
    "to_ddf",
    "to_normalised",
    "track_lesions",
    "tracking_summary",
    "write_markups",
]
