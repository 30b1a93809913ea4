# SPDX-License-Identifier: Apache-2.0
"""Which class was taken for which, over a whole evaluation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from monai_ssl.handlers._processes import gather, rank
from monai_ssl.visualize import plot_confusion

__all__ = ["ConfusionMatrixHandler"]


class ConfusionMatrixHandler:
    """Count predicted against true classes and write `<output_dir>/<name>.csv` and `.png` after each evaluation.

    The table has a row per true class; the picture's title compares the accuracy with chance. Counts of several
    processes are added, the first one writes.

    Args:
        output_dir: folder of table and picture.
        num_classes: number of classes K.
        output_transform: engine output -> (predicted, true), integer class numbers of equal shape.
        class_names: names for the picture and the table; default the numbers.
        name: of the two files.

    Raises:
        ValueError: for fewer than two classes, or, at an evaluation, shapes that differ or a class outside 0..K-1.
    """

    def __init__(
        self,
        output_dir: str | Path,
        num_classes: int,
        output_transform: Callable[[Any], tuple[torch.Tensor, torch.Tensor]],
        class_names: Sequence[str] | None = None,
        name: str = "confusion_matrix",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.output_dir = Path(output_dir)
        self.num_classes = num_classes
        self.output_transform = output_transform
        self.class_names = class_names
        self.name = name
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator with ``decollate=False``, in every process."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _reset(self, _engine: Engine) -> None:
        self.counts.zero_()

    def __call__(self, engine: Engine) -> None:
        """Count this iteration."""
        predicted, true = (torch.as_tensor(x).cpu().long() for x in self.output_transform(engine.state.output))
        if predicted.shape != true.shape:
            raise ValueError(f"predicted {tuple(predicted.shape)} and true classes {tuple(true.shape)} differ in shape")
        for classes in (predicted, true):
            if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                low, high = int(classes.min()), int(classes.max())
                raise ValueError(f"classes {low} to {high} do not fit num_classes={self.num_classes}")
        cells = true.flatten() * self.num_classes + predicted.flatten()
        self.counts += torch.bincount(cells, minlength=self.num_classes**2).view_as(self.counts)

    def _write(self, _engine: Engine) -> None:
        counts = torch.stack(gather(self.counts)).sum(0).numpy()
        if rank() > 0:
            return
        file = self.output_dir / f"{self.name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [str(k) for k in range(self.num_classes)] if self.class_names is None else list(self.class_names)
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, counts.tolist()))
        plot_confusion(counts, file.with_suffix(".png"), self.class_names)
