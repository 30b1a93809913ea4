# SPDX-License-Identifier: Apache-2.0
"""What a classifier said of each case."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from monai_ssl.handlers._processes import gather, rank

__all__ = ["ClassPredictionsHandler"]


class ClassPredictionsHandler:
    """Write a table of the cases after each evaluation: name, true class, predicted class, probabilities.

    MONAI's `ClassificationSaver` writes neither a header nor the true class. The column of true classes is left out
    where the cases have none. The rows of several processes are put together, a case that two of them had once.

    Args:
        file: the table (.csv); its folder is made.
        class_names: the K classes, in the order of the network's outputs; also the columns of probabilities.
        name_key: key of the cases' names in the batch.

    Raises:
        ValueError: at an evaluation, logits that are not (B, K).
    """

    def __init__(self, file: str | Path, class_names: Sequence[str], name_key: str = "name") -> None:
        self.file = Path(file)
        self.class_names = [str(name) for name in class_names]
        self.name_key = name_key
        self._rows: dict[str, list[str]] = {}
        self._labelled = False

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator with ``decollate=False`` whose output "pred" is logits, in every process."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _reset(self, _engine: Engine) -> None:
        self._rows, self._labelled = {}, False

    def __call__(self, engine: Engine) -> None:
        """Note the cases of this iteration."""
        logits, label = engine.state.output["pred"], engine.state.output.get("label")
        if logits.ndim != 2 or logits.shape[1] != len(self.class_names):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit the {len(self.class_names)} class_names")
        self._labelled = label is not None
        probabilities = torch.as_tensor(logits).detach().float().softmax(1).cpu()
        true = [[]] * len(probabilities) if label is None else [[self.class_names[int(k)]] for k in label]
        for name, of_case, values in zip(engine.state.batch[self.name_key], true, probabilities):
            predicted = self.class_names[int(values.argmax())]
            self._rows[str(name)] = [*of_case, predicted, *(f"{value:.6f}" for value in values.tolist())]

    def _write(self, _engine: Engine) -> None:
        rows = {name: row for part in gather(self._rows) for name, row in part.items()}
        if rank() > 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["name", *(["true"] if self._labelled else []), "predicted", *self.class_names])
            writer.writerows([name, *row] for name, row in rows.items())
