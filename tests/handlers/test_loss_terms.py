# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from monai_ssl.handlers import CurvesHandler, LossTermsHandler
from monai_ssl.losses import MultiTaskLoss

WEIGHTS = {"up": 2.0, "down": 0.5}


def engine_of(loss: MultiTaskLoss) -> Engine:
    """At iteration i the terms are i and 10 - i."""

    def step(engine: Engine, _: Any) -> dict[str, Any]:
        i = engine.state.iteration
        pred = {"up": torch.tensor([float(i)], requires_grad=True), "down": torch.tensor([10.0 - i])}
        return {"pred": pred, "label": {}, "loss": loss(pred, {})}

    return Engine(step)


def test_means_over_an_interval(tmp_path: Path) -> None:
    loss = MultiTaskLoss(dict.fromkeys(WEIGHTS, lambda pred, _: pred.mean()), WEIGHTS)
    engine = engine_of(loss)
    LossTermsHandler(loss, interval=3).attach(engine)
    CurvesHandler(tmp_path, interval=3).attach(engine)
    engine.run(range(7), max_epochs=1)
    rows = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert [(float(row["up_loss"]), float(row["down_loss"])) for row in rows] == [(2.0, 8.0), (5.0, 5.0)]
    for row in rows:  # the whole is the sum of its parts
        assert float(row["loss"]) == pytest.approx(sum(w * float(row[f"{n}_loss"]) for n, w in WEIGHTS.items()))
    assert isinstance(engine.state.metrics["up_loss"], float)


def test_a_term_that_is_not_always_there() -> None:
    class Sometimes:
        def terms(self, pred: torch.Tensor, _: Any) -> dict[str, torch.Tensor]:
            return {"pos": pred} if pred > 1 else {"pos": pred, "inter": pred}

    engine = Engine(lambda engine, _: {"pred": torch.tensor(float(engine.state.iteration)), "label": None})
    LossTermsHandler(Sometimes(), interval=2, name="train_{}").attach(engine)
    engine.run(range(2), max_epochs=1)
    assert engine.state.metrics == {"train_pos": 1.5, "train_inter": 1.0}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="CrossEntropyLoss has no method `terms"):
        LossTermsHandler(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LossTermsHandler(MultiTaskLoss({"a": torch.nn.MSELoss()}), interval=0)
