# SPDX-License-Identifier: Apache-2.0
"""What several handlers ask of a trainer: where the optimiser steps, and whether its weights may be saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from ignite.engine import Engine
from torch import nn

# Fired before a file of weights is written, so that whoever knows of a reason not to write can raise.
BEFORE_SAVE = "monai_ssl_before_save"


def register_before_save(engine: Engine) -> None:
    """Make ``BEFORE_SAVE`` known to the engine; handlers may do so in any order."""
    if not engine.has_registered_events(BEFORE_SAVE):
        engine.register_events(BEFORE_SAVE)


def micro_batch(engine: Engine) -> int:
    """Place of the current iteration in its epoch, counted from 1."""
    length = engine.state.epoch_length
    return engine.state.iteration if length is None else (engine.state.iteration - 1) % length + 1


def ends_epoch(engine: Engine) -> bool:
    """Whether the current iteration is the last of its epoch."""
    return micro_batch(engine) == engine.state.epoch_length


def ends_step(engine: Engine, every: int | None = None) -> bool:
    """Whether the optimiser steps in this iteration; MONAI also steps at the end of an epoch, with what it has."""
    every = getattr(engine, "accumulation_steps", 1) if every is None else every
    return micro_batch(engine) % every == 0 or ends_epoch(engine)


def starts_step(engine: Engine, every: int) -> bool:
    """Whether this iteration is the first whose gradients go into the next optimiser step."""
    return (micro_batch(engine) - 1) % every == 0


def require_finite(modules: Iterable[tuple[str, nn.Module]], engine: Engine) -> None:
    """Raise when a parameter is NaN or infinite, with one wait for the device per module.

    Raises:
        RuntimeError: naming the iteration and the first such parameter.
    """
    for key, module in modules:
        named = list(module.named_parameters())
        if not named:
            continue
        finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in named]).tolist()
        if not all(finite):
            name = named[finite.index(False)][0]
            raise RuntimeError(
                f"Parameter '{name}' of '{key}' is NaN or infinite after iteration {engine.state.iteration}: nothing "
                "is saved, earlier files stay as they are. Lower the learning rate, clip gradients "
                "(GradientClipHandler) or train without amp; then continue with `--resume true`."
            )
