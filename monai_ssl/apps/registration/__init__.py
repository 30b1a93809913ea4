# SPDX-License-Identifier: Apache-2.0
"""Registration from anatomical embeddings."""

from __future__ import annotations

from .affine import fit_affine, normalised_affine, register_affine
from .alignment import align_pairs, load_embedder, read_alignment, write_alignment
from .coarse import compose_affine, fit_coarse_field, register_coarse
from .deform import register_deform
from .fields import compose, folding, from_normalised, jacobian_determinant, to_ddf, to_normalised
from .file_registration import register_files
from .instance import optimise_instance, register_instance
from .model_file import load_registration
from .pair_transforms import (
    AlignPairD,
    AlignPaird,
    AlignPairDict,
    RegisteredPairD,
    RegisteredPaird,
    RegisteredPairDict,
    initial_displacement,
)
from .pipeline import register
from .points import foreground_mask, grid_points
from .result import Registration

__all__ = [
    "AlignPairD",
    "AlignPairDict",
    "AlignPaird",
    "RegisteredPairD",
    "RegisteredPairDict",
    "RegisteredPaird",
    "Registration",
    "align_pairs",
    "compose",
    "compose_affine",
    "fit_affine",
    "fit_coarse_field",
    "folding",
    "foreground_mask",
    "from_normalised",
    "grid_points",
    "initial_displacement",
    "jacobian_determinant",
    "load_embedder",
    "load_registration",
    "normalised_affine",
    "optimise_instance",
    "read_alignment",
    "register",
    "register_affine",
    "register_coarse",
    "register_deform",
    "register_files",
    "register_instance",
    "to_ddf",
    "to_normalised",
    "write_alignment",
]
