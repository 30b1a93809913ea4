# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from handler_toys import interrupt, toy_trainer
from ignite.engine import Engine, Events

from monai_ssl.handlers import RunProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(file: io.StringIO, **kwargs: Any) -> Any:
    return lambda network, evaluator: RunProgressBar(evaluator=evaluator, file=file, **kwargs)


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Any:
    """Makes each iteration of an engine last so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Tick:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.ITERATION_STARTED, self.tick)

        def tick(self) -> None:
            now[0] += seconds

    return Tick()


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    toy_trainer(handlers=(clock(monkeypatch, 8.0), bar(file, interval=1))).run()
    lines = file.getvalue().splitlines()
    steps = [line for line in lines if "validation" not in line]
    # 8 s per iteration: after 32, 64, 96 s, and at the end
    assert [line.split()[1] for line in steps] == ["4/15", "8/15", "12/15", "15/15"]
    assert "[00:32<01:28,  8.00s/it" in steps[0]  # 11 more of 8 s
    assert "epoch 1/3" in steps[0]
    assert "loss 0." in steps[0]
    assert "lr 0." in steps[0]
    validations = [line for line in lines if "validation" in line]
    assert [line.split(":")[0] for line in validations] == [f"validation after epoch {epoch}" for epoch in (1, 2, 3)]
    assert "mse 0." in validations[0]
    assert "\r" not in file.getvalue()


def test_days_make_hundreds_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    engine = Engine(lambda e, b: {"loss": loss})
    loss = toy_trainer().network.student[3].bias.sum()
    clock(monkeypatch, 10.0).attach(engine)
    RunProgressBar(interval=1, file=file).attach(engine)
    engine.run(list(range(20_000)))  # 2.3 days
    assert 50 < len(file.getvalue().splitlines()) < 500


def test_loss_is_read_at_the_interval_only() -> None:
    reads: list[int] = []

    class Loss:
        def detach(self) -> Loss:
            return self

        def __float__(self) -> float:
            reads.append(engine.state.iteration)
            return 0.5

    engine = Engine(lambda e, b: {"loss": Loss()})
    RunProgressBar(interval=4, first_gap=0.0, file=io.StringIO()).attach(engine)
    engine.run(list(range(10)))
    assert reads == [4, 8, 10]


def test_bar_in_a_terminal() -> None:
    file = Terminal()
    toy_trainer(handlers=(bar(file, interval=5),)).run()
    text = file.getvalue()
    assert "15/15" in text
    assert "epoch 3/3, loss 0." in text
    assert "validation after epoch 2: mse" in text
    assert "\r" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_resumed_run_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    interrupt(tmp_path, 11)
    file = Terminal() if terminal else io.StringIO()
    tick = () if terminal else (clock(monkeypatch, 30.0),)
    toy_trainer(tmp_path, resume=True, handlers=(*tick, bar(file, interval=1))).run()
    if terminal:
        assert "10/15" in file.getvalue().split("\r")[1]
    else:
        assert "11/15 [00:30<02:00, 30.00s/it" in file.getvalue().splitlines()[0]  # by the speed of this run


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RunProgressBar(interval=0)
