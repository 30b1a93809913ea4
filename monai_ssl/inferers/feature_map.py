# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

from monai.inferers import SlidingWindowInferer

__all__ = ["FeatureMapInferer"]


class FeatureMapInferer(SlidingWindowInferer):
    """Sliding window over a volume for an encoder whose map is `stride` times coarser than its input.

    MONAI's inferer accepts a coarse output, but places it rightly only where windows start on the coarse grid; other
    overlaps give a map that is off by a part of a voxel without any sign. They are refused here.

    Args:
        roi_size: window in voxels, along each axis a multiple of `stride`.
        stride: input voxels per voxel of the map, an int or one per axis.
        overlap: share of a window that the next one covers; roi_size * (1 - overlap) must be a multiple of `stride`.
        sw_batch_size: windows per forward pass.

    Raises:
        ValueError: when windows would not start on the coarse grid.
    """

    def __init__(
        self, roi_size: Sequence[int], stride: int | Sequence[int], overlap: float = 0.5, sw_batch_size: int = 1
    ) -> None:
        strides = [stride] * len(roi_size) if isinstance(stride, int) else list(stride)
        for size, s in zip(roi_size, strides):
            if size % s or (size * (1 - overlap)) % s:
                raise ValueError(
                    f"windows of roi_size {tuple(roi_size)} with overlap {overlap} do not start on a grid of stride "
                    f"{tuple(strides)}: roi_size and roi_size * (1 - overlap) must be multiples of it, "
                    "e.g. an overlap of 0 or 0.5 with a roi_size of twice the stride"
                )
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, overlap=overlap)
