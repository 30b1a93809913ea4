# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn

from monai_ssl.handlers import GradientClipHandler, PrepareBatchTensor

GRADIENT = [3.0, 4.0]  # of norm 5


def train(max_norm: float | None, *gradients: list[float], steps: int = 1, **kwargs: Any) -> torch.Tensor:
    """Weight change, with SGD at rate 1, of a network for which each batch is its own gradient."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    data = [{"image": torch.tensor([gradient]), "label": torch.zeros(1, 1)} for gradient in gradients]
    SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=data, network=network, optimizer=optimizer,
        loss_function=lambda prediction, target: prediction.mean(), prepare_batch=PrepareBatchTensor(),
        decollate=False, accumulation_steps=steps, train_handlers=[GradientClipHandler(optimizer, max_norm)], **kwargs,
    ).run()  # fmt: skip
    return -network.weight.detach()[0]


@pytest.mark.parametrize(
    "max_norm, change", [(1.0, (0.6, 0.8)), (2.5, (1.5, 2.0)), (7.0, (3.0, 4.0)), (0, (3.0, 4.0)), (None, (3.0, 4.0))]
)
def test_norm_is_bounded(max_norm: float | None, change: tuple[float, float]) -> None:
    assert train(max_norm, GRADIENT).tolist() == pytest.approx(change, abs=1e-4)


def test_accumulated_gradient_is_clipped_once() -> None:
    # each batch counts half: (3, 0) + (0, 4) = (3, 4), then half of it; clipped after each batch it would be (1.3, 2.1)
    assert train(2.5, [6.0, 0.0], [0.0, 8.0], steps=2).tolist() == pytest.approx((1.5, 2.0), abs=1e-4)


def test_flush_at_the_end_of_an_epoch_is_clipped() -> None:
    # steps after batch 2 (gradient (3, 4)) and, flushed, after batch 3 (gradient (1.5, 2), norm 2.5)
    assert train(1.0, GRADIENT, GRADIENT, GRADIENT, steps=2).tolist() == pytest.approx((1.2, 1.6), abs=1e-4)


def test_gradients_are_unscaled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))
    change = train(6.0, GRADIENT, amp=True, amp_kwargs={"enabled": False})  # scaled, the norm would be 5120
    assert change.tolist() == pytest.approx((3.0, 4.0), abs=1e-4)


def test_negative_norm() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        GradientClipHandler(torch.optim.SGD([torch.zeros(1)], 1.0), -1.0)
