# SPDX-License-Identifier: Apache-2.0
"""Keeps a table of the run's numbers and draws them."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from monai_ssl.handlers._processes import rank
from monai_ssl.handlers._run_state import scalar_metrics
from monai_ssl.visualize import plot_curves

__all__ = ["CurvesHandler"]


class CurvesHandler:
    """Append to ``<output_dir>/curves.csv`` while training, and draw ``<output_dir>/curves.png``.

    A row holds iteration, epoch, the loss averaged since the last row, learning rate and what other handlers left in
    the trainer's metrics (embedding health); a validation adds a row of its own with ``val_`` columns. The loss is
    summed on the device and read once per row. A resumed run drops the rows beyond its checkpoint; a new run moves an
    older table to ``curves.old.csv``.

    Args:
        output_dir: folder of table and picture.
        interval: iterations per row.
        optimizer: where the learning rate is read; None takes the trainer's.
        evaluator: engine whose metrics are added after each of its runs.
        plot_interval: epochs after which the picture is drawn; it is drawn at the end anyway.
        chance: column name -> chance level, drawn as a dashed line, such as ``{loss: 0.5892}``.
    """

    def __init__(
        self,
        output_dir: str | Path,
        interval: int = 10,
        optimizer: Any = None,
        evaluator: Engine | None = None,
        plot_interval: int = 10,
        chance: Mapping[str, float] | None = None,
    ) -> None:
        if interval < 1 or plot_interval < 1:
            raise ValueError(f"`interval` and `plot_interval` must be at least 1, got {interval} and {plot_interval}.")
        self.file = Path(output_dir) / "curves.csv"
        self.interval = interval
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.plot_interval = plot_interval
        self.chance = dict(chance or {})
        self._columns: list[str] = []
        self._loss: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; only the first process writes."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.plot_interval), self._plot)
        engine.add_event_handler(Events.COMPLETED, self._plot)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._validated, engine)

    def __call__(self, engine: Engine) -> None:
        """Remember the loss; write a row at the end of an interval."""
        self._loss.append(engine.state.output["loss"].detach())
        if engine.state.iteration % self.interval:
            return
        loss, self._loss = float(torch.stack(self._loss).mean()), []
        optimizer = getattr(engine, "optimizer", None) if self.optimizer is None else self.optimizer
        rate = {} if optimizer is None else {"lr": float(optimizer.param_groups[0]["lr"])}
        self._append(engine, {"loss": loss, **rate, **scalar_metrics(engine)})

    def _validated(self, evaluator: Engine, engine: Engine) -> None:
        self._append(engine, {f"val_{name}": value for name, value in scalar_metrics(evaluator).items()})

    def _open(self, engine: Engine) -> None:
        self._columns, self._loss = [], []
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        if engine.state.iteration == 0:
            os.replace(self.file, self.file.with_name("curves.old.csv"))
            return
        columns, rows = _read(self.file)
        self._rewrite(columns, [row for row in rows if int(row["iteration"]) <= engine.state.iteration])

    def _append(self, engine: Engine, values: dict[str, float]) -> None:
        row = {"iteration": engine.state.iteration, "epoch": engine.state.epoch, **values}
        new = [name for name in row if name not in self._columns]
        if new:  # seldom: a metric shows up for the first time
            rows = _read(self.file)[1] if self._columns else []
            self._rewrite([*self._columns, *new], rows)
        with open(self.file, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        temporary = self.file.with_name("curves.csv.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.file)
        self._columns = columns

    def _plot(self, engine: Engine) -> None:
        if self.file.exists():
            plot_curves(self.file, self.file.with_name("curves.png"), chance=self.chance)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]  # a killed process may leave half a row
        return list(reader.fieldnames or []), rows
