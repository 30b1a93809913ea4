# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handler_toys import assert_same, everything, interrupt, toy_trainer
from ignite.engine import Engine, Events
from torch import nn

from monai_ssl.handlers import FreezeHandler


def freeze(epochs: int) -> Any:
    """FreezeHandler on the first layers of the toy's student."""
    return lambda network, evaluator: FreezeHandler(network.student[:2], epochs)


def snapshots(trainer: Any) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = []

    def take(engine: Engine) -> None:
        found.append({k: v.clone() for k, v in engine.network.student.state_dict().items()})

    trainer.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED, take)
    trainer.run()
    return found


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_frozen_for_the_first_epochs(epochs: int) -> None:
    trainer = toy_trainer(handlers=(freeze(epochs),))
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.5  # must not move what is frozen
    states = snapshots(trainer)
    frozen = [k for k in states[0] if k.startswith(("0.", "1."))]
    assert {"0.weight", "1.weight", "1.running_mean", "1.num_batches_tracked"} <= set(frozen)
    for epoch in range(1, 4):
        for name in states[0]:
            same = torch.equal(states[epoch][name], states[epoch - 1][name])
            assert same == (name in frozen and epoch <= epochs), (name, epoch)
    assert all(p.requires_grad for p in trainer.network.student.parameters())


def test_parameters_frozen_by_others_stay_frozen() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    handler = FreezeHandler(module, 1)
    engine = Engine(lambda e, b: None)
    handler.attach(engine)
    engine.run([0], max_epochs=2)
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


@pytest.mark.parametrize("iteration", [4, 9])
def test_resumed_run_freezes_alike(tmp_path: Path, iteration: int) -> None:
    whole = toy_trainer(handlers=(freeze(1),))
    whole.run()
    interrupt(tmp_path, iteration, handlers=(freeze(1),), every_iterations=1)
    resumed = toy_trainer(tmp_path, resume=True, handlers=(freeze(1),))
    resumed.run()
    assert_same(everything(resumed), everything(whole))


def test_negative_epochs() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        FreezeHandler(nn.Linear(1, 1), -1)
