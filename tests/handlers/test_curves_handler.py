# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from handler_toys import files, interrupt, toy_trainer
from ignite.engine import Events

from monai_ssl.handlers import CurvesHandler, EmbeddingMonitor


def curves(directory: Path, **kwargs: Any) -> Any:
    """CurvesHandler with the toy's evaluator."""
    return lambda network, evaluator: CurvesHandler(directory, evaluator=evaluator, **kwargs)


def table(directory: Path) -> list[dict[str, str]]:
    with open(directory / "curves.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(curves(tmp_path, interval=2),))
    rates: list[float] = []
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: rates.append(e.optimizer.param_groups[0]["lr"]))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=7), lambda e: e.state.metrics.update(rank=5.0, text="no"))
    trainer.run()
    rows = table(tmp_path)
    assert list(rows[0]) == ["iteration", "epoch", "loss", "lr", "val_mse", "rank"]
    assert [row["iteration"] for row in rows] == ["2", "4", "5", "6", "8", "10", "10", "12", "14", "15"]
    assert [row["epoch"] for row in rows] == ["1", "1", "1", "2", "2", "2", "2", "3", "3", "3"]
    steps = [row for row in rows if row["loss"]]
    means = [sum(losses[i : i + 2]) / 2 for i in range(0, 14, 2)]
    assert [float(row["loss"]) for row in steps] == pytest.approx(means, abs=1e-6)
    assert float(steps[1]["lr"]) == pytest.approx(rates[4])  # the one for the next iteration
    assert [row["rank"] for row in steps] == ["", "", "", "5.0", "5.0", "5.0", "5.0"]
    validations = [row for row in rows if row["val_mse"]]
    assert [row["iteration"] for row in validations] == ["5", "10", "15"]
    assert float(validations[-1]["val_mse"]) == pytest.approx(trainer.evaluator.state.metrics["mse"])


def test_picture_at_the_end_and_every_so_often(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(curves(tmp_path, interval=2, plot_interval=2, chance={"loss": 0.5}),))
    seen: list[list[str]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: seen.append(files(tmp_path)))
    trainer.run()
    assert seen == [[], ["curves.csv"], ["curves.csv", "curves.png"]]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_resumed_run_drops_rows_beyond_its_checkpoint(tmp_path: Path) -> None:
    def monitor(network: Any, evaluator: Any) -> EmbeddingMonitor:  # its numbers stay in the rows between two looks
        return EmbeddingMonitor(network.student, interval=4, min_std=0.0)

    whole = toy_trainer(handlers=(monitor, curves(tmp_path / "whole", interval=1)))
    whole.run()
    handlers = (monitor, curves(tmp_path / "curves", interval=1))
    interrupt(tmp_path / "runs", 11, handlers=handlers, every_iterations=3)
    path = tmp_path / "curves" / "curves.csv"
    path.write_text(path.read_text() + "1")  # the beginning of "11,.."
    assert [row["iteration"] for row in table(tmp_path / "curves")][-3:] == ["10", "10", "1"]
    (tmp_path / "runs" / "checkpoint_iteration=000010.pt").unlink()
    toy_trainer(tmp_path / "runs", resume=True, handlers=handlers).run()
    assert table(tmp_path / "curves") == table(tmp_path / "whole")


def test_new_run_keeps_the_old_table(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text("iteration,epoch,loss\n1,1,0.5\n")
    toy_trainer(handlers=(curves(tmp_path, interval=5),)).run()
    assert (tmp_path / "curves.old.csv").read_text() == "iteration,epoch,loss\n1,1,0.5\n"
    assert [row["iteration"] for row in table(tmp_path)] == ["5", "5", "10", "10", "15", "15"]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CurvesHandler(tmp_path, interval=0)
