# SPDX-License-Identifier: Apache-2.0
"""PGL and BYOL on two processes: gradients, values and the metric are those of the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from monai_ssl.losses import LocalConsistencyLoss, NegativeCosineLoss
from monai_ssl.metrics import MatchedAccuracyMetric, matched_accuracy
from monai_ssl.networks import PGLNet
from monai_ssl.transforms import view_matrix

from .processes import WORLD_SIZE, ProcessPair, half

ROI = (8, 12)


def network(mode: str) -> PGLNet:
    torch.manual_seed(0)
    encoder = SegResEncoder(2, init_filters=4, norm="instance", blocks_down=(1, 1))
    return PGLNet(encoder, 8, 7, 6, spatial_dims=2, mode=mode).double()


def views(num: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of views with overlaps of different sizes, one of them with none."""
    first, second = torch.rand(2, num, 1, *ROI, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [
        [view_matrix((0, 0), ROI, ROI, (False, True)), view_matrix((3 * i, 2 - i), ROI, ROI, (i > 1, False))]
        for i in range(num)
    ]
    return first, second, torch.stack([torch.stack(pair) for pair in pairs])


def check_gradients(rank: int) -> None:
    """In evaluation mode: in training each process has batch statistics of its own, unless they are synchronised."""
    for mode, loss in (("local", LocalConsistencyLoss()), ("global", NegativeCosineLoss())):
        alone, inputs = network(mode).eval(), views()
        with mock.patch.object(dist, "is_initialized", return_value=False):  # as one process alone
            joined = loss(*alone(*inputs))
            joined.backward()
        replica = DistributedDataParallel(network(mode).eval())
        own = loss(*replica(*(half(x, rank) for x in inputs)))
        own.backward()
        for (name, expected), parameter in zip(alone.named_parameters(), replica.parameters()):
            assert (expected.grad is None) == name.startswith("teacher")
            assert expected.grad is None or expected.grad.any() or "bias" in name
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-12, rtol=1e-9)
        total = own.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / WORLD_SIZE, joined.detach(), atol=1e-12, rtol=0)


def check_teachers_stay_equal(rank: int) -> None:
    for mode, loss in (("local", LocalConsistencyLoss()), ("global", NegativeCosineLoss())):
        net = network(mode)
        replica = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
        start = net.teacher_projector.module[0].weight.clone()
        for _ in range(3):
            optimizer.zero_grad()
            loss(*replica(*(half(x, rank) for x in views()))).backward()
            optimizer.step()
            net.update_teacher(0.9)
        assert not torch.equal(net.teacher_projector.module[0].weight, start)
        for name, p in net.named_parameters():
            other = p.detach().clone()
            dist.broadcast(other, 0)
            assert torch.equal(p, other), name


def check_metric(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 6, 4, 3, generator=generator)
    prediction = prediction + target
    mask = torch.rand(5, 4, 3, generator=generator) < 0.7
    metric = MatchedAccuracyMetric()
    rows = slice(0, 3) if rank == 0 else slice(3, 5)
    metric(prediction[rows], (target[rows], mask[rows]))
    expected = matched_accuracy(prediction, target, mask).item()
    assert 0.1 < expected < 0.9
    assert metric.aggregate().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("check", [check_gradients, check_teachers_stay_equal, check_metric])
def test_two_processes(two_processes: ProcessPair, check: Callable[[int], None]) -> None:
    two_processes(check)
