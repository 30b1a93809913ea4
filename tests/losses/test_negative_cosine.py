# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_ssl.losses import NegativeCosineLoss, negative_cosine


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    x, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, t


def reference(x: Tensor, t: Tensor) -> Tensor:
    """Minus the mean cosine, one vector at a time."""
    rows = zip(x.movedim(1, -1).flatten(0, -2), t.movedim(1, -1).flatten(0, -2))
    return -torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in rows]).mean()


def test_by_hand() -> None:
    x, t = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[0.0, 1], [4, 3]])
    assert negative_cosine(5 * x, t).item() == pytest.approx(-0.48, abs=1e-6)  # cosines 0 and 24 / 25
    assert negative_cosine(t, t).item() == pytest.approx(-1, abs=1e-6)
    assert negative_cosine(-t, t).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5), (2, 3, 4, 5, 6)])
def test_equals_loops(shape: tuple[int, ...]) -> None:
    x, t = pair(*shape)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    value, expected = NegativeCosineLoss()(leaves[0], t), reference(leaves[1], t)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    gradient, expected = (torch.autograd.grad(v, leaf)[0] for v, leaf in zip((value, expected), leaves))
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(negative_cosine(x, t), value.detach(), atol=0, rtol=0)


def test_byols_regression_loss() -> None:
    """|x / |x| - t / |t||^2 = 2 + 2 times the value."""
    x, t = pair(5, 7)
    distance = (x / x.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(1).mean()
    torch.testing.assert_close(2 + 2 * negative_cosine(x, t), distance, atol=1e-12, rtol=0)


def test_no_gradient_to_the_target() -> None:
    x, t = pair(5, 7)
    negative_cosine(x.requires_grad_(), t.requires_grad_()).backward()
    assert t.grad is None
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_switched_off(dtype: torch.dtype) -> None:
    x, t = (v.float() for v in pair(5, 64))
    with torch.autocast("cpu", dtype=dtype):
        inside = negative_cosine(x, t)
    assert torch.equal(inside, negative_cosine(x, t))


def test_descent() -> None:
    x, t = pair(5, 7)
    x.requires_grad_()
    values = []
    for _ in range(20):
        value = negative_cosine(x, t)
        (gradient,) = torch.autograd.grad(value, x)
        values.append(value.item())
        with torch.no_grad():
            x -= 0.1 * gradient.sign()
    assert all(b < a for a, b in zip(values, values[1:]))
    assert values[-1] < -0.7


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 3, 1)), ((4,), (4,))])
def test_shapes_are_checked(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError) as error:
        NegativeCosineLoss()(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
