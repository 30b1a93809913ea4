# SPDX-License-Identifier: Apache-2.0
"""Points to match between images, and where they may lie (SAM, SAMReg)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["foreground_mask", "grid_points"]


def grid_points(size: Sequence[int], stride: int = 8, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A regular grid of voxels, the first half a stride from the border.

    Source: the points of SAME (arXiv 2109.11572) in its released code.

    Args:
        size: voxels of the image along each axis.
        stride: voxels from point to point.
        mask: (*size) bool, True where points may lie; None for everywhere.

    Returns:
        (P, n) int64, last axis fastest: along each axis stride // 2 - 1 (0 for a stride of 1), and on by the stride.

    Raises:
        ValueError: a stride below 1, or a mask of another size.
    """
    size = tuple(int(s) for s in size)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if mask is not None and tuple(mask.shape) != size:
        raise ValueError(f"mask {tuple(mask.shape)} must have the image's size {size}")
    first, border = max(stride // 2 - 1, 0), -(-stride // 2)
    counts = [max((length - border) // stride + 1, 0) for length in size]
    axes = [first + stride * torch.arange(count) for count in counts]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(size))
    return points if mask is None else points[mask.cpu()[tuple(points.T)].bool()]


def foreground_mask(image: torch.Tensor, threshold: float = -17.4) -> torch.Tensor:
    """Where the network's input is brighter than a threshold.

    Args:
        image: any shape.
        threshold: the default is -500 HU on the scale of SAM, where [-1024, 3071] HU become [-50, 205].

    Returns:
        bool, of the image's shape.
    """
    return image > threshold
