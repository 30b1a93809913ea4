# SPDX-License-Identifier: Apache-2.0
"""Tells how long a network takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

__all__ = ["NetworkSeconds"]


class NetworkSeconds:
    """Write the mean seconds of a forward pass, with the batch's way to the device, to ``engine.state.metrics``.

    What comes before and after, loading and the metrics, is not counted. On a GPU each pass is waited for.

    Attach it before the handlers that read it, such as MetricsSaver.

    Args:
        name: of the metric.
    """

    def __init__(self, name: str = "seconds") -> None:
        self.name = name
        self._started = 0.0
        self._seconds: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator or trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._seconds_from_here)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the mean of the epoch."""
        if self._seconds:
            engine.state.metrics[self.name] = sum(self._seconds) / len(self._seconds)

    def _seconds_from_here(self, _: Engine) -> None:
        self._seconds = []

    def _start(self, engine: Engine) -> None:
        self._started = _now(engine)

    def _stop(self, engine: Engine) -> None:
        self._seconds.append(_now(engine) - self._started)


def _now(engine: Engine) -> float:
    device: Any = getattr(engine.state, "device", None)
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
