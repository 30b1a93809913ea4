# SPDX-License-Identifier: Apache-2.0
"""Whether the row of another set that is most like a row is its own."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["nearest_rows", "retrieval_hits"]


def nearest_rows(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """For each row of `input` the number of the most similar row of `target`, by cosine; the first one on ties.

    Args:
        input: (..., D); all leading axes are rows, in C order.
        target: the same.

    Returns:
        (M,) int64.

    Raises:
        ValueError: when the rows differ in width.
    """
    if input.shape[-1] != target.shape[-1]:
        raise ValueError(f"rows of input {tuple(input.shape)} and target {tuple(target.shape)} differ in width")
    rows, others = (F.normalize(x.detach().float().flatten(0, -2), dim=1) for x in (input, target))
    return (rows @ others.T).argmax(1)


def retrieval_hits(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits (M,), 1 where the nearest row of `target` is row i itself, and (M,) ones to compare with.

    So `ignite.metrics.Accuracy` takes it; with M rows chance is 1 / M.

    Args:
        input: (..., D); all leading axes are rows, in C order.
        target: the same shape.

    Raises:
        ValueError: when the shapes differ.
    """
    if input.shape != target.shape:
        raise ValueError(f"input {tuple(input.shape)} and target {tuple(target.shape)} must have one shape")
    nearest = nearest_rows(input, target)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).long(), torch.ones_like(nearest)
