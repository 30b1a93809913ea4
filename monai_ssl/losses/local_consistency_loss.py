# SPDX-License-Identifier: Apache-2.0
"""Voxel-wise agreement of two aligned feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._precision import full_precision, no_autocast

__all__ = ["LocalConsistencyLoss", "local_consistency"]


def local_consistency(input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows of the mean over valid voxels of 2 - 2 cos(input, target).

    Source: the local consistency of PGL (arXiv 2011.12640), with the squared distance of unit vectors that BYOL uses
    for pooled features (arXiv 2006.07733, equation 2). Chance is 2; 0 is reached by a constant output too.

    Args:
        input: predictions ``(N, C, *F)``.
        target: ``(N, C, *F)``, taken without gradient.
        mask: ``(N, *F)`` bool, True where a voxel counts; None for all. A row without any counts 0.

    Returns:
        0-dim tensor in [0, 4].

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    if input.ndim < 3 or input.shape != target.shape:
        raise ValueError(f"input {tuple(input.shape)} and target {tuple(target.shape)} must be equal, (N, C, *F)")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != input.shape[:1] + input.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} of {mask.dtype} must be (N, *F) bool, input {tuple(input.shape)}")
    with no_autocast(input):
        x, t = full_precision(input), full_precision(target.detach())
        distance = (2 - 2 * F.cosine_similarity(x, t, dim=1, eps=1e-12)).flatten(1)  # (N, voxels)
        if mask is None:
            return distance.mean()
        valid = mask.flatten(1)
        return (torch.where(valid, distance, 0.0).sum(1) / valid.sum(1).clamp_min(1)).mean()


class LocalConsistencyLoss(nn.Module):
    """PGL's loss (arXiv 2011.12640): what the network predicts of an anatomical box from one view is the other's.

    See :func:`local_consistency`. Each pair of views weighs the same, however small their overlap; so with equally many
    rows per process the gradient is that of the joined batch without communication. Both directions are rows of one
    batch: the value is their mean, BYOL's their sum.

    Shapes:
        input and target ``(N, C, *F)``, mask ``(N, *F)`` bool; 0-dim result, float32 also under autocast, or float64.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return local_consistency(input, target, mask)
