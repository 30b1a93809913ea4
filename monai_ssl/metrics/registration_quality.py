# SPDX-License-Identifier: Apache-2.0
"""How a field behaves and how far landmarks are missed, over all pairs of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

__all__ = ["FoldingMetric", "LandmarkErrorMetric"]


class FoldingMetric(CumulativeIterationMetric):
    """Share of voxels at which a field folds: det(I + d ddf / dx) <= 0 by central differences.

    Source: the evaluation of SAME (arXiv 2109.11572).

    Args:
        statistic: "folding", the share; "sdlogj", the standard deviation of log det over what does not fold.

    Shapes:
        list of ddf (n, *size) in voxels, or (B, n, *size) -> (B, 1); the aggregate is their mean.

    Raises:
        ValueError: an unknown statistic.
    """

    def __init__(self, statistic: str = "folding") -> None:
        super().__init__()
        if statistic not in ("folding", "sdlogj"):
            raise ValueError(f"statistic must be 'folding' or 'sdlogj', got {statistic!r}")
        self.statistic = statistic

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        from monai_ssl.apps.registration import folding  # apps is built on metrics

        name = {"folding": "folding_share", "sdlogj": "sdlogj"}[self.statistic]
        rows = [folding(ddf[None])[name] for ddf in y_pred.as_subclass(Tensor)]
        return torch.tensor(rows, dtype=torch.float64)[:, None]

    def aggregate(self) -> Tensor:
        """Mean over all pairs so far, 0-dim."""
        return _mean(self.get_buffer())


class LandmarkErrorMetric(CumulativeIterationMetric):
    """Distance of mapped landmarks to where they belong, in the unit of the points (mm).

    Shapes:
        list of points (P, n) and of their targets -> (B, 1), the mean over the points of each pair; the aggregate is
        the mean over pairs, NaN where there are none.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        if y is None or y_pred.shape != y.shape:
            raise ValueError(f"points {tuple(y_pred.shape)} and targets must be equal, (B, P, n)")
        return (y_pred - y).double().square().sum(-1).sqrt().mean(-1, keepdim=True)

    def aggregate(self) -> Tensor:
        """Mean over all pairs so far, 0-dim."""
        return _mean(self.get_buffer())


def _mean(rows: Any) -> Tensor:
    return torch.tensor(float("nan")) if rows is None or not len(rows) else torch.as_tensor(rows).mean()
