# SPDX-License-Identifier: Apache-2.0
"""Whether a voxel is most like its own counterpart among all voxels of the other view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

__all__ = ["MatchedAccuracyMetric", "matched_accuracy", "matched_chance"]

STATISTICS = ("accuracy", "chance")
_CHUNK = 2**24  # cosines in memory at a time


def matched_accuracy(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of valid voxels whose most similar valid voxel of the target, in the same row and by cosine, is its own.

    What shows the success of PGL (arXiv 2011.12640): a constant output, which has the best loss, stays at chance.

    Args:
        prediction: ``(N, D, *F)``.
        target: ``(N, D, *F)``.
        mask: ``(N, *F)`` bool, True where a voxel counts; None for all.

    Returns:
        0-dim tensor over the voxels of all rows together; 0 when none is valid. The first voxel wins a tie.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    hits, voxels, _ = _counts(prediction, target, mask).sum(0)
    return hits / voxels.clamp_min(1)


def matched_chance(mask: Tensor) -> Tensor:
    """Expected :func:`matched_accuracy` of outputs that know nothing: 1 / V for one row of V valid voxels.

    Args:
        mask: ``(N, *F)`` bool.

    Returns:
        rows with valid voxels over valid voxels, 0-dim; 0 when none is valid.
    """
    voxels = mask.flatten(1).sum(1).double()
    return (voxels > 0).sum() / voxels.sum().clamp_min(1)


class MatchedAccuracyMetric(CumulativeIterationMetric):
    """:func:`matched_accuracy`, or its chance level, over all pairs of views of a validation; higher is better.

    With ``IgniteMetricHandler`` and the output of ``PGLNet``: ``output_transform`` is
    ``lambda o: (o["pred"][0], o["pred"][1:])``, that is prediction, and target with mask.

    Args:
        statistic: "accuracy" or "chance".

    Shapes:
        called with prediction ``(N, D, *F)`` and either a target of that shape or the pair of it and a mask ``(N, *F)``
        bool; ``aggregate()`` is a 0-dim tensor over all rows since ``reset()``, of all processes.

    Raises:
        ValueError: on an unknown statistic, shapes that do not fit, or ``aggregate`` without any row.
    """

    def __init__(self, statistic: str = "accuracy") -> None:
        super().__init__()
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
        self.statistic = statistic

    def __call__(self, y_pred: Tensor, y: Tensor | Sequence[Tensor], **kwargs: Any) -> Tensor:  # type: ignore[override]
        """One row ``(hits, valid voxels, 1 if any is valid)`` for each row of the batch, ``(N, 3)``."""
        counts = self._compute_tensor(y_pred, y)  # MONAI would take the pair for a list of cases
        self.extend(counts)
        return counts

    def _compute_tensor(self, y_pred: Tensor, y: Any = None, **kwargs: Any) -> Tensor:
        target, mask = (y, None) if isinstance(y, Tensor) else (*y, None)[:2]
        return _counts(y_pred, target, mask)

    def aggregate(self) -> Tensor:
        """The statistic over all rows."""
        rows = self.get_buffer()
        if rows is None:
            raise ValueError("nothing to aggregate: the metric was not called since the last reset")
        hits, voxels, filled = rows.sum(0)
        return (hits if self.statistic == "accuracy" else filled) / voxels.clamp_min(1)


def _counts(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """(N, 3) float64: voxels that find their own, valid voxels, 1 if there are any."""
    if prediction.ndim < 3 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must be equal, (N, D, *F)"
        )
    shape = prediction.shape[:1] + prediction.shape[2:]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=prediction.device)
    elif mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask {tuple(mask.shape)} of {mask.dtype} must be (N, *F) bool, prediction {tuple(prediction.shape)}"
        )
    queries, keys = (
        F.normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(2), dim=1)
        for x in (prediction, target)
    )  # (N, D, V)
    valid = mask.flatten(1)
    hits = torch.stack([(_own(q, k, v) & v).sum() for q, k, v in zip(queries, keys, valid)])
    voxels = valid.sum(1)
    return torch.stack([hits, voxels, voxels > 0], 1).double()


def _own(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """(V,) bool for (D, V): is the most similar valid key the own one?"""
    number = torch.arange(len(valid), device=valid.device)
    best = [
        (part.T @ key).masked_fill(~valid, float("-inf")).argmax(1)
        for part in query.split(max(1, _CHUNK // len(valid)), dim=1)
    ]
    return torch.cat(best) == number
