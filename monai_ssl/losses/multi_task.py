# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of the losses of several pretext tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._precision import full_precision, no_autocast

__all__ = ["MultiTaskLoss"]


class MultiTaskLoss(nn.Module):
    """Sum over the tasks of weight times the task's own loss of its output and its target.

    Source: several self-supervised tasks on one trunk, arXiv 1708.07860. Every loss gets its output in
    float32 also under autocast. A task of weight 0 is computed all the same, and its head has a gradient of zero: so
    its curve can be watched, and under several processes no parameter is left out.

    Args:
        losses: name of each task -> its loss, called with the output of that task and its target, or with None where
            the task has no target.
        weights: name -> weight, 0 or more; None: 1 for every task.

    Shapes: input, name -> output of the task's network; target, name -> tensor, for tasks that have one.

    Raises:
        ValueError: no task, a weight below 0, weights of other names than ``losses``; in a call, an input whose names
            differ from those, or a target for none of them.
    """

    def __init__(
        self, losses: Mapping[str, Callable[[Any, Any], Tensor]], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(losses, 1.0) if weights is None else weights
        if not losses or set(weights) != set(losses):
            raise ValueError(f"losses {sorted(losses)} and weights {sorted(weights)} must have the same names")
        if not all(0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError(f"weights must be 0 or more, got {dict(weights)}")
        self.losses = dict(losses)
        self.weights = {name: float(weights[name]) for name in losses}
        self.modules_among = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))

    def forward(self, input: Mapping[str, Any], target: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weighted sum of the terms, 0-dim."""
        terms = self.terms(input, target)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, input: Mapping[str, Any], target: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The loss of each task before weighting, 0-dim tensors by name."""
        target = {} if target is None else target
        if set(input) != set(self.losses) or not set(target) <= set(self.losses):
            raise ValueError(f"tasks are {sorted(self.losses)}, got outputs {sorted(input)}, targets {sorted(target)}")
        return {name: _term(loss, input[name], target.get(name)) for name, loss in self.losses.items()}


def _term(loss: Callable[[Any, Any], Tensor], output: Any, target: Tensor | None) -> Tensor:
    first = output
    while not isinstance(first, Tensor):
        first = first[0]
    with no_autocast(first):
        return loss(_full(output), target)


def _full(output: Any) -> Any:
    """Tensors in nested sequences, in full precision."""
    return full_precision(output) if isinstance(output, Tensor) else tuple(_full(part) for part in output)
