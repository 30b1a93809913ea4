# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handler_toys import assert_same, close, everything, files, interrupt, toy_trainer
from ignite.engine import Engine, Events

from monai_ssl.handlers import ResumeHandler

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def uninterrupted() -> dict[tuple[int, int], dict[str, Any]]:
    """What a run without interruption ends with, for (accumulation_steps, num_workers)."""
    found = {}
    for key in ((1, 0), (2, 0), (1, 1)):
        trainer = toy_trainer(accumulation_steps=key[0], num_workers=key[1])
        trainer.run()
        found[key] = everything(trainer)
        close(trainer)
    return found


@pytest.mark.parametrize(
    "accumulation_steps, iteration, newest",
    [
        # 15 iterations, 5 per epoch; due after 2, 4, .. and at the end of each epoch
        *((1, 3, 2), (1, 5, 4), (1, 6, 5), (1, 9, 8), (1, 11, 10), (1, 15, 14)),
        # optimiser steps after 2, 4, 5, 7, 9, 10, 12, 14, 15: what is due after 6 is written after 7
        *((2, 3, 2), (2, 5, 4), (2, 6, 5), (2, 9, 7), (2, 11, 10), (2, 15, 14)),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Any, accumulation_steps: int, iteration: int, newest: int
) -> None:
    kwargs = {"every_iterations": 2, "accumulation_steps": accumulation_steps}
    interrupt(tmp_path, iteration, **kwargs)
    assert files(tmp_path)[-1] == f"checkpoint_iteration={newest:06d}.pt"
    resumed = toy_trainer(tmp_path, resume=True, **kwargs)
    seen: list[int] = []
    resumed.add_event_handler(Events.ITERATION_STARTED, lambda engine: seen.append(engine.state.iteration))
    resumed.run()
    assert seen == list(range(newest + 1, 16))
    assert_same(everything(resumed), uninterrupted[accumulation_steps, 0])


@pytest.mark.parametrize("saver_last", [False, True])
def test_place_in_the_list_does_not_matter(tmp_path: Path, uninterrupted: Any, saver_last: bool) -> None:
    class See:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.STARTED, lambda e: seen.append((e.state.iteration, e.state.epoch)))

    seen: list[tuple[int, int]] = []
    interrupt(tmp_path, 9, every_iterations=2, saver_last=saver_last)
    resumed = toy_trainer(tmp_path, resume=True, saver_last=saver_last, handlers=(See(),))
    resumed.run()
    assert seen == [(8, 1)]
    assert_same(everything(resumed), uninterrupted[1, 0])


