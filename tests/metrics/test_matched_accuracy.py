# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

from monai_ssl.metrics import MatchedAccuracyMetric, matched_accuracy, matched_chance, matched_voxels


def maps(*shape: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and mask, of which one row counts nowhere."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    prediction = target + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.6
    mask[1] = False
    return prediction, target, mask


def counted(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[int, int]:
    """Hits and valid voxels by loops."""
    hits = total = 0
    for p, t, m in zip(prediction.flatten(2), target.flatten(2), mask.flatten(1)):
        valid = [v for v in range(len(m)) if m[v]]
        for v in valid:
            cosines = {w: (p[:, v] @ t[:, w] / (p[:, v].norm() * t[:, w].norm())).item() for w in valid}
            hits += max(cosines, key=cosines.get) == v
        total += len(valid)
    return hits, total


def test_by_hand() -> None:
    """Three voxels: the first finds its own, the second the third's, the third does not count or does."""
    target = torch.tensor([[[1.0, 0, 3], [0, 1, 3]]])
    prediction = torch.tensor([[[5.0, 2, -1], [1, 2, -1]]])
    assert matched_accuracy(prediction, target).item() == pytest.approx(1 / 3)
    mask = torch.tensor([[True, True, False]])
    assert matched_accuracy(prediction, target, mask).item() == pytest.approx(0.5)  # a tie goes to the first
    assert matched_chance(mask).item() == pytest.approx(0.5)
    mask = torch.tensor([[True, False, True]])
    assert matched_accuracy(prediction, target, mask).item() == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 4, 5, 6), (2, 3, 3, 4, 5)])
def test_equals_loops(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, target, mask = maps(*shape, noise=1.5)
    hits, total = counted(prediction, target, mask)
    assert 0 < hits < total
    for chunk in (2**24, 50):  # the second: a few voxels at a time
        monkeypatch.setattr(matched_voxels, "_CHUNK", chunk)
        assert matched_accuracy(prediction, target, mask).item() == pytest.approx(hits / total, abs=1e-12)


def test_candidates_are_of_the_same_row_and_valid() -> None:
    """Copies of what is sought, at voxels that do not count and in another row, tempt nobody."""
    target, _, mask = maps(4, 8, 5, 6)
    prediction = target + 0.1
    decoys = target.clone()
    decoys[0][:, ~mask[0]] = prediction[0][:, mask[0]][:, :1]
    decoys[1] = prediction[0]
    assert matched_accuracy(prediction, decoys).item() < 1
    assert matched_accuracy(prediction, decoys, mask).item() == matched_accuracy(prediction, target, mask).item() == 1


def test_chance() -> None:
    """One hit for each row that has valid voxels, whether the output knows nothing or is constant."""
    mask = torch.ones(40, 5, 6, dtype=torch.bool)
    mask[:, 0] = False
    mask[3] = False
    assert matched_chance(mask).item() == pytest.approx(39 / (39 * 24), abs=1e-12)
    prediction, target = torch.randn(2, 40, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    spread = (1 / 24 / (39 * 24)) ** 0.5
    assert abs(matched_accuracy(prediction, target, mask).item() - 1 / 24) < 3 * spread
    constant = torch.ones(40, 8, 5, 6)
    assert matched_accuracy(constant, constant, mask).item() == pytest.approx(1 / 24, abs=1e-12)
    assert matched_accuracy(constant, target, mask).item() == pytest.approx(1 / 24, abs=1e-12)


def test_nothing_counts() -> None:
    prediction, target, mask = maps(3, 4, 5)
    assert matched_accuracy(prediction, target, mask & False).item() == 0
    assert matched_chance(mask & False).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    prediction, target, mask = maps(3, 16, 5, 6)
    assert matched_accuracy(prediction.to(dtype), target.to(dtype), mask).item() == 1


def test_metric_pools_all_batches() -> None:
    metric, chance = MatchedAccuracyMetric(), MatchedAccuracyMetric("chance")
    assert isinstance(metric, CumulativeIterationMetric)
    hits = total = filled = 0
    for seed in range(3):
        prediction, target, mask = maps(3, 4, 5, 6, noise=0.7, seed=seed)
        for part in (metric, chance):
            part(prediction, (target, mask))
        h, t = counted(prediction, target, mask)
        hits, total, filled = hits + h, total + t, filled + 2
    assert metric.get_buffer().shape == (9, 3)
    assert metric.aggregate().item() == pytest.approx(hits / total, abs=1e-12)
    assert chance.aggregate().item() == pytest.approx(filled / total, abs=1e-12)
    metric.reset()
    metric(target, target)
    assert metric.aggregate().item() == 1


def test_through_ignite_with_the_output_of_the_network() -> None:
    output = maps(4, 6, 5, 3, noise=0.7)
    engine = Engine(lambda engine, batch: {"pred": output})
    handlers = {
        name: IgniteMetricHandler(
            metric_fn=MatchedAccuracyMetric(name),
            output_transform=lambda o: (o["pred"][0], o["pred"][1:]),
            save_details=False,
        )
        for name in ("accuracy", "chance")
    }
    for name, handler in handlers.items():
        handler.attach(engine, name)
    engine.run([0, 1])
    assert engine.state.metrics["accuracy"] == pytest.approx(matched_accuracy(*output).item())
    assert engine.state.metrics["chance"] == pytest.approx(matched_chance(output[2]).item())


def test_errors() -> None:
    with pytest.raises(ValueError, match="accuracy, chance, got 'dice'"):
        MatchedAccuracyMetric("dice")
    with pytest.raises(ValueError, match="nothing to aggregate"):
        MatchedAccuracyMetric().aggregate()
    x = torch.zeros(2, 3, 4)
    for prediction, target in ((x, x[:1]), (x[0], x[0])):
        with pytest.raises(ValueError, match=r"must be equal, \(N, D, \*F\)"):
            matched_accuracy(prediction, target)
    for mask in (torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"must be \(N, \*F\) bool"):
            matched_accuracy(x, x, mask)


def test_module_and_function_of_the_same_name() -> None:
    import importlib

    import monai_ssl.metrics

    module = importlib.import_module("monai_ssl.metrics.matched_accuracy")
    assert module.matched_accuracy is monai_ssl.metrics.matched_accuracy is matched_accuracy
