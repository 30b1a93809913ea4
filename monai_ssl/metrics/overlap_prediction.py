# SPDX-License-Identifier: Apache-2.0
"""How well a VoCo network reads positions, measured against predictors that look at nothing."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric

from monai_ssl.losses.voco import VARIANTS, overlap_prediction_loss

__all__ = ["OverlapPredictionMetric", "constant_prediction_loss"]

STATISTICS = ("accuracy", "mae", "skill")


def constant_prediction_loss(
    target: torch.Tensor,
    constants: torch.Tensor,
    pos_weight: str = "overlap",
    negative: str = "log",
    eps: float = 1e-6,
) -> torch.Tensor:
    """Loss pos + neg of `overlap_prediction_loss` when every cell is predicted by the same constant.

    Args:
        target: overlap fractions, (B, R, K).
        constants: predictions in [0, 1], (S,).
        pos_weight: see `overlap_prediction_loss`.
        negative: see `overlap_prediction_loss`.
        eps: see `overlap_prediction_loss`.

    Returns:
        (B, S).

    Raises:
        ValueError: when `target` is not (B, R, K) or `constants` not (S,).
    """
    if target.ndim != 3 or constants.ndim != 1:
        raise ValueError(
            f"needs target (B, R, K) and constants (S,), got {tuple(target.shape)}, {tuple(constants.shape)}"
        )
    constants = constants.to(torch.promote_types(constants.dtype, target.dtype))
    logits = constants[:, None, None, None].expand(-1, *target.shape)  # (S, B, R, K)
    pos, neg = overlap_prediction_loss(logits, target, pos_weight, negative, eps)
    return (pos + neg).T


class OverlapPredictionMetric(CumulativeIterationMetric):
    """Accuracy, mean absolute error or skill of predicted overlaps (VoCo, arXiv 2402.17300).

    - "accuracy": share of random crops whose highest logit is at a base crop of highest overlap; ties count as right.
    - "mae": mean of |logit - overlap|.
    - "skill": 1 - L / min_c L_c with L the loss pos + neg of the variant and L_c that of the constant prediction c out
      of 0, 0.01, ..., 1, both averaged over all volumes. Above 0 beats every constant, 1 is perfect.

    A falling loss alone proves nothing, since orthogonal embeddings already lower it. Logits across volumes, from
    `VoCoLoss.logits` with a partner, show anatomy; within a volume, crops can be matched by the voxels they share.

    Args:
        statistic: "accuracy", "mae" or "skill".
        variant: of `VoCoLoss`, for "skill".
        eps: of `VoCoLoss`, for "skill".

    Shapes: called with logits (B, R, K) and target (B, R, K); `aggregate()` is a 0-dim tensor over all volumes since
    `reset()`, of all processes.

    Raises:
        ValueError: on an unknown statistic or variant, on unequal shapes, or on `aggregate` without any volume.
    """

    def __init__(self, statistic: str = "accuracy", variant: str = "v2", eps: float = 1e-6) -> None:
        super().__init__()
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got '{statistic}'")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got '{variant}'")
        self.statistic = statistic
        self.variant = variant
        self.eps = eps

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """One row for each volume: its value, followed for "skill" by the loss of every constant."""
        if y is None or y.ndim != 3 or y.shape != y_pred.shape:
            shape = None if y is None else tuple(y.shape)
            raise ValueError(f"logits {tuple(y_pred.shape)} and target {shape} must both be (B, R, K)")
        logits = y_pred if y_pred.dtype == torch.float64 else y_pred.float()
        target = y.to(logits)
        if self.statistic == "mae":
            return (logits - target).abs().mean((1, 2))[:, None]
        if self.statistic == "accuracy":
            chosen = target.gather(-1, logits.argmax(-1, keepdim=True))  # (B, R, 1)
            return (chosen == target.amax(-1, keepdim=True)).to(logits.dtype).mean(1)
        variant = VARIANTS[self.variant]
        terms = variant.pos_weight, variant.negative, self.eps
        pos, neg = overlap_prediction_loss(logits, target, *terms)
        constants = torch.arange(101, dtype=logits.dtype, device=logits.device) / 100
        return torch.cat([(pos + neg)[:, None], constant_prediction_loss(target, constants, *terms)], dim=1)

    def aggregate(self) -> torch.Tensor:
        """The statistic over all volumes.

        Returns:
            0-dim tensor.
        """
        rows = self.get_buffer()
        if rows is None:
            raise ValueError("nothing to aggregate: the metric was not called since the last reset")
        values = rows.mean(0)
        return 1 - values[0] / values[1:].min() if self.statistic == "skill" else values[0]
