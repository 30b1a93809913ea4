# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_ssl.losses import LocalConsistencyLoss, local_consistency


def maps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input, target and a mask with a row of which nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.4
    mask[1] = False
    return x, t, mask


def reference(x: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    """The equation, one row and one voxel at a time."""
    rows = []
    for n in range(len(x)):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for a, b, m in zip(
            x[n].flatten(1).T, t[n].flatten(1).T, [True] * 999 if mask is None else mask[n].flatten().tolist()
        ):
            if m:
                total = total + 2 - 2 * (a @ b) / (a.norm() * b.norm())
                count += 1
        rows.append(total / max(count, 1))
    return torch.stack(rows).mean()


VOXELS = torch.tensor([[[1.0, 3.0], [0.0, 4.0]]]), torch.tensor([[[0.0, 4.0], [1.0, 3.0]]])  # (1, 2, 2)


def test_by_hand() -> None:
    x, t = VOXELS
    for scale in (1.0, 7.0):
        assert local_consistency(scale * x, t).item() == pytest.approx(1.04, abs=1e-6)
        assert local_consistency(x, scale * t, torch.tensor([[False, True]])).item() == pytest.approx(0.08, abs=1e-6)
    assert local_consistency(t, t).item() == pytest.approx(0, abs=1e-6)
    assert local_consistency(-t, t).item() == pytest.approx(4, abs=1e-6)


def test_nothing_counts() -> None:
    x = VOXELS[0].clone().requires_grad_()
    value = local_consistency(x, VOXELS[1], torch.tensor([[False, False]]))
    value.backward()
    assert value.item() == 0
    assert x.grad.tolist() == [[[0, 0], [0, 0]]]


def test_each_row_weighs_the_same() -> None:
    """Distances 0 and 2, both valid; 4 and something that does not count. A mean over all voxels would be 2."""
    x = torch.tensor([[[1.0, 1], [0, 0]], [[1, 5], [0, 5]]])
    t = torch.tensor([[[1.0, 0], [0, 1]], [[-1, 5], [0, 5]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert local_consistency(x, t, mask).item() == pytest.approx(2.5, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 5, 6), (2, 6, 3, 4, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_loops(shape: tuple[int, ...], masked: bool) -> None:
    x, t, mask = maps(*shape)
    mask = mask if masked else None
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    value, expected = LocalConsistencyLoss()(leaves[0], t, mask), reference(leaves[1], t, mask)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    gradient, expected = (torch.autograd.grad(v, leaf)[0] for v, leaf in zip((value, expected), leaves))
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(local_consistency(x, t, mask), value.detach(), atol=0, rtol=0)


def test_chance_of_independent_vectors() -> None:
    """Mean 2, spread 2 / sqrt(C) per voxel."""
    x, t = torch.randn(2, 1, 256, 4000, generator=torch.Generator().manual_seed(0))
    distance = torch.stack([local_consistency(x[..., i : i + 1], t[..., i : i + 1]) for i in range(500)])
    assert local_consistency(x, t).item() == pytest.approx(2, abs=3 * 0.125 / 4000**0.5)
    assert distance.std().item() == pytest.approx(0.125, rel=0.1)


def test_no_gradient_to_the_target() -> None:
    x, t, mask = maps(3, 4, 5)
    x.requires_grad_(), t.requires_grad_()
    local_consistency(x, t, mask).backward()
    assert t.grad is None
    assert x.grad[0][:, mask[0]].abs().min() > 0
    assert not x.grad[:, :, :][~mask[:, None].expand_as(x)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_switched_off(dtype: torch.dtype) -> None:
    x, t, mask = maps(3, 16, 5, 6)
    x, t = x.float(), t.float()
    with torch.autocast("cpu", dtype=dtype):
        inside = local_consistency(x, t, mask)
    assert torch.equal(inside, local_consistency(x, t, mask))
    half = local_consistency(x.to(dtype), t.to(dtype), mask)
    assert torch.equal(half, local_consistency(x.to(dtype).float(), t.to(dtype).float(), mask))


def test_zero_vectors_are_finite() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    value = local_consistency(x, torch.zeros(2, 3, 4))
    value.backward()
    assert value.item() == 2
    assert x.grad.isfinite().all()


def test_descent() -> None:
    x, t, mask = maps(3, 6, 4, 5)
    mask[1] = True
    x.requires_grad_()
    values = []
    for _ in range(20):
        value = local_consistency(x, t, mask)
        (gradient,) = torch.autograd.grad(value, x)
        values.append(value.item())
        with torch.no_grad():
            x -= 0.1 * gradient.sign()
    assert all(b < a for a, b in zip(values, values[1:]))
    assert values[-1] < 0.3 * values[0]


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (1, 3, 4))])
def test_shapes_are_checked(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError) as error:
        LocalConsistencyLoss()(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 1, 4, dtype=torch.bool)]
)
def test_masks_are_checked(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, \*F\) bool") as error:
        LocalConsistencyLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), mask)
    assert str(tuple(mask.shape)) in str(error.value)
