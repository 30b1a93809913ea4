# SPDX-License-Identifier: Apache-2.0
"""Shows what a loss is made of."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events

__all__ = ["LossTermsHandler"]


class LossTermsHandler:
    """Write the terms of a loss, averaged over the iterations since the last writing, to ``engine.state.metrics``.

    From there CurvesHandler and TensorBoardStatsHandler take them, beside the whole loss that they read themselves. The
    terms are computed a second time from the network's output, without gradient, and read from the device once per
    interval.

    Attach it in every process, before the handlers that read it: a loss that compares with the items of all processes
    waits for them.

    Args:
        loss: has ``terms(input, target)``, a dictionary of 0-dim tensors, as MultiTaskLoss and VoCoLoss do.
        interval: iterations from one writing to the next; that of CurvesHandler makes its rows means over equal spans.
        name: of the metric, with the term's for ``{}``.

    Raises:
        ValueError: for a loss without ``terms`` or an interval below 1.
    """

    def __init__(self, loss: Any, interval: int = 10, name: str = "{}_loss") -> None:
        if not hasattr(loss, "terms"):
            raise ValueError(f"{type(loss).__name__} has no method `terms(input, target)`.")
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        self.loss = loss
        self.interval = interval
        self.name = name
        self._recent: list[dict[str, torch.Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a ``SupervisedTrainer`` with ``decollate=False``."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Remember the terms; write their means at the end of an interval."""
        output = engine.state.output
        self._recent.append(self.loss.terms(output["pred"], output["label"]))
        if engine.state.iteration % self.interval:
            return
        recent, self._recent = self._recent, []
        for term in {name: None for terms in recent for name in terms}:
            values = [terms[term] for terms in recent if term in terms]
            engine.state.metrics[self.name.format(term)] = float(torch.stack(values).mean())
