# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_ssl.losses import MultiTaskLoss, NTXentLoss

LOSSES = {"class": nn.CrossEntropyLoss(), "pair": lambda pred, _: (pred[0] - pred[1]).square().mean()}


def outputs(**more: Any) -> dict[str, Any]:
    return {"class": torch.zeros(2, 10), "pair": (torch.full((3,), 5.0), torch.full((3,), 2.0)), **more}


TARGET = {"class": torch.tensor([3, 7])}


@pytest.mark.parametrize(
    "weights, expected",
    [(None, log(10) + 9), ({"class": 2.0, "pair": 0.5}, 2 * log(10) + 4.5), ({"pair": 0, "class": 1}, log(10))],
)
def test_by_hand(weights: dict[str, float] | None, expected: float) -> None:
    """Equal logits of ten classes cost ln 10; the pair is 3 apart."""
    loss = MultiTaskLoss(LOSSES, weights)
    assert loss(outputs(), TARGET).item() == pytest.approx(expected, rel=1e-6)
    terms = loss.terms(outputs(), TARGET)
    assert list(terms) == ["class", "pair"]
    assert {name: term.item() for name, term in terms.items()} == pytest.approx({"class": log(10), "pair": 9.0})


def test_weights_scale_the_gradients() -> None:
    """d pair / d first = 2 * 3 / 3 voxels, times the weight; 0, not none, at weight 0."""
    for weight in (0.0, 0.5):
        first, logits = torch.full((3,), 5.0, requires_grad=True), torch.zeros(2, 10, requires_grad=True)
        loss = MultiTaskLoss(LOSSES, {"class": 1.0, "pair": weight})
        loss(outputs(pair=(first, torch.full((3,), 2.0)), **{"class": logits}), TARGET).backward()
        assert first.grad.tolist() == [2.0 * weight] * 3
        assert logits.grad.abs().sum() > 0


def test_no_target_at_all() -> None:
    assert MultiTaskLoss({"pair": LOSSES["pair"]})({"pair": outputs()["pair"]}).item() == 9.0


def test_outputs_come_in_full_precision() -> None:
    seen: list[Tensor] = []

    def note(pred: tuple[Tensor, Tensor], _: Any) -> Tensor:
        seen.extend([*pred, pred[0] @ pred[1].T])
        return seen[-1].mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        MultiTaskLoss({"pair": note})({"pair": (torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16())})
    assert [x.dtype for x in seen] == [torch.float32] * 3


def test_loss_modules_are_its_own() -> None:
    """So that class weights go where the loss goes."""
    loss = MultiTaskLoss({"class": nn.CrossEntropyLoss(weight=torch.ones(10)), "pair": NTXentLoss()})
    loss.to(torch.float64)
    assert loss.losses["class"].weight.dtype == torch.float64


@pytest.mark.parametrize(
    "losses, weights, message",
    [
        ({}, None, "must have the same names"),
        (LOSSES, {"class": 1.0}, r"\['class', 'pair'\] and weights \['class'\]"),
        (LOSSES, {"class": 1.0, "pair": 1.0, "jigsaw": 1.0}, "'jigsaw'"),
        (LOSSES, {"class": 1.0, "pair": -1.0}, "0 or more"),
        (LOSSES, {"class": 1.0, "pair": float("nan")}, "0 or more"),
    ],
)
def test_wrong_arguments(losses: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskLoss(losses, weights)


@pytest.mark.parametrize(
    "pred, target",
    [
        ({"class": torch.zeros(2, 10)}, TARGET),
        (outputs(jigsaw=torch.zeros(2, 10)), TARGET),
        (outputs(), {**TARGET, "jigsaw": torch.zeros(2)}),
    ],
    ids=["an output lacks", "unknown output", "unknown target"],
)
def test_unknown_names(pred: dict[str, Any], target: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"tasks are \['class', 'pair'\]"):
        MultiTaskLoss(LOSSES)(pred, target)
