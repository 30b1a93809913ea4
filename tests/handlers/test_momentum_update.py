# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from handler_toys import ToyNet, run_engine
from monai.engines import SupervisedTrainer
from torch import nn

from monai_ssl.handlers import MomentumUpdateHandler, PrepareBatchTensor, cosine_momentum


@pytest.mark.parametrize(
    "momentum, values", [(0.996, (0.996, 0.9965858, 0.998, 1.0)), (0.99, (0.99, 0.9914645, 0.995, 1.0))]
)
def test_cosine_momentum(momentum: float, values: tuple[float, ...]) -> None:
    found = [cosine_momentum(step, 1000, momentum) for step in (0, 250, 500, 1000)]
    assert found == pytest.approx(values, abs=1e-7)


class Counting:
    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []
        self.iteration = 0

    def update_teacher(self, momentum: float) -> None:
        self.calls.append((self.iteration, momentum))


def count(handler: MomentumUpdateHandler, network: Counting, epochs: int, length: int, steps: int = 1) -> None:
    def step(engine: object, batch: object) -> None:
        network.iteration += 1

    run_engine(step, [handler], epochs=epochs, length=length, accumulation_steps=steps)


def test_rising_momentum_per_iteration() -> None:
    network = Counting()
    count(MomentumUpdateHandler(network), network, epochs=2, length=2)
    expected = [(i + 1, 1 - 0.004 * (math.cos(math.pi * i / 4) + 1) / 2) for i in range(4)]
    assert [c[0] for c in network.calls] == [e[0] for e in expected]
    assert [c[1] for c in network.calls] == pytest.approx([e[1] for e in expected], abs=1e-12)


def test_schedule_that_is_longer_or_shorter_than_the_run() -> None:
    """Federated learning runs a trainer round by round."""
    for total in (8, 3):
        network = Counting()
        count(MomentumUpdateHandler(network, 0.9, total=total), network, epochs=2, length=2)
        expected = [cosine_momentum(min(i, total), total, 0.9) for i in range(4)]
        assert [c[1] for c in network.calls] == expected


@pytest.mark.parametrize(
    "event, iterations",
    [
        # 5 iterations per epoch, 2 per step: MONAI steps after 2, 4 and, at the end of the epoch, 5
        ("iteration_completed", [2, 4, 5, 7, 9, 10]),
        ("iteration_started", [0, 2, 4, 5, 7, 9]),  # counted before the iteration
    ],
)
def test_once_per_optimiser_step(event: str, iterations: list[int]) -> None:
    network = Counting()
    handler = MomentumUpdateHandler(network, 0.9, None, every=2, event=event)
    count(handler, network, epochs=2, length=5, steps=2)
    assert network.calls == [(i, 0.9) for i in iterations]


@pytest.mark.parametrize("event", ["iteration_started", "iteration_completed"])
def test_two_iterations_equal_a_hand_written_loop(event: str) -> None:
    torch.manual_seed(0)
    network = ToyNet(dropout=0.0)
    for parameter in network.teacher.parameters():
        parameter.data.add_(1.0)  # so that the two events differ
    reference = ToyNet(dropout=0.0)
    reference.load_state_dict(network.state_dict())
    data = [{"image": torch.eye(3)[: i + 2] + i, "label": torch.ones(i + 2, 1)} for i in range(2)]
    SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=data, network=network, loss_function=nn.MSELoss(),
        optimizer=torch.optim.SGD(network.student.parameters(), 0.1), prepare_batch=PrepareBatchTensor(),
        decollate=False, train_handlers=[MomentumUpdateHandler(network, 0.9, None, event=event)],
    ).run()  # fmt: skip

    optimizer = torch.optim.SGD(reference.student.parameters(), 0.1)
    pairs = list(zip(reference.teacher.parameters(), reference.student.parameters()))

    def move() -> None:
        for t, s in pairs:
            t.data = 0.9 * t.data + 0.1 * s.data

    for item in data:
        if event == "iteration_started":
            move()
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(item["image"]), item["label"]).backward()
        optimizer.step()
        if event == "iteration_completed":
            move()
    for (name, value), other in zip(reference.state_dict().items(), network.state_dict().values()):
        assert torch.allclose(value, other, atol=1e-6), name


def test_wrong_arguments() -> None:
    network = Counting()
    with pytest.raises(ValueError, match="not its DistributedDataParallel wrapper"):
        MomentumUpdateHandler(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="share of the teacher that is kept"):
        MomentumUpdateHandler(network, momentum=1.1)
    with pytest.raises(ValueError, match="iteration_started"):
        MomentumUpdateHandler(network, event="epoch_started")
    with pytest.raises(ValueError, match="at least 1"):
        MomentumUpdateHandler(network, every=0)
    with pytest.raises(ValueError, match="`total` must be at least 1"):
        MomentumUpdateHandler(network, total=0)
    with pytest.raises(ValueError, match=r"`every` \(1\) must be a multiple of accumulation_steps \(2\)"):
        count(MomentumUpdateHandler(network), network, epochs=1, length=4, steps=2)
