# SPDX-License-Identifier: Apache-2.0
"""Agreement of two sets of vectors, one of them fixed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._precision import full_precision, no_autocast

__all__ = ["NegativeCosineLoss", "negative_cosine"]


def negative_cosine(input: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine of input and target over rows and, for maps, voxels.

    Source: equation 1 of SimSiam (arXiv 2011.10566). BYOL's regression loss (arXiv 2006.07733, equation 2) is
    2 + 2 times the value.

    Args:
        input: predictions ``(N, C)`` or ``(N, C, *F)``.
        target: the same shape, taken without gradient.

    Returns:
        0-dim tensor in [-1, 1].

    Raises:
        ValueError: unequal shapes, or fewer than two axes.
    """
    if input.ndim < 2 or input.shape != target.shape:
        raise ValueError(f"input {tuple(input.shape)} and target {tuple(target.shape)} must be equal, (N, C[, *F])")
    with no_autocast(input):
        x, t = full_precision(input), full_precision(target.detach())
        return -F.cosine_similarity(x, t, dim=1, eps=1e-12).mean()


class NegativeCosineLoss(nn.Module):
    """Minus the mean cosine: BYOL (arXiv 2006.07733), SimSiam (arXiv 2011.10566), the global baseline of PGL.

    See :func:`negative_cosine`. -1 is reached by a constant output too: watch the effective rank of the features.

    Shapes:
        input and target ``(N, C)`` or ``(N, C, *F)``; 0-dim result in float32, also under autocast, or float64.

    Raises:
        ValueError: unequal shapes, or fewer than two axes.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return negative_cosine(input, target)
