# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from handler_toys import files, toy_trainer
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from monai_ssl.handlers import FiniteLossHandler, PretrainedSaver


class Spoil:
    """Makes the loss of one iteration NaN or infinite, as a broken volume would."""

    def __init__(self, iteration: int, value: float = float("nan")) -> None:
        self.iteration = iteration
        self.value = value

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        sound = engine.loss_function

        def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return sound(prediction, target) * (self.value if engine.state.iteration == self.iteration else 1.0)

        engine.loss_function = loss


class Heal:
    """Leaves the weights finite: only the loss then tells that something is wrong."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for parameter in engine.network.student.parameters():
            parameter.grad = torch.zeros_like(parameter)


def names_of(iteration: int) -> list[str]:
    names: list[list[str]] = []
    trainer = toy_trainer()
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: names.append(e.state.batch["name"]))
    trainer.run()
    return names[iteration - 1]


class Poison:
    """Spoils a weight after the last step of an epoch, as an infinite gradient does."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration == engine.state.epoch_length:
            next(engine.network.parameters()).data.flatten()[0] = float("nan")


def test_spoilt_weights_stop_the_run_before_validation() -> None:
    """What a validation would score could be kept as the best model."""
    validated: list[int] = []
    trainer = toy_trainer(handlers=(Poison(), FiniteLossHandler()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: validated.append(engine.state.epoch))
    with pytest.raises(RuntimeError, match="is NaN or infinite after iteration"):
        trainer.run()
    assert not validated


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stops_with_iteration_and_files(value: float) -> None:
    trainer = toy_trainer(handlers=(Spoil(7, value), FiniteLossHandler()))
    with pytest.raises(RuntimeError, match=rf"The loss is {value} at iteration 7") as error:
        trainer.run()
    assert str(names_of(7)) in str(error.value)
    assert all(bool(p.isfinite().all()) for p in trainer.network.parameters())  # stopped before the step


@pytest.mark.parametrize("interval, last", [(1, 7), (3, 9), (50, 10)])  # 10: the end of the epoch
def test_looks_every_interval_and_at_the_end_of_an_epoch(interval: int, last: int) -> None:
    trainer = toy_trainer(handlers=(Spoil(7), FiniteLossHandler(interval)))
    with pytest.raises(RuntimeError, match="at iteration 7"):
        trainer.run()
    assert trainer.state.iteration == last


@pytest.mark.parametrize("order", [1, -1])
def test_no_checkpoint_after_a_bad_loss(tmp_path: Path, order: int) -> None:
    pretrained: Any = tmp_path / "models"

    handlers = (Spoil(7), FiniteLossHandler(50), Heal())[::order]
    trainer = toy_trainer(tmp_path / "runs", every_iterations=4, handlers=handlers)
    PretrainedSaver(trainer.network, pretrained).attach(trainer)
    with pytest.raises(RuntimeError, match="at iteration 7"):
        trainer.run()
    assert trainer.state.iteration == 8
    assert files(tmp_path / "runs") == ["checkpoint_iteration=000004.pt", "checkpoint_iteration=000005.pt"]
    assert not pretrained.exists()


def test_saver_asks_before_it_writes(tmp_path: Path) -> None:
    def saver(network: Any, evaluator: Any) -> PretrainedSaver:
        return PretrainedSaver(network, tmp_path, interval=1)

    trainer = toy_trainer(handlers=(saver, Heal(), FiniteLossHandler(50), Spoil(3)))  # the saver acts first
    with pytest.raises(RuntimeError, match="at iteration 3"):
        trainer.run()
    assert files(tmp_path) == []


def test_no_wait_for_the_device_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = FiniteLossHandler(interval=5)
    looks: list[int] = []
    check = handler.check
    monkeypatch.setattr(handler, "check", lambda engine: (looks.append(engine.state.iteration), check(engine)))
    toy_trainer(handlers=(handler,), max_epochs=1).run()
    assert looks == [5, 5]  # the interval, and the end of the epoch
    assert handler._recent == []


def test_batch_without_names() -> None:
    trainer = toy_trainer(handlers=(Spoil(1), FiniteLossHandler(name_key="file")))
    with pytest.raises(RuntimeError, match="unknown, the batch has no key 'file'"):
        trainer.run()


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FiniteLossHandler(0)


def test_exit_code() -> None:
    # StatsHandler listens to exceptions too; whoever does so and does not raise again would end with code 0
    code = (
        "from handler_toys import toy_trainer; from test_finite_loss import Spoil\n"
        "from monai.handlers import StatsHandler; from monai_ssl.handlers import FiniteLossHandler\n"
        "import logging; logging.basicConfig(level='INFO')\n"
        "stats = StatsHandler(output_transform=lambda x: x['loss'])\n"
        "toy_trainer(handlers=(stats, Spoil(4), FiniteLossHandler())).run()"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "The loss is nan at iteration 4" in done.stderr