def test_end_of_an_epoch_waits_for_its_handlers(tmp_path: Path, uninterrupted: Any) -> None:
    trainer = toy_trainer(tmp_path, every_iterations=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda e: 1 / 0)  # before the checkpoint of iteration 10
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert files(tmp_path) == ["checkpoint_iteration=000006.pt", "checkpoint_iteration=000008.pt"]
    resumed = toy_trainer(tmp_path, resume=True)
    resumed.run()
    assert_same(everything(resumed), uninterrupted[1, 0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_interrupted_twice(tmp_path: Path, uninterrupted: Any, num_workers: int) -> None:
    interrupt(tmp_path, 6, num_workers=num_workers)
    interrupt(tmp_path, 14, every_iterations=1, num_workers=num_workers, resume=True)
    resumed = toy_trainer(tmp_path, num_workers=num_workers, resume=True)
    resumed.run()
    assert_same(everything(resumed), uninterrupted[1, num_workers])
    close(resumed)


def test_killed_runs_resume(tmp_path: Path, uninterrupted: Any) -> None:
    draw = np.random.default_rng()  # any iteration: seen in the message of a failure
    kills = [(draw.integers(3, 8), False), (draw.integers(8, 14), True), (draw.integers(3, 14), True)]
    # the first two of one run: killed, resumed, killed again while writing
    folders = [tmp_path / "twice", tmp_path / "twice", tmp_path / "writing"]
    arguments = [str(v) for folder, (iteration, writing) in zip(folders, kills) for v in (folder, iteration, writing)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    command = [sys.executable, str(HERE / "killed_run.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 3, done.stderr
    for folder in folders[1:]:
        assert len(list(folder.glob(".*.tmp"))) == 1, (kills, files(folder))
        resumed = toy_trainer(folder, every_iterations=2, resume=True)
        starts: list[int] = []
        resumed.add_event_handler(Events.STARTED, lambda e, starts=starts: starts.append(e.state.iteration))
        resumed.run()
        assert starts[0] > 1, kills
        assert_same(everything(resumed), uninterrupted[1, 0])
        assert files(folder) == ["checkpoint_iteration=000014.pt", "checkpoint_iteration=000015.pt"]


def test_empty_folder_starts_anew(tmp_path: Path, uninterrupted: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = toy_trainer(tmp_path / "new", resume=True)
    trainer.run()
    assert "holds no checkpoint: starting anew" in caplog.text
    assert_same(everything(trainer), uninterrupted[1, 0])


def test_finished_run_says_so(tmp_path: Path, uninterrupted: Any, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(tmp_path).run()
    resumed = toy_trainer(tmp_path, resume=True)
    completed: list[int] = []
    resumed.add_event_handler(Events.ITERATION_STARTED, lambda engine: pytest.fail("trains on"))
    resumed.add_event_handler(Events.COMPLETED, lambda engine: completed.append(engine.state.epoch))
    resumed.run()
    assert completed == [3]  # so that a killed final export is made up for
    assert "already finished (3 epochs); raise max_epochs above 3" in caplog.text
    assert_same(everything(resumed), uninterrupted[1, 0])


def test_more_epochs_follow_the_new_schedule(tmp_path: Path) -> None:
    toy_trainer(tmp_path, max_epochs=2).run()
    resumed = toy_trainer(tmp_path, resume=True, max_epochs=4)
    rates: list[float] = []
    resumed.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rates.append(e.optimizer.param_groups[0]["lr"]))
    resumed.run()
    assert resumed.state.epoch == 4
    assert rates == sorted(rates, reverse=True)  # the old curve would rise again
    whole = toy_trainer(max_epochs=4)
    expected: list[float] = []
    whole.add_event_handler(Events.ITERATION_COMPLETED, lambda e: expected.append(e.optimizer.param_groups[0]["lr"]))
    whole.run()
    assert rates == pytest.approx(expected[10:], abs=1e-12)


def test_other_epoch_length_continues_at_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(tmp_path, 13, every_iterations=2)
    resumed = toy_trainer(tmp_path, resume=True, every_iterations=2, num_items=16)
    seen: list[tuple[int, int]] = []
    resumed.add_event_handler(Events.STARTED, lambda e: seen.append((e.state.epoch, e.state.iteration)))
    resumed.add_event_handler(Events.STARTED, lambda e: seen.append(files(tmp_path)))
    resumed.run()
    assert seen == [(2, 16), ["checkpoint_iteration=000016.pt"]]  # 12 iterations were two epochs of five, and a bit
    assert "5 iterations per epoch, now there are 8" in caplog.text
    assert "continuing at the start of epoch 3" in caplog.text
    assert resumed.state.iteration == 24
    assert files(tmp_path) == ["checkpoint_iteration=000022.pt", "checkpoint_iteration=000024.pt"]


def test_end_of_a_run_is_always_written(tmp_path: Path) -> None:
    toy_trainer(tmp_path, every_epochs=2).run()
    assert files(tmp_path) == ["checkpoint_iteration=000010.pt", "checkpoint_iteration=000015.pt"]


def test_second_run_of_the_same_engine(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_epochs=1)
    trainer.run()
    trainer.state.max_epochs = 2  # as MonaiAlgo does in each round
    trainer.run()
    assert files(tmp_path) == ["checkpoint_iteration=000005.pt", "checkpoint_iteration=000010.pt"]


def test_a_sampler_that_cannot_skip_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(tmp_path, 9, every_iterations=2)
    trainer = toy_trainer()
    trainer.run()
    caplog.clear()
    trainer = toy_trainer()
    objects = {"network": trainer.network, "optimizer": trainer.optimizer}
    ResumeHandler(objects, tmp_path, resume=True, sampler=object()).attach(trainer)
    trainer.run()
    assert "cannot leave out the 3 batches that epoch 2 has already shown" in caplog.text


def test_scaler_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trainer.run() makes a new scaler; here one for the CPU, which doubles its scale every 4 steps
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", 2.0, growth_interval=4))
    amp = {"trainer_kwargs": {"amp": True, "amp_kwargs": {"enabled": False}}}
    interrupt(tmp_path, 8, every_iterations=1, **amp)
    resumed = toy_trainer(tmp_path, resume=True, **amp)
    resumed.run()
    assert resumed.scaler.get_scale() == 2.0 * 2 ** (15 // 4)
