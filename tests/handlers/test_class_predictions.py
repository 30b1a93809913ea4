# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from monai_ssl.handlers import ClassPredictionsHandler

LOGITS = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log()
NAMES = ["a,b.nii.gz", "c.nii.gz", "d.nii.gz"]


def evaluate(file: Path, label: Any, names: list[str] = NAMES, classes: tuple[str, ...] = ("no", "yes")) -> list[Any]:
    """The rows of the table after an evaluation of other cases and one of these, in two batches."""

    def step(_: Engine, batch: tuple[list[str], slice]) -> dict[str, Any]:
        cases, part = batch
        engine.state.batch = {"name": cases[part]}
        return {"pred": LOGITS[part], **({} if label is None else {"label": label[part]})}

    engine = Engine(step)
    handler = ClassPredictionsHandler(file, classes)
    handler.attach(engine)
    for cases in (["x", "y", "z"], names):
        engine.run([(cases, slice(0, 2)), (cases, slice(2, 3))])
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_a_row_per_case(tmp_path: Path) -> None:
    rows = evaluate(tmp_path / "new" / "predictions.csv", torch.tensor([1, 1, 0]))
    assert rows == [
        ["name", "true", "predicted", "no", "yes"],
        ["a,b.nii.gz", "yes", "yes", "0.250000", "0.750000"],
        ["c.nii.gz", "yes", "no", "0.500000", "0.500000"],
        ["d.nii.gz", "no", "no", "0.900000", "0.100000"],
    ]


def test_without_labels(tmp_path: Path) -> None:
    rows = evaluate(tmp_path / "predictions.csv", None)
    assert rows[0] == ["name", "predicted", "no", "yes"]
    assert [row[:2] for row in rows[1:]] == [["a,b.nii.gz", "yes"], ["c.nii.gz", "no"], ["d.nii.gz", "no"]]


def test_a_case_of_two_processes_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"d.nii.gz": ["no", "0.9", "0.1"], "e.nii.gz": ["yes", "0.3", "0.7"]}
    monkeypatch.setattr("monai_ssl.handlers.class_predictions.gather", lambda rows: [rows, other])
    rows = evaluate(tmp_path / "predictions.csv", None)
    assert [row[0] for row in rows] == ["name", *NAMES, "e.nii.gz"]


def test_other_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 2\) do not fit the 3 class_names"):
        evaluate(tmp_path / "predictions.csv", None, classes=("a", "b", "c"))
