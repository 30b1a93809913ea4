# SPDX-License-Identifier: Apache-2.0
"""MONAI's TensorBoard handler with the arguments that the bundles give it: decollate is off, warnings are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from handler_toys import toy_trainer
from ignite.engine import Events
from monai.handlers import TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_ssl.handlers import EmbeddingMonitor


def test_loss_health_and_validation_reach_tensorboard(tmp_path: Path) -> None:
    training = TensorBoardStatsHandler(
        log_dir=str(tmp_path), iteration_log=2, tag_name="train_loss", output_transform=lambda x: x["loss"].item()
    )
    trainer = toy_trainer(
        handlers=(lambda network, evaluator: EmbeddingMonitor(network.student, interval=2, min_std=0), training)
    )
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    TensorBoardStatsHandler(
        log_dir=str(tmp_path), iteration_log=False, global_epoch_transform=lambda epoch: trainer.state.epoch
    ).attach(trainer.evaluator)
    trainer.run()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train_loss", "embedding_std", "effective_rank", "uniformity", "mse"}
    points = events.Scalars("train_loss")
    assert [point.step for point in points] == [2, 4, 6, 8, 10, 12, 14]
    assert [point.value for point in points] == pytest.approx(losses[1::2], abs=1e-6)
    assert [point.step for point in events.Scalars("mse")] == [1, 2, 3]
    assert [point.step for point in events.Scalars("effective_rank")] == [1, 2, 3]
