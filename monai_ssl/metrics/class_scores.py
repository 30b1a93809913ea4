# SPDX-License-Identifier: Apache-2.0
"""Scores of a classification that stay defined when cases of some class are absent."""

from __future__ import annotations

import logging
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, compute_roc_auc

__all__ = ["ClassScoreMetric", "balanced_accuracy", "roc_auc_per_class"]

logger = logging.getLogger(__name__)


def balanced_accuracy(probabilities: torch.Tensor, label: torch.Tensor) -> float:
    """Mean over the classes that occur of the share of their cases that is recognised.

    MONAI's "balanced accuracy" is another number where there are more than two classes: the mean of sensitivity and
    specificity of each class.

    Args:
        probabilities: (N, K), or logits.
        label: classes (N).
    """
    right = (probabilities.argmax(1) == label).double()
    return float(torch.stack([right[label == k].mean() for k in label.unique()]).mean())


def roc_auc_per_class(probabilities: torch.Tensor, label: torch.Tensor) -> list[float]:
    """Area under the ROC curve of each class against all others; nan for a class that no case has, or every case.

    Args:
        probabilities: (N, K).
        label: classes (N).
    """
    values = []
    for k in range(probabilities.shape[1]):
        true = (label == k).long()
        # MONAI would warn, and its mean over classes would be nan
        defined = 0 < int(true.sum()) < len(true)
        values.append(float(compute_roc_auc(probabilities[:, k], true)) if defined else float("nan"))
    return values


class ClassScoreMetric(CumulativeIterationMetric):
    """Balanced accuracy, or macro-averaged one-against-rest area under the ROC curve, over all cases.

    `ROCAUCMetric` of MONAI 1.6.1 gives nan for the mean when one class is absent; here the mean is that of the classes
    for which the area is defined, with a warning in the log that names the others, and nan only when there is none.

    Args:
        score: "balanced_accuracy" or "roc_auc".

    Shapes: called with logits (B, K) and classes (B); `aggregate()` is a number over all cases since `reset()`, of all
    processes.

    Raises:
        ValueError: on an unknown score, unequal numbers of cases, or `aggregate` without any case.
    """

    def __init__(self, score: str) -> None:
        super().__init__()
        if score not in ("balanced_accuracy", "roc_auc"):
            raise ValueError(f"score must be balanced_accuracy or roc_auc, got {score!r}")
        self.score = score

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """One row (1 + K) for each case: its class, then the probabilities."""
        if y is None or y_pred.ndim != 2 or y.shape != y_pred.shape[:1]:
            shape = None if y is None else tuple(y.shape)
            raise ValueError(f"logits {tuple(y_pred.shape)} must be (B, K) and classes {shape} (B)")
        probabilities = y_pred.double().softmax(1)
        return torch.cat([y[:, None].to(probabilities), probabilities], dim=1)

    def aggregate(self) -> float:
        """The score over all cases."""
        rows = self.get_buffer()
        if rows is None:
            raise ValueError("nothing to aggregate: the metric was not called since the last reset")
        label, probabilities = rows[:, 0].long().cpu(), rows[:, 1:].cpu()
        if self.score == "balanced_accuracy":
            return balanced_accuracy(probabilities, label)
        values = torch.tensor(roc_auc_per_class(probabilities, label), dtype=torch.float64)
        if values.isnan().any():
            absent = [k for k in range(len(values)) if not (label == k).any()]
            logger.warning(
                f"the {len(label)} evaluated cases have none of class {', '.join(map(str, absent))}: the area under "
                f"the ROC curve is the mean over {int((~values.isnan()).sum())} of {len(values)} classes"
            )
        return float(values.nanmean())
