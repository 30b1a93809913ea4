# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric

from monai_ssl.losses import VoCoLoss, overlap_prediction_loss
from monai_ssl.metrics import OverlapPredictionMetric, constant_prediction_loss
from monai_ssl.transforms import RandVoCoCrops

ONE = torch.tensor([[[0.75, 0.25] + [0.0] * 7]])  # B = R = 1, K = 9
TERMS = {"v2": ("overlap", "log"), "v1": ("overlap", "square"), "cvpr": ("binary", "square")}


def measured(statistic: str, *batches: tuple[torch.Tensor, torch.Tensor], **kwargs: Any) -> float:
    metric = OverlapPredictionMetric(statistic, **kwargs)
    for logits, target in batches:
        metric(logits, target)
    result = metric.aggregate()
    assert result.shape == ()
    return result.item()


def labels(volumes: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    transform = RandVoCoCrops((6, 5), (3, 3), num_samples=num_samples).set_random_state(seed=seed)
    rows = []
    for _ in range(volumes):
        transform.randomize()
        rows.append(transform.label)
    return torch.stack(rows)


def test_constant_prediction_by_hand() -> None:
    constants = torch.arange(101) / 100
    losses = constant_prediction_loss(ONE, constants)
    assert losses.shape == (1, 101)
    assert losses.argmin().item() == 25
    torch.testing.assert_close(losses[0, [0, 25]], torch.tensor([1.111636, 0.807539]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", TERMS)
def test_constant_prediction_equals_filled_logits(variant: str) -> None:
    target, constants = labels(3, 2).double(), torch.tensor([0.0, 0.2, 0.77, 1.0])
    losses = constant_prediction_loss(target, constants, *TERMS[variant], eps=1e-4)
    assert losses.dtype == torch.float64
    for s, c in enumerate(constants.double()):
        pos, neg = overlap_prediction_loss(torch.full_like(target, c), target, *TERMS[variant], eps=1e-4)
        torch.testing.assert_close(losses[:, s], pos + neg, atol=1e-12, rtol=0)


def test_skill_by_hand() -> None:
    # -log(1 + eps) for both terms: the perfect prediction scores -2e-6, out of 0.807539
    assert measured("skill", (ONE.double(), ONE)) == pytest.approx(1 + 2e-6 / 0.807539, abs=1e-9)
    assert measured("skill", (ONE, ONE)) == pytest.approx(1, abs=3e-6)
    assert measured("skill", (torch.full_like(ONE, 0.25), ONE)) == pytest.approx(0, abs=1e-5)
    assert measured("skill", (torch.zeros_like(ONE), ONE)) == pytest.approx(-0.376573, abs=1e-5)


def test_accuracy_and_mae_by_hand() -> None:
    logits = torch.tensor([[[0.1, 0.9, 0], [0, 1, 0]]])
    target = torch.tensor([[[0.5, 0.5, 0], [1, 0, 0]]])
    assert measured("accuracy", (logits, target)) == pytest.approx(0.5)  # the tie counts as right
    assert measured("mae", (logits, target)) == pytest.approx(0.466667, abs=1e-6)


@pytest.mark.parametrize("variant", TERMS)
def test_skill_averages_volumes_before_the_best_constant_is_taken(variant: str) -> None:
    target = labels(5, 2).double()
    logits = (target + 0.3 * torch.rand(target.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    pos, neg = overlap_prediction_loss(logits, target, *TERMS[variant])
    of_constants = [
        sum(term.mean() for term in overlap_prediction_loss(torch.full_like(target, c / 100), target, *TERMS[variant]))
        for c in range(101)
    ]
    expected = 1 - ((pos + neg).mean() / min(of_constants)).item()
    whole = measured("skill", (logits, target), variant=variant)
    parts = measured("skill", (logits[:2], target[:2]), (logits[2:], target[2:]), variant=variant)
    assert whole == pytest.approx(expected, abs=1e-10)
    assert parts == pytest.approx(expected, abs=1e-10)


def test_buffer_has_a_row_for_each_volume() -> None:
    metric = OverlapPredictionMetric("skill")
    assert isinstance(metric, CumulativeIterationMetric)
    target = labels(3, 2)
    metric(target * 0.5, target)
    metric(list(target[:1] * 0.5), list(target[:1]))  # decollated
    rows = metric.get_buffer()
    assert rows.shape == (4, 102)
    assert torch.equal(rows[3], rows[0])
    torch.testing.assert_close(rows[:3, 1:], constant_prediction_loss(target, torch.arange(101) / 100))
    metric.reset()
    metric(target, target)
    assert metric.aggregate().item() == pytest.approx(1, abs=1e-5)


def test_chance_and_perfection_on_many_labels() -> None:
    target = labels(200, 2)
    flat = torch.full_like(target, 0.4)
    for variant in TERMS:
        assert measured("skill", (flat, target), variant=variant) <= 0
        assert measured("skill", (target, target), variant=variant) == pytest.approx(1, abs=1e-4)
    assert measured("accuracy", (target, target)) == 1
    assert measured("mae", (torch.zeros_like(target), target)) == pytest.approx(1 / 9, abs=1e-6)


@pytest.mark.parametrize("statistic", ["accuracy", "mae", "skill"])
def test_half_precision_logits(statistic: str) -> None:
    target = labels(3, 2)
    logits = (target * 0.75).half()
    result = measured(statistic, (logits, target))
    assert result == pytest.approx(measured(statistic, (logits.double(), target)), abs=1e-5)


def test_through_ignite_with_logits_across_volumes() -> None:
    target = labels(4, 2)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 11, 16, generator=generator)
    loss = VoCoLoss()
    partner = torch.arange(4).roll(-1)
    engine = Engine(lambda engine, batch: batch)
    logits = {
        "own": lambda pair, label: loss.logits(pair, label),
        "cross": lambda pair, label: loss.logits(pair, label, partner),
    }
    for name, call in logits.items():
        handler = IgniteMetricHandler(
            metric_fn=OverlapPredictionMetric("accuracy"),
            output_transform=lambda o, call=call: (call(o[0], o[1]), o[1]),
            save_details=False,
        )
        handler.attach(engine, name)
    engine.run([((student, student), target)])
    for name, call in logits.items():
        expected = measured("accuracy", (call((student, student), target), target))
        assert engine.state.metrics[name] == pytest.approx(expected)
        assert isinstance(engine.state.metrics[name], float)


def test_errors() -> None:
    with pytest.raises(ValueError, match="accuracy, mae, skill, got 'dice'"):
        OverlapPredictionMetric("dice")
    with pytest.raises(ValueError, match="v2, v1, cvpr, got 'v3'"):
        OverlapPredictionMetric("skill", variant="v3")
    with pytest.raises(ValueError, match="nothing to aggregate"):
        OverlapPredictionMetric().aggregate()
    with pytest.raises(ValueError, match=r"\(1, 1, 9\) and target \(1, 1, 8\)"):
        OverlapPredictionMetric()(ONE, ONE[..., :8])
    with pytest.raises(ValueError, match=r"\(1, 1, 9\), \(2, 1\)"):
        constant_prediction_loss(ONE, torch.zeros(2, 1))
