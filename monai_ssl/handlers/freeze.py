# SPDX-License-Identifier: Apache-2.0
"""Keeps a part of the network fixed for the first epochs."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

__all__ = ["FreezeHandler"]


class FreezeHandler:
    """Train without ``module`` for the first epochs, for a new head on a pretrained encoder.

    While frozen, its parameters get no gradient (so weight decay and momentum do not move them either) and its
    normalisation layers use their running statistics and leave them as they are. What is frozen follows from the
    engine's epoch, so resuming needs no state.

    Args:
        module: part of the network, such as a pretrained encoder; not a DistributedDataParallel wrapper.
        epochs: number of epochs for which it stays frozen.

    Raises:
        ValueError: for negative ``epochs``, and at the start of a run whose network is wrapped in
            DistributedDataParallel without ``find_unused_parameters=True``, which would wait for these gradients.
    """

    def __init__(self, module: nn.Module, epochs: int) -> None:
        if epochs < 0:
            raise ValueError(f"`epochs` must not be negative, got {epochs}.")
        self.module = module
        self.epochs = epochs
        self.frozen = False
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[Any] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Freeze or release at the start of an epoch."""
        frozen = engine.state.epoch <= self.epochs
        if frozen and not self.frozen:
            network = getattr(engine, "network", None)
            if isinstance(network, DistributedDataParallel) and not network.find_unused_parameters:
                raise ValueError("FreezeHandler needs DistributedDataParallel(find_unused_parameters=True).")
            self._freeze()
        elif self.frozen and not frozen:
            self._release()
        self.frozen = frozen

    def _freeze(self) -> None:
        self._parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in self.module.modules():
            if isinstance(layer, _NormBase):
                # the trainer calls network.train() in every iteration; this runs after it
                self._hooks.append(layer.register_forward_pre_hook(_evaluate))

    def _release(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._hooks = [], []


def _evaluate(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    layer.eval()
