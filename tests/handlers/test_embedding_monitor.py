# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from handler_toys import assert_same, everything, toy_trainer
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import nn

from monai_ssl.handlers import EmbeddingMonitor
from monai_ssl.metrics import effective_rank, embedding_std, uniformity

NAMES = ("embedding_std", "effective_rank", "uniformity")


class Encoder(nn.Module):
    """Feature maps of a small 3D network, finest first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv3d(4, 8, 3, 2, padding=1), nn.Dropout(0.5))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        fine = self.first(image)
        return [fine, self.second(fine)]

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([level.flatten(2).mean(2) for level in self(image)], 1)


def watch(monitor: EmbeddingMonitor, *batches: torch.Tensor) -> Engine:
    engine = Engine(lambda e, b: None)
    monitor.attach(engine)
    engine.run([{"image": batch} for batch in batches])
    return engine


def images(*leading: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*leading, 1, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_those_of_the_metrics() -> None:
    network, crops = Encoder(), images(2, 6)
    found = watch(EmbeddingMonitor(network.embed, interval=1, flatten=2), crops).state.metrics
    with torch.no_grad():
        embeddings = network.eval().embed(crops.flatten(0, 1))
    expected = (embedding_std(embeddings), effective_rank(embeddings), uniformity(embeddings))
    assert [found[name] for name in NAMES] == pytest.approx([float(value) for value in expected], abs=1e-6)
    assert found["effective_rank"] > 2
    assert all(type(found[name]) is float for name in NAMES)


def test_all_batches_of_an_epoch_together() -> None:
    """The last batch of an evaluation may be small, and its rank with it."""
    network, batches = Encoder(), [images(5, seed=1), images(4, seed=2), images(1, seed=3)]
    monitor = EmbeddingMonitor(network.embed, interval=None)
    engine = watch(monitor, *batches)
    engine.state.metrics.clear()
    engine.run([{"image": batch} for batch in batches], max_epochs=2)
    with torch.no_grad():
        together = network.eval().embed(torch.cat(batches))
    assert engine.state.metrics["effective_rank"] == pytest.approx(float(effective_rank(together)), abs=1e-5)


@pytest.mark.parametrize("num, healthy", [(2, True), (4, True), (8, False)])
def test_few_images_cannot_have_a_high_rank(num: int, healthy: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Two directions: all that three or four images can be asked for, a collapse of eight."""
    directions = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[torch.arange(num) % 2] * (1 + torch.arange(num)[:, None])
    metrics = watch(EmbeddingMonitor(nn.Flatten(), interval=1, min_effective_rank=2), directions).state.metrics
    assert metrics["effective_rank"] < 2
    assert ("collapsed" in caplog.text) is not healthy


def test_module_whose_last_map_counts() -> None:
    network = Encoder()
    found = watch(EmbeddingMonitor(network, interval=1), images(9)).state.metrics
    with torch.no_grad():
        pooled = network.eval()(images(9))[-1].flatten(2).mean(2)
    assert found["effective_rank"] == pytest.approx(float(effective_rank(pooled)), abs=1e-5)


def test_constant_volumes_have_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    constant = torch.full((2, 6, 1, 5, 6, 7), 0.3)
    metrics = watch(EmbeddingMonitor(Encoder().embed, interval=1, flatten=2), constant).state.metrics
    assert metrics["effective_rank"] <= 2
    assert metrics["embedding_std"] < 1e-6
    assert "have collapsed at iteration 1" in caplog.text
    assert "lower the learning rate" in caplog.text


def test_one_direction_has_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    # brightness alone differs: the embeddings spread, along one direction
    network = nn.Flatten()
    scale = torch.arange(1.0, 9.0).reshape(8, 1, 1, 1, 1)
    metrics = watch(EmbeddingMonitor(network, interval=1, min_std=0.0), images(1) * scale + 1).state.metrics
    assert metrics["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert "effective rank 1.00" in caplog.text


def test_warns_once_until_recovered(caplog: pytest.LogCaptureFixture) -> None:
    constant, varied = torch.zeros(8, 1, 5, 6, 7), images(8)
    with caplog.at_level(logging.INFO):
        watch(EmbeddingMonitor(Encoder().embed, interval=1), varied, constant, constant, varied, varied, constant)
    text = [record.getMessage() for record in caplog.records if record.name.startswith("monai_ssl")]
    assert [("collapsed" in line, "recovered" in line) for line in text] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert "iteration 2" in text[0]
    assert "iteration 4" in text[1]


def test_not_finite_is_reported_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    metrics = watch(EmbeddingMonitor(Encoder().embed, interval=1), images(4) * float("nan")).state.metrics
    assert all(math.isnan(metrics[name]) for name in NAMES)
    assert "collapsed" in caplog.text


def test_one_image_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of one volume train on; a word once, and no numbers."""
    network = Encoder()
    with caplog.at_level(logging.WARNING):
        engine = watch(EmbeddingMonitor(network.embed, interval=1), images(1), images(1))
    assert engine.state.metrics == {}
    assert [record.getMessage() for record in caplog.records if "one image" in record.getMessage()] != []
    assert len([record for record in caplog.records if "one image" in record.getMessage()]) == 1


def test_leaves_no_trace_in_the_module() -> None:
    network = Encoder()
    network.first[1].eval()  # a layer that someone keeps in eval, as FreezeHandler does
    network.second[0].weight.grad = torch.ones_like(network.second[0].weight)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [layer.training for layer in network.modules()]
    state = torch.get_rng_state()

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            assert not any(layer.training for layer in self.network.modules())
            return self.network.embed(image) + torch.rand(1)

    watch(EmbeddingMonitor(Drawing(), interval=1), images(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.training for layer in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert float(network.second[0].weight.grad.sum()) == network.second[0].weight.numel()


def test_modes_are_restored_when_it_fails() -> None:
    network = Encoder()
    with pytest.raises(RuntimeError):
        watch(EmbeddingMonitor(network, interval=1), torch.zeros(2, 3, 4))
    assert all(layer.training for layer in network.modules())


def test_training_is_not_disturbed() -> None:
    alone = toy_trainer()
    alone.run()
    expected = everything(alone)
    watched = toy_trainer(handlers=(lambda network, evaluator: EmbeddingMonitor(network.student, interval=2),))
    watched.run()
    assert "effective_rank" in watched.state.metrics
    assert_same(everything(watched), expected)


def test_interval() -> None:
    calls: list[int] = []

    class Count(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            calls.append(len(image))
            return image.flatten(1)

    watch(EmbeddingMonitor(Count(), interval=3), *[images(2 + i) for i in range(7)])
    assert calls == [4, 7]


def test_meta_tensors_become_plain() -> None:
    class Plain(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert type(image) is torch.Tensor
            return image.flatten(1)

    watch(EmbeddingMonitor(Plain(), interval=1), MetaTensor(images(3)))


@pytest.mark.parametrize(
    "arguments", [{"embed": lambda x: x}, {"embed": nn.Flatten(), "interval": 0}, {"embed": nn.Flatten(), "flatten": 0}]
)
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"embed|interval"):
        EmbeddingMonitor(**arguments)
