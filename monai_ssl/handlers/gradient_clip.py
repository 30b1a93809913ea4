# SPDX-License-Identifier: Apache-2.0
"""Bounds the norm of the gradient before the optimiser uses it."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents

from monai_ssl.handlers._steps import ends_step

__all__ = ["GradientClipHandler"]


class GradientClipHandler:
    """Scale the gradients of all parameters of an optimiser so that their joint L2 norm is at most ``max_norm``.

    Acts between backward and step of MONAI's ``SupervisedTrainer``: under AMP on unscaled gradients, under gradient
    accumulation only where the optimiser steps. Never waits for the device.

    Args:
        optimizer: the trainer's optimiser.
        max_norm: largest norm; None or 0 switches the handler off.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        if max_norm is not None and max_norm < 0:
            raise ValueError(f"`max_norm` must not be negative, got {max_norm}.")
        self.optimizer = optimizer
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if self.max_norm:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip if the optimiser steps in this iteration."""
        if not self.max_norm or not ends_step(engine):
            return
        if getattr(engine, "scaler", None) is not None:
            engine.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
