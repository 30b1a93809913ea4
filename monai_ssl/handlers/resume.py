# SPDX-License-Identifier: Apache-2.0
"""Continues an interrupted run where its last checkpoint left it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import CheckpointSaver
from torch import nn

from monai_ssl.handlers._checkpoint_files import (
    list_checkpoints,
    load_newest,
    remove_unfinished,
    renumber,
    write_checkpoint,
)
from monai_ssl.handlers._processes import device_of, gather, rank
from monai_ssl.handlers._random_state import get_random_state, set_random_state
from monai_ssl.handlers._run_state import load_object, object_state, require_complete, set_position, skip_seen
from monai_ssl.handlers._steps import BEFORE_SAVE, ends_epoch, ends_step, register_before_save, require_finite
from monai_ssl.networks.state_file import load_file

__all__ = ["ResumeHandler"]

logger = logging.getLogger(__name__)


class ResumeHandler:
    """Write checkpoints of the whole run and, with ``resume=True``, continue from the newest one that can be read.

    A checkpoint, ``checkpoint_iteration=000120.pt``, holds the objects of ``save_dict``, gradient scaler, engine state
    and the random states of each process. It is written after all other handlers of its iteration (also those listed
    later), between two optimiser steps, under a temporary name that is then changed, and never after an exception or
    with weights that are not finite. On CPU the resumed run then equals the uninterrupted one bit for bit, given

    - data that depend on (seed, epoch, index) alone: ``KeyedDataset`` and ``KeyedSampler``;
    - no ``persistent_workers`` in a validation loader (when its workers start, a number is drawn).

    Behaviour at the start of a run:

    - ``resume=True``, empty folder: starts anew with a warning, so that one command serves a job that is queued again.
    - ``resume=True``, finished run: says so and trains no further; the handlers of ``COMPLETED`` still run.
    - ``resume=False``, folder with checkpoints: refuses.
    - other number of iterations per epoch: continues at the start of the interrupted epoch; other number of processes:
      continues with fresh random states. Both with a warning.
    - a ``LambdaLR`` (``WarmupCosineSchedule``) keeps the curve of the present configuration and gets its place on it,
      so ``max_epochs`` may be raised. Other schedulers are restored whole.

    Args:
        save_dict: what to store, such as ``{network: pretext, optimizer: ..., lr_scheduler: ..., evaluator: ...}``:
            things with ``state_dict`` and ``load_state_dict``; of an engine like the evaluator, its best metric; of a
            ``CheckpointSaver(save_key_metric=True)``, which model was best. Never a DistributedDataParallel wrapper.
            Must cover the trainer's network and optimiser.
        directory: folder of the checkpoints.
        every_iterations: write after so many iterations; 0: never. Under gradient accumulation, at the next step.
        every_epochs: write after so many epochs; 0: never. The end of a run is always written.
        keep: number of newest checkpoints that stay.
        resume: continue from ``directory``.
        sampler: sampler with ``skip(num_samples)``; None takes that of the trainer's loader. Without such a method the
            rest of an interrupted epoch starts over in the data, with a warning.

    Raises:
        ValueError: at construction for an object that cannot be stored, at the start for what ``save_dict`` lacks.
        FileExistsError: at the start of a new run in a folder that holds another.
        RuntimeError: for a checkpoint of another network (names file and key), or when none can be read.
    """

    def __init__(
        self,
        save_dict: Mapping[str, Any],
        directory: str | Path,
        every_iterations: int = 0,
        every_epochs: int = 1,
        keep: int = 2,
        resume: bool = False,
        sampler: Any = None,
    ) -> None:
        # of MONAI's saver of the best model: which one that is, lest the first after a resume counts as best
        self.save_dict = {
            key: item._key_metric_checkpoint if isinstance(item, CheckpointSaver) else item
            for key, item in save_dict.items()
        }
        for key, item in self.save_dict.items():
            if isinstance(item, nn.parallel.DistributedDataParallel):
                raise ValueError(f"save_dict['{key}'] is a DistributedDataParallel wrapper: pass the network inside.")
            if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
                raise ValueError(f"save_dict['{key}'] ({type(item).__name__}) has no state_dict and load_state_dict.")
        if min(every_iterations, every_epochs) < 0 or keep < 1:
            raise ValueError(f"Got every_iterations={every_iterations}, every_epochs={every_epochs}, keep={keep}.")
        self.directory = Path(directory)
        self.every_iterations = every_iterations
        self.every_epochs = every_epochs
        self.keep = keep
        self.resume = resume
        self.sampler = sampler
        self._started = False
        self._due = False
        self._saved = 0
        self._random: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; the place in the list of handlers does not matter."""
        register_before_save(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        first = engine._event_handlers[Events.STARTED]  # the others shall see the restored state
        first.insert(0, first.pop())

    def _start(self, engine: Engine) -> None:
        if self._started:  # a second run() of the same engine, as in federated learning
            return
        self._started = True
        require_complete(engine, self.save_dict)
        existing = list_checkpoints(self.directory)
        if existing and not self.resume:
            raise FileExistsError(
                f"{self.directory} holds the checkpoints of another run (newest: {existing[-1].name}). Continue it "
                "with `--resume true`, or give this run another folder (`--ckpt_dir`)."
            )
        if self.resume:
            self._load(engine)
        if rank() == 0:
            remove_unfinished(self.directory)
        # registered now, so after every handler of the list: the checkpoint holds what they have done
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    # ---- writing

    def _iteration_completed(self, engine: Engine) -> None:
        if self.every_iterations and engine.state.iteration % self.every_iterations == 0:
            self._due = True
        # the end of an epoch waits for validation and epoch-wise schedules; between two steps there are no gradients
        if self._due and ends_step(engine) and not ends_epoch(engine) and engine.state.epoch_length is not None:
            self._save(engine)

    def _epoch_completed(self, engine: Engine) -> None:
        if self._due or (self.every_epochs and engine.state.epoch % self.every_epochs == 0):
            self._save(engine)

    def _completed(self, engine: Engine) -> None:
        if engine.state.iteration != self._saved and ends_step(engine):
            self._save(engine)

    def _save(self, engine: Engine) -> None:
        engine.fire_event(BEFORE_SAVE)
        require_finite(((k, item) for k, item in self.save_dict.items() if isinstance(item, nn.Module)), engine)
        random_states = gather(get_random_state(device_of(engine)))
        iteration = engine.state.iteration
        if rank() == 0:
            scaler = getattr(engine, "scaler", None)
            content = {
                "objects": {key: object_state(item, key) for key, item in self.save_dict.items()},
                "engine": {"iteration": iteration, "epoch_length": engine.state.epoch_length},
                "trainer": object_state(engine, "trainer"),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": random_states,
            }
            write_checkpoint(content, self.directory, iteration, self.keep)
        self._due, self._saved = False, iteration

    # ---- reading

    def _load(self, engine: Engine) -> None:
        path, content = self._read(engine)
        if path is None:
            logger.warning("--resume true, but %s holds no checkpoint: starting anew.", self.directory)
            return
        for key, item in self.save_dict.items():
            if key not in content["objects"]:
                raise RuntimeError(f"{path} has no '{key}', only {sorted(content['objects'])}.")
            load_object(item, content["objects"][key], f"'{key}' of {path}")
        load_object(engine, content["trainer"], "")
        if content["scaler"] and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(content["scaler"])
        if set_position(engine, content["engine"], str(path)):
            skip_seen(engine, self.sampler)
        else:
            gather(None)  # no process is reading any more
            if rank() == 0:
                renumber(path, engine.state.iteration)
        self._saved = engine.state.iteration
        self._prepare_random(engine, content["random"])
        logger.info("Continuing from %s.", path)

    def _read(self, engine: Engine) -> tuple[Path | None, dict[str, Any]]:
        found = load_newest(self.directory) if rank() == 0 else None
        path = gather(None if found is None else found[0])[0]  # all processes take the file that the first one chose
        if found is not None or path is None:
            return path, found[1] if found is not None else {}
        return path, load_file(path)

    def _prepare_random(self, engine: Engine, states: list[dict[str, Any]]) -> None:
        processes = len(gather(None))
        if processes != len(states):
            logger.warning("Checkpoint of %d processes, now there are %d: fresh random states.", len(states), processes)
            return
        self._random = states[rank()]
        loader = getattr(engine, "data_loader", None)
        if engine.state.iteration % engine.state.epoch_length or getattr(loader, "persistent_workers", False):
            # starting the loader draws a number, which the uninterrupted run had drawn before this checkpoint
            engine.add_event_handler(Events.GET_BATCH_STARTED, self._set_random)
        else:
            self._set_random(engine)

    def _set_random(self, engine: Engine) -> None:
        if self._random is not None:
            set_random_state(self._random, device_of(engine))
            self._random = None
