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
    AlignPaird,
    RegisteredPaird,
    Registration,
    align_pairs,
    compose,
    compose_affine,
    fit_affine,
    fit_coarse_field,
    folding,
    foreground_mask,
    from_normalised,
    grid_points,
    initial_displacement,
    jacobian_determinant,
    load_embedder,
    load_registration,
    normalised_affine,
    optimise_instance,
    read_alignment,
    register,
    register_affine,
    register_coarse,
    register_deform,
    register_instance,
    to_ddf,
    to_normalised,
    write_alignment,
)

__all__ = [
    "AlignPaird",
    "ImageEmbedding",
    "PointMatcher",
    "PointMatches",
    "RegisteredPaird",
    "Registration",
    "align_pairs",
    "compose",
    "compose_affine",
    "embedding_transform",
    "fit_affine",
    "fit_coarse_field",
    "folding",
    "foreground_mask",
    "from_normalised",
    "grid_points",
    "initial_displacement",
    "jacobian_determinant",
    "load_embedder",
    "load_matcher",
    "load_registration",
    "map_norms",
    "match_points",
    "normalised_affine",
    "optimise_instance",
    "read_alignment",
    "read_markups",
    "read_pairs",
    "refine_peak",
    "register",
    "register_affine",
    "register_coarse",
    "register_deform",
    "register_instance",
    "sample_embedding",
    "similarity",
    "similarity_map",
    "stable_matches",
    "to_ddf",
    "to_normalised",
    "track_lesions",
    "tracking_summary",
    "write_alignment",
    "write_markups",
]
