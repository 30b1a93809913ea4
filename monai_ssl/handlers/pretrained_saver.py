# SPDX-License-Identifier: Apache-2.0
"""Writes what a pretraining run is for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_ssl.handlers._processes import rank
from monai_ssl.handlers._run_state import object_state
from monai_ssl.handlers._steps import BEFORE_SAVE, register_before_save, require_finite
from monai_ssl.networks import save_pretrained
from monai_ssl.networks.provenance import KEY, complete_provenance
from monai_ssl.networks.state_file import write_atomic

__all__ = ["PretrainedSaver"]


class PretrainedSaver:
    """Write the trained weights as plain state dicts when the run is completed, never after an exception.

    - ``model.pt``: of ``network_def``, what a MONAI bundle loads strictly; with the provenance where there is no
      ``encoder``.
    - ``encoder.pt`` and ``encoder.json``, or the names of ``file``: of ``encoder`` with its provenance, by
      ``save_pretrained``.
    - ``pretext.pt``: of the whole pretext network, for ``evaluate.yaml``.

    All tensors are on the CPU, each file is written whole or not at all, and weights that are not finite never.

    Args:
        network_def: the bundle's ``network_def``.
        directory: folder of the files.
        encoder: the pretrained part, if there is one.
        pretext: the pretext network, not its DistributedDataParallel wrapper, if it is to be evaluated later.
        provenance: what the weights shall tell of their origin, see ``make_provenance``; the epochs and iterations
            that were trained are added.
        interval: epochs after which the files are also written; 0: only at the end.
        file: name of the file of ``encoder``.
        include: prefixes of the tensors of ``encoder`` to save, where only a part of it is trained; None: all.

    Raises:
        ValueError: at construction, when ``provenance`` is not plain JSON or names files.
        RuntimeError: when a weight is NaN or infinite; earlier files stay.
    """

    def __init__(
        self,
        network_def: nn.Module,
        directory: str | Path,
        encoder: nn.Module | None = None,
        pretext: nn.Module | None = None,
        provenance: dict[str, Any] | None = None,
        interval: int = 0,
        file: str = "encoder.pt",
        include: Sequence[str] | None = None,
    ) -> None:
        complete_provenance(provenance or {})  # raises now rather than after a week
        self.provenance = dict(provenance or {})
        self.directory = Path(directory)
        self.encoder = encoder
        self.plain = {"model": network_def, **({} if pretext is None else {"pretext": pretext})}
        self.interval = interval
        self.file = file
        self.include = include

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, in every process: the first one writes."""
        register_before_save(engine)
        if self.interval:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write all files."""
        engine.fire_event(BEFORE_SAVE)
        parts = dict(self.plain) if self.encoder is None else {**self.plain, "encoder": self.encoder}
        require_finite(parts.items(), engine)
        if rank() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        trained = {"epochs": engine.state.epoch, "iterations": engine.state.iteration}
        for name, network in self.plain.items():
            state = object_state(network, name)
            if self.encoder is None and self.provenance:
                state._metadata[KEY] = complete_provenance({**self.provenance, **trained})
            for key, value in state.items():  # in place, which keeps the module versions that the dict carries
                state[key] = value.cpu()
            write_atomic(self.directory / f"{name}.pt", partial(torch.save, state))
        if self.encoder is not None:
            save_pretrained(self.encoder, self.directory / self.file, {**self.provenance, **trained}, self.include)
