# SPDX-License-Identifier: Apache-2.0
"""State of the objects and of the engine of a run, to and from what a checkpoint can hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine
from monai.data import MetaTensor
from monai.utils import is_scalar
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from monai_ssl.handlers._checkpoint_files import plain
from monai_ssl.handlers._steps import micro_batch

logger = logging.getLogger(__name__)


def object_state(item: Any, name: str) -> Any:
    """State dict of a network, optimiser or scheduler; of an engine, its best metric and its metrics.

    Raises:
        TypeError: for an entry that ``torch.load(weights_only=True)`` would refuse.
    """
    if isinstance(item, Engine):
        best = {key: plain(getattr(item.state, key, -1), key) for key in ("best_metric", "best_metric_epoch")}
        return {**best, "metrics": scalar_metrics(item)}
    state = item.state_dict()
    if not isinstance(item, nn.Module):
        return plain(state, name)
    for key, value in state.items():  # in place, which keeps the module versions that the dict carries
        if isinstance(value, MetaTensor):
            state[key] = value.as_tensor()
    return state


def scalar_metrics(engine: Engine) -> dict[str, float]:
    """The engine's metrics that are single numbers."""
    metrics = engine.state.metrics.items()
    return {name: float(value) for name, value in metrics if is_scalar(value) and not isinstance(value, str)}


def load_object(item: Any, state: Any, name: str) -> None:
    """Inverse of ``object_state``.

    Raises:
        RuntimeError: when the state does not fit, naming where it comes from.
    """
    if isinstance(item, Engine):
        item.state.best_metric, item.state.best_metric_epoch = state["best_metric"], state["best_metric_epoch"]
        item.state.metrics.update(state["metrics"])
        return
    if isinstance(item, LambdaLR):  # the curve belongs to the configuration, the place on it to the run
        place = {key: state[key] for key in ("last_epoch", "_step_count", "_last_lr") if key in state}
        state = {**item.state_dict(), **place}
    try:
        item.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{name} does not fit this run, whose {type(item).__name__} differs: {error}") from error


def set_position(engine: Engine, saved: dict[str, Any], name: str) -> bool:
    """Let the engine count on from a checkpoint, inside an epoch too.

    Returns:
        False when an epoch now has another length, so that the engine had to go back to the start of the epoch.
    """
    state = engine.state
    length = state.epoch_length or saved["epoch_length"]
    iteration, same = saved["iteration"], length == saved["epoch_length"]
    if not same:
        iteration = iteration // saved["epoch_length"] * length
        logger.warning(
            "%s was written with %d iterations per epoch, now there are %d (other data, batch size or number of "
            "processes): continuing at the start of epoch %d; check the learning-rate schedule.",
            name, saved["epoch_length"], length, iteration // length + 1,
        )  # fmt: skip
    state.epoch_length, state.iteration, state.epoch = length, iteration, iteration // length
    if state.max_epochs is not None and state.epoch >= state.max_epochs:
        logger.warning(
            "The run of %s is already finished (%d epochs); raise max_epochs above %d to train longer.",
            name, state.epoch, state.max_epochs,
        )  # fmt: skip
    return same


def skip_seen(engine: Engine, sampler: Any) -> None:
    """Make the sampler leave out what this epoch has already shown."""
    done = micro_batch(engine) % engine.state.epoch_length
    if done == 0:
        return
    loader: Any = getattr(engine, "data_loader", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    batch_size = getattr(loader, "batch_size", None)
    if batch_size and hasattr(sampler, "skip") and len(loader) == engine.state.epoch_length:
        sampler.skip(done * batch_size)
    else:
        logger.warning(
            "The sampler cannot leave out the %d batches that epoch %d has already shown: the rest of the epoch starts "
            "over in the data. Use KeyedSampler.", done, engine.state.epoch + 1,
        )  # fmt: skip


def require_complete(engine: Engine, save_dict: Mapping[str, Any]) -> None:
    """Refuse to start a run whose checkpoints would lack what it trains.

    Raises:
        ValueError: naming what is missing.
    """
    held = {id(p) for item in save_dict.values() if isinstance(item, nn.Module) for p in item.parameters()}
    network, optimizer = getattr(engine, "network", None), getattr(engine, "optimizer", None)
    lost = [] if network is None else [name for name, p in network.named_parameters() if id(p) not in held]
    if lost:
        raise ValueError(f"save_dict {list(save_dict)} lacks {len(lost)} parameters of the network, as {lost[0]}.")
    if optimizer is not None and not any(item is optimizer for item in save_dict.values()):
        raise ValueError(f"save_dict {list(save_dict)} lacks the trainer's optimizer.")
