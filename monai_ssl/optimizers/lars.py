# SPDX-License-Identifier: Apache-2.0
"""Layer-wise adaptive rates for large batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LARS"]


class LARS(Optimizer):
    """Stochastic gradient descent whose step is, for each layer, a fixed share of the length of its weights.

    Source: algorithm 1 of arXiv 1708.03888, as used in BYOL (arXiv 2006.07733). For a weight w with gradient g:
    u = g + weight_decay * w, ratio = trust_coefficient * |w| / |u| (1 where either length is 0), v <- momentum * v +
    ratio * u, w <- w - lr * v. The paper's own denominator is |g| + weight_decay * |w|, and its rate is inside v, which
    differs only while the rate changes. Biases and the weights of norms, all of one axis, get plain momentum with
    ``lr`` and no decay. Made for batches of a thousand views or more; below that AdamW does better.

    Args:
        params: parameters or groups of them; a group may have its own values of all that follow.
        lr: rate; usual is 0.2 times the number of images in a batch over 256, after a warm-up.
        momentum: share of the last step that is kept.
        weight_decay: of the adapted weights.
        trust_coefficient: length of a step over the length of the weights, at lr 1.

    Raises:
        ValueError: a negative ``lr``, ``weight_decay`` or ``trust_coefficient``, ``momentum`` outside [0, 1).
        RuntimeError: in ``step``, a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        trust_coefficient: float = 1e-3,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("trust_coefficient", trust_coefficient)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss anew, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _alike([p for p in group["params"] if p.grad is not None]):
                self._step(weights, group)
        return loss

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        updates = [p.grad for p in weights]
        if any(g.is_sparse for g in updates):
            raise RuntimeError("LARS takes no sparse gradients")
        if weights[0].ndim > 1:
            updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"])
            lengths, steps = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, updates))
            ratios = torch.where((lengths > 0) & (steps > 0), group["trust_coefficient"] * lengths / steps, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Lists of one device and dtype each, with or without the parameters of at most one axis."""
    lists: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        lists.setdefault((p.device, p.dtype, p.ndim > 1), []).append(p)
    return list(lists.values())
