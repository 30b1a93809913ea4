# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl.optimizers import LARS

RATES = [0.5, 0.5, 0.2, 0.1, 0.3]
Weights = list[list[float]]


class Reference:
    """The update written out, one number at a time; a weight is the flat list of its numbers."""

    def __init__(self, weights: Weights, adapted: list[bool], momentum: float, decay: float, trust: float) -> None:
        self.weights, self.adapted = weights, adapted
        self.momentum, self.decay, self.trust = momentum, decay, trust
        self.velocity = [[0.0] * len(w) for w in weights]

    def step(self, gradients: Weights, lr: float) -> None:
        for w, v, g, adapted in zip(self.weights, self.velocity, gradients, self.adapted):
            update, ratio = list(g), 1.0
            if adapted:
                update = [gi + self.decay * wi for gi, wi in zip(g, w)]
                length, step = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in update))
                ratio = self.trust * length / step if length > 0 and step > 0 else 1.0
            for i, u in enumerate(update):
                v[i] = self.momentum * v[i] + ratio * u
                w[i] -= lr * v[i]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, (1, 2)), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    return nn.Sequential(*layers).double()


def set_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def flat(tensors: Any) -> Weights:
    return [t.flatten().tolist() for t in tensors]


@pytest.mark.parametrize("momentum, decay, trust", [(0.9, 1e-2, 1e-3), (0.0, 0.0, 0.5), (0.5, 0.3, 0.02)])
def test_equals_the_written_out_update(momentum: float, decay: float, trust: float) -> None:
    net = network()
    with torch.no_grad():
        net[4].weight.zero_()  # of no length: steps as without adaptation
    weights = list(net.parameters())
    adapted = [name in ("0.weight", "4.weight") for name, _ in net.named_parameters()]
    reference = Reference(flat(weights), adapted, momentum, decay, trust)
    optimizer = LARS(net.parameters(), RATES[0], momentum, decay, trust)
    for step, lr in enumerate(RATES):
        set_gradients(net, step)
        if step == 2:
            net[0].weight.grad.zero_()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        reference.step(flat(p.grad for p in weights), lr)
        for p, expected in zip(weights, reference.weights):
            torch.testing.assert_close(p.flatten().tolist(), expected, atol=1e-12, rtol=1e-12)


def test_by_hand() -> None:
    """|w| = 5, u = (0, 1) + 0.1 (3, 4) = (0.3, 1.4), |u|^2 = 2.05."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 1.0])
    LARS([weight, bias], lr=1.0, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1).step()
    step = 0.5 / math.sqrt(2.05)
    torch.testing.assert_close(weight.data, torch.tensor([[3 - 0.3 * step, 4 - 1.4 * step]]))
    assert bias.tolist() == [3, 3]  # neither adapted nor decayed


def test_a_step_is_a_share_of_the_weights_whatever_the_scale() -> None:
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.ones(3, 4))
        weight.grad = scale * torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
        LARS([weight], lr=2.0, weight_decay=0.0).step()
        assert (weight.data - 1).norm().item() == pytest.approx(2e-3 * math.sqrt(12), rel=1e-4)


def test_gradients_and_frozen_parameters_stay() -> None:
    net = network()
    set_gradients(net, 0)
    net[4].weight.grad = None
    before = [p.detach().clone() for p in net.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    LARS(net.parameters(), weight_decay=0.1).step()
    for p, old, g in zip(net.parameters(), before, gradients):
        assert (g is None) == torch.equal(p, old)
        assert g is None or torch.equal(p.grad, g)


def test_resuming_changes_nothing() -> None:
    straight, stopped = network(), network()
    nets, optimizers = [straight, stopped], [LARS(n.parameters(), 0.5) for n in (straight, stopped)]
    for step in range(6):
        if step == 3:
            saved = pickle.loads(pickle.dumps((stopped.state_dict(), optimizers[1].state_dict())))
            nets[1] = network()
            optimizers[1] = LARS(nets[1].parameters(), 0.1)
            nets[1].load_state_dict(saved[0])
            optimizers[1].load_state_dict(saved[1])
        for net, optimizer in zip(nets, optimizers):
            set_gradients(net, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in nets)))


def test_groups_have_their_own_values() -> None:
    one, two = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    one.grad, two.grad = torch.ones(2, 3), torch.ones(2, 3)
    LARS([{"params": [one]}, {"params": [two], "trust_coefficient": 1e-2, "lr": 1.0}], 0.5, weight_decay=0.0).step()
    torch.testing.assert_close(1 - one.data, torch.full((2, 3), 0.5e-3), atol=1e-7, rtol=0)
    torch.testing.assert_close(1 - two.data, torch.full((2, 3), 1e-2), atol=1e-7, rtol=0)


def test_dtypes_side_by_side() -> None:
    weights = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for w in weights:
        w.grad = torch.ones_like(w)
    LARS(weights, lr=100.0, weight_decay=0.0).step()
    assert [w.data[0, 0].item() for w in weights] == pytest.approx([0.9] * 3, abs=2e-3)


class NoReads(TorchDispatchMode):
    """Refuses what hands a value to Python, for which the device would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_back() -> None:
    net = network()
    optimizer = LARS(net.parameters())
    for step in range(2):
        set_gradients(net, step)
        with NoReads():
            optimizer.step()
    with pytest.raises(AssertionError), NoReads():  # so that a read would be seen
        next(net.parameters()).max().item()


def test_closure_and_descent() -> None:
    net, x = network(), torch.rand(8, 2, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = LARS(net.parameters(), lr=2.0, trust_coefficient=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss

    values = [optimizer.step(closure).item() for _ in range(20)]
    assert values[-1] < 0.2 * values[0]


def test_errors() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    for name in ("lr", "weight_decay", "trust_coefficient"):
        with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
            LARS([weight], **{name: -1})
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
            LARS([weight], momentum=momentum)
    weight.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        LARS([weight]).step()
