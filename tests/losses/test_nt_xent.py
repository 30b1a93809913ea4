# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_ssl.losses import NTXentLoss


def views(num: int = 5, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num, width, generator=generator, dtype=torch.float64)
    return first, second


def reference(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The equation, one view and one candidate at a time."""
    every, num = [*first, *second], len(first)
    total = 0.0
    for i, z in enumerate(every):
        cosine = lambda j, z=z: (z @ every[j] / (z.norm() * every[j].norm())) / temperature
        total += torch.log(sum(torch.exp(cosine(j)) for j in range(2 * num) if j != i)) - cosine((i + num) % (2 * num))
    return total / (2 * num)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        (torch.eye(2), torch.eye(2), math.log(1 + 2 * math.exp(-2))),
        (torch.eye(2), torch.eye(2).flip(0), math.log(2 + math.exp(2))),
        (torch.ones(8, 5), torch.ones(8, 5), math.log(15)),
    ],
)
def test_by_hand(first: Tensor, second: Tensor, expected: float) -> None:
    for scale in (1.0, 3.0):
        assert NTXentLoss(0.5)(scale * first, second).item() == pytest.approx(expected, abs=1e-6)


def test_numbers_of_the_spec() -> None:
    loss, eye = NTXentLoss(temperature=0.5), torch.eye(2)
    assert loss(eye, eye).item() == pytest.approx(0.2395448, abs=1e-6)
    assert loss(eye, eye.flip(0)).item() == pytest.approx(2.2395448, abs=1e-6)
    assert loss(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(2.7080502, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("num", [2, 5])
def test_equals_loops(num: int, temperature: float) -> None:
    pairs = [[x.requires_grad_() for x in views(num)] for _ in range(2)]
    value, expected = NTXentLoss(temperature)(*pairs[0]), reference(*pairs[1], temperature)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    for a, e in zip(torch.autograd.grad(value, pairs[0]), torch.autograd.grad(expected, pairs[1])):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


def test_equals_monais_loss() -> None:
    first, second = (x.float() for x in views(256, 128))
    for temperature in (0.1, 0.5):
        expected = ContrastiveLoss(temperature)(first, second).item()
        assert NTXentLoss(temperature)(first, second).item() == pytest.approx(expected, abs=1e-5)


def test_low_temperature_is_finite() -> None:
    """MONAI's loss overflows here."""
    first, second = (x.float().requires_grad_() for x in views())
    loss = NTXentLoss(1e-3)(first, second)
    loss.backward()
    assert not ContrastiveLoss(1e-3)(first, second).isfinite()
    assert loss.isfinite()
    assert first.grad.isfinite().all()


def test_gradcheck() -> None:
    first, second = views(3, 4)
    assert torch.autograd.gradcheck(NTXentLoss(0.5), (first.requires_grad_(), second.requires_grad_()))


def test_both_views_count_alike() -> None:
    first, second = views()
    torch.testing.assert_close(NTXentLoss()(first, second), NTXentLoss()(second, first), atol=1e-12, rtol=0)


def test_other_items_are_negatives() -> None:
    first, second = views()
    changed = second.clone()
    changed[4] = changed[4].roll(1)
    gradient = lambda s: torch.autograd.grad(NTXentLoss()(first.requires_grad_(), s), first)[0]
    assert (gradient(second)[0] - gradient(changed)[0]).abs().max() > 1e-6


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_switched_off(autocast: torch.dtype) -> None:
    first, second = (x.float() for x in views(8, 64))
    with torch.autocast("cpu", dtype=autocast):
        inside = NTXentLoss()(first, second)
    assert torch.equal(inside, NTXentLoss()(first, second))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


def test_no_tensor_of_pairs_and_dimensions() -> None:
    first, second = (x.float().requires_grad_() for x in views(64, 512))
    with Largest() as ours:
        NTXentLoss()(first, second).backward()
    with Largest() as theirs:
        ContrastiveLoss()(first, second).backward()
    assert (ours.size, theirs.size) == (128 * 512, 128 * 128 * 512)


def test_descent() -> None:
    first, second = views()
    first.requires_grad_()
    values = []
    for _ in range(20):
        value = NTXentLoss()(first, second)
        (gradient,) = torch.autograd.grad(value, first)
        values.append(value.item())
        with torch.no_grad():
            first -= 0.1 * gradient.sign()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4, 3, 2), (4, 3, 2)), ((4,), (4,))])
def test_shapes_are_checked(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError) as error:
        NTXentLoss()(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="at least two items"):
        NTXentLoss()(torch.zeros(1, 3), torch.zeros(1, 3))
    for temperature in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            NTXentLoss(temperature)
