# SPDX-License-Identifier: Apache-2.0
"""Pretext tasks as MONAI transforms."""

from __future__ import annotations

from .cube_rotation import (
    RandCubeRotation,
    RandCubeRotationD,
    RandCubeRotationd,
    RandCubeRotationDict,
    rotation_matrix,
    rotation_table,
)
from .feature_affine import FeatureMapAffineD, FeatureMapAffined, FeatureMapAffineDict
from .grid_patches import (
    GridPatches,
    GridPatchesD,
    GridPatchesd,
    GridPatchesDict,
    RandGridPatches,
    RandGridPatchesD,
    RandGridPatchesd,
    RandGridPatchesDict,
    extract_patches,
    patch_grid,
)
from .jigsaw import (
    RandJigsaw,
    RandJigsawD,
    RandJigsawd,
    RandJigsawDict,
    affine_permutations,
    greedy_permutations,
    hamming_permutations,
)
from .relative_location import (
    RandRelativeLocation,
    RandRelativeLocationD,
    RandRelativeLocationd,
    RandRelativeLocationDict,
    location_offsets,
)
from .views import RandViews, RandViewsD, RandViewsd, RandViewsDict
from .voco_crops import (
    RandVoCoCrops,
    RandVoCoCropsD,
    RandVoCoCropsd,
    RandVoCoCropsDict,
    base_origins,
    overlap_fractions,
)

__all__ = [
    "FeatureMapAffineD",
    "FeatureMapAffineDict",
    "FeatureMapAffined",
    "GridPatches",
    "GridPatchesD",
    "GridPatchesDict",
    "GridPatchesd",
    "RandCubeRotation",
    "RandCubeRotationD",
    "RandCubeRotationDict",
    "RandCubeRotationd",
    "RandGridPatches",
    "RandGridPatchesD",
    "RandGridPatchesDict",
    "RandGridPatchesd",
    "RandJigsaw",
    "RandJigsawD",
    "RandJigsawDict",
    "RandJigsawd",
    "RandRelativeLocation",
    "RandRelativeLocationD",
    "RandRelativeLocationDict",
    "RandRelativeLocationd",
    "RandViews",
    "RandViewsD",
    "RandViewsDict",
    "RandViewsd",
    "RandVoCoCrops",
    "RandVoCoCropsD",
    "RandVoCoCropsDict",
    "RandVoCoCropsd",
    "affine_permutations",
    "base_origins",
    "extract_patches",
    "greedy_permutations",
    "hamming_permutations",
    "location_offsets",
    "overlap_fractions",
    "patch_grid",
    "rotation_matrix",
    "rotation_table",
]
