# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose loss or weights have become NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from monai_ssl.handlers._steps import BEFORE_SAVE, register_before_save, require_finite

__all__ = ["FiniteLossHandler"]


class FiniteLossHandler:
    """Stop training at a NaN or infinite loss, naming the iteration and the files of its batch.

    Losses stay on the device and are looked at together: every ``interval`` iterations, at the end of each epoch, and
    before ``ResumeHandler`` or ``PretrainedSaver`` writes. So no checkpoint holds what came after a bad loss. Weights
    are looked at where an epoch ends, before it is validated: a step can spoil them though its loss was finite.

    Args:
        interval: iterations between two looks, each of which waits for the device. With 1 the run stops before the
            bad gradient reaches the weights.
        name_key: key of the batch with the names of its files.
    """

    def __init__(self, interval: int = 1, name_key: str = "name") -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        self.interval = interval
        self.name_key = name_key
        self._recent: list[tuple[int, torch.Tensor, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a ``SupervisedTrainer`` with ``decollate=False``."""
        register_before_save(engine)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check_weights)
        engine.add_event_handler(BEFORE_SAVE, self.check)

    def __call__(self, engine: Engine) -> None:
        """Remember the loss and the names of this iteration."""
        batch = engine.state.batch
        names = batch.get(self.name_key) if isinstance(batch, Mapping) else None
        self._recent.append((engine.state.iteration, engine.state.output["loss"].detach(), names))
        if engine.state.iteration % self.interval == 0:
            self.check(engine)

    def check(self, engine: Engine) -> None:
        """Look at all losses since the last look.

        Raises:
            RuntimeError: at the first loss that is NaN or infinite.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return
        losses = torch.stack([loss.float() for _, loss, _ in recent]).tolist()
        for (iteration, _, names), loss in zip(recent, losses):
            if not math.isfinite(loss):
                raise RuntimeError(self._message(iteration, loss, names))

    def check_weights(self, engine: Engine) -> None:
        """Look at all weights of the trainer's network.

        Raises:
            RuntimeError: at the first that is NaN or infinite.
        """
        require_finite([("network", engine.network)], engine)

    def _message(self, iteration: int, loss: float, names: Any) -> str:
        files = f"unknown, the batch has no key '{self.name_key}'" if names is None else names
        return (
            f"The loss is {loss} at iteration {iteration}; files of its batch: {files}. No checkpoint was written "
            "since. Look at these volumes for NaN or constant values, lower the learning rate, clip gradients "
            "(GradientClipHandler) or train without amp; then continue with `--resume true`."
        )
