# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread

from monai_ssl.handlers import ConfusionMatrixHandler
from monai_ssl.visualize import plot_confusion

BATCHES = [
    (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])),
    (torch.tensor([[2, 0]]), torch.tensor([[2, 2]])),
]


def evaluator(handler: ConfusionMatrixHandler) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    return engine


def test_counts_rows_are_truth(tmp_path: Path) -> None:
    handler = ConfusionMatrixHandler(tmp_path / "new", 3, lambda o: o, class_names=["air", "lung", "bone"])
    engine = evaluator(handler)
    for _ in range(2):  # a second evaluation starts anew
        engine.run(BATCHES)
    with (tmp_path / "new" / "confusion_matrix.csv").open(encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows[0][1:] == ["air", "lung", "bone"]
    assert [row[0] for row in rows[1:]] == ["air", "lung", "bone"]
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    picture = imread(tmp_path / "new" / "confusion_matrix.png")
    assert min(picture.shape[:2]) > 200
    assert picture.std() > 0.05


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ConfusionMatrixHandler(tmp_path, 1, lambda o: o)
    with pytest.raises(ValueError, match=r"classes 0 to 2 do not fit num_classes=2"):
        evaluator(ConfusionMatrixHandler(tmp_path, 2, lambda o: o)).run(BATCHES)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        evaluator(ConfusionMatrixHandler(tmp_path, 3, lambda o: (o[0], o[1][:2]))).run(BATCHES)


@pytest.mark.parametrize("number", [2, 5, 30])
def test_picture_says_accuracy_and_chance(number: int, tmp_path: Path) -> None:
    figure = plot_confusion(np.eye(number) * 3 + np.ones((number, number)), tmp_path / "a" / "b.png", title="name")
    title = figure.axes[0].get_title()
    assert title == f"name: accuracy {4 / (3 + number):.3f} (chance {1 / number:.3f})"
    assert (tmp_path / "a" / "b.png").stat().st_size > 1000
    assert len(figure.axes[0].texts) == (number**2 if number <= 12 else 0)


def test_picture_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plot_confusion(np.ones((2, 3)), tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 class names for 2"):
        plot_confusion(np.ones((2, 2)), tmp_path / "x.png", ["one"])
