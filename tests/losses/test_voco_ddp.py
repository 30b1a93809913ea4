# SPDX-License-Identifier: Apache-2.0
"""VoCo on two processes: the loss pairs volumes of its own process, the metric counts those of all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monai_ssl.losses import VoCoLoss
from monai_ssl.metrics import OverlapPredictionMetric
from monai_ssl.transforms import RandVoCoCrops

from .processes import WORLD_SIZE, ProcessPair, half


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher embeddings (4, R + K, D) and labels (4, R, K)."""
    transform = RandVoCoCrops((5, 6), (3, 2), num_samples=2).set_random_state(seed=0)
    labels = []
    for _ in range(4):
        transform.randomize()
        labels.append(transform.label)
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, 2 + 6, 8, generator=generator, dtype=torch.float64)
    return student, teacher, torch.stack(labels)


class Embeddings(nn.Module):
    """The given embeddings of all volumes as parameters; a process uses those of its own volumes."""

    def __init__(self, student: Tensor) -> None:
        super().__init__()
        self.student = nn.Parameter(student.clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.student[index]


def check_loss(rank: int) -> None:
    student, teacher, target = batch()
    index = torch.arange(4)
    for variant in ("v2", "v1", "cvpr"):
        loss = VoCoLoss(variant)
        alone = Embeddings(student)
        partner = torch.tensor([1, 0, 3, 2])
        joined = loss((alone(index), teacher), target, partner=partner)
        joined.backward()
        replica = DistributedDataParallel(Embeddings(student))
        own = loss((replica(half(index, rank)), half(teacher, rank)), half(target, rank))
        own.backward()
        torch.testing.assert_close(replica.module.student.grad, alone.student.grad, atol=1e-12, rtol=0)
        total = own.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / WORLD_SIZE, joined.detach(), atol=1e-12, rtol=0)
        if variant == "v2":
            other = loss((student, teacher), target)  # partners across processes: another value
            assert abs(other - joined) > 1e-3


def check_one_volume_each(rank: int) -> None:
    student, teacher, target = (x[rank : rank + 1] for x in batch())
    assert "inter" not in VoCoLoss().terms((student, teacher), target)


def check_metric(rank: int) -> None:
    student, teacher, target = batch()
    logits = VoCoLoss().logits((student, teacher), target)
    own = slice(0, 3) if rank == 0 else slice(3, 4)  # unequal shares
    for statistic in ("accuracy", "mae", "skill"):
        metric, reference = OverlapPredictionMetric(statistic), OverlapPredictionMetric(statistic)
        metric(logits[own], target[own])
        rows = reference(logits, target)
        expected = 1 - rows.mean(0)[0] / rows.mean(0)[1:].min() if statistic == "skill" else rows.mean()
        torch.testing.assert_close(metric.aggregate(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("check", [check_loss, check_one_volume_each, check_metric])
def test_two_processes(two_processes: ProcessPair, check: Callable[[int], None]) -> None:
    two_processes(check)
