# SPDX-License-Identifier: Apache-2.0
"""Moves a momentum teacher after, or before, each optimiser step."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Engine, Events

from monai_ssl.handlers._steps import ends_step, starts_step

__all__ = ["MomentumUpdateHandler", "cosine_momentum"]

_EVENTS = {"iteration_started": Events.ITERATION_STARTED, "iteration_completed": Events.ITERATION_COMPLETED}


def cosine_momentum(step: int, total: int, momentum: float = 0.996, final: float = 1.0) -> float:
    """Share of the teacher that is kept at ``step`` of ``total``, rising from ``momentum`` to ``final``.

    Source: BYOL, section 3.3 (arXiv 2006.07733), ``final - (final - momentum) (cos(pi step / total) + 1) / 2``.
    """
    return final - (final - momentum) * (math.cos(math.pi * step / total) + 1) / 2


class MomentumUpdateHandler:
    """Call ``network.update_teacher(momentum)`` once per optimiser step.

    Source: BYOL (arXiv 2006.07733) for the rising momentum; VoCo (arXiv 2402.17300) moves its teacher at the start of
    a step with a constant 0.9. The value follows from the engine's iteration, so resuming needs no state.

    Args:
        network: pretext network with ``update_teacher(momentum)``; not its DistributedDataParallel wrapper.
        momentum: share of the teacher kept at the first step.
        final_momentum: share kept at the end of the run, reached along a cosine; None keeps ``momentum`` throughout.
        every: iterations per optimiser step, that is the trainer's ``accumulation_steps`` or a multiple of it. The
            shorter step with which MONAI ends an epoch counts too.
        event: ``"iteration_completed"`` (after the step) or ``"iteration_started"`` (before it, with its weights).
        total: iterations in which the momentum rises; None: ``max_epochs`` of the engine, which federated learning
            sets to the epochs of a round.

    Raises:
        ValueError: for a network without ``update_teacher``, a momentum outside [0, 1], ``every`` below 1 or no
            multiple of the trainer's ``accumulation_steps``, an unknown event, ``total`` below 1.
    """

    def __init__(
        self,
        network: Any,
        momentum: float = 0.996,
        final_momentum: float | None = 1.0,
        every: int = 1,
        event: str = "iteration_completed",
        total: int | None = None,
    ) -> None:
        if not hasattr(network, "update_teacher"):
            raise ValueError(
                f"{type(network).__name__} has no method `update_teacher(momentum)`: pass the pretext network itself, "
                "not its DistributedDataParallel wrapper."
            )
        for name, value in (("momentum", momentum), ("final_momentum", final_momentum)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is the share of the teacher that is kept, in [0, 1], got {value}.")
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if event not in _EVENTS:
            raise ValueError(f"`event` must be one of {sorted(_EVENTS)}, got '{event}'.")
        if total is not None and total < 1:
            raise ValueError(f"`total` must be at least 1, got {total}.")
        self.network = network
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.every = every
        self.event = event
        self.total = total

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(_EVENTS[self.event], self)

    def _check(self, engine: Engine) -> None:
        steps = getattr(engine, "accumulation_steps", 1)  # set only after MONAI has attached the handlers
        if self.every % steps:
            raise ValueError(f"`every` ({self.every}) must be a multiple of accumulation_steps ({steps}).")

    def __call__(self, engine: Engine) -> None:
        """Update where this iteration ends (or starts) an optimiser step."""
        due = starts_step if self.event == "iteration_started" else ends_step
        if due(engine, self.every):
            self.network.update_teacher(self._share(engine))

    def _share(self, engine: Engine) -> float:
        state = engine.state
        if self.final_momentum is None:
            return self.momentum
        total = self.total
        if total is None:
            if state.epoch_length is None or state.max_epochs is None:
                raise ValueError("A rising momentum needs a known epoch_length and max_epochs, or `total`.")
            total = state.max_epochs * state.epoch_length
        return cosine_momentum(min(state.iteration - 1, total), total, self.momentum, self.final_momentum)
