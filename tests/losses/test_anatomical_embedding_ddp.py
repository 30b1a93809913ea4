# SPDX-License-Identifier: Apache-2.0
"""SAM on two processes: diverse negatives are those of both, and gradients those of the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monai_ssl.losses import AnatomicalEmbeddingLoss, GlobalPairSampler, LocalPairSampler, PairSamples
from monai_ssl.networks import AnatomicalEmbeddingNet
from monai_ssl.transforms import RandPairedViews

from .processes import WORLD_SIZE, ProcessPair, half

ROI, VOLUMES = (24, 32), 4


class Encoder(nn.Module):
    """Three maps without batch norm, whose statistics would be those of each process."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, 2, 1)
        self.stages = nn.ModuleList([conv(1, 4), conv(4, 5), conv(5, 6)])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x).tanh()
            maps.append(x)
        return maps


def network() -> nn.Module:
    torch.manual_seed(0)
    return AnatomicalEmbeddingNet(Encoder(), (4, 5, 6), 2, embed_dim=7, local_levels=(0, 1)).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    transform = RandPairedViews(ROI, (0.8, 1.2), placement="seed").set_random_state(0)
    volumes = torch.rand(VOLUMES, 1, 50, 60, generator=torch.Generator().manual_seed(0))
    image, image_2, affine = (torch.stack(parts).as_subclass(Tensor) for parts in zip(*map(transform, volumes)))
    affine[:, :, :2] *= 2.0
    return image.double(), image_2.double(), affine


def loss_function(gather: bool = True, num_diverse: int = 1000) -> AnatomicalEmbeddingLoss:
    local = LocalPairSampler(1000, 2.0, 5.0, (1000, 1000))
    return AnatomicalEmbeddingLoss(ROI, local, GlobalPairSampler(25.0, None, 5.0, (99, 99), num_diverse), gather=gather)


def compare(joined: Tensor, alone: nn.Module, own: Tensor, replica: nn.Module) -> None:
    joined.backward()
    own.backward()
    for (name, expected), parameter in zip(alone.named_parameters(), replica.parameters()):
        assert expected.grad.any()
        torch.testing.assert_close(
            parameter.grad, expected.grad, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    total = own.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / WORLD_SIZE, joined.detach(), atol=1e-12, rtol=0)


def check_all_negatives(rank: int) -> None:
    *images, affine = batch()
    alone, replica = network(), DistributedDataParallel(network())
    with mock.patch.object(dist, "is_initialized", return_value=False):  # as one process alone
        joined = loss_function()(alone(*images), affine)
    own = loss_function()(replica(*(half(x, rank) for x in images)), half(affine, rank))
    compare(joined, alone, own, replica)


def check_drawn_samples(rank: int) -> None:
    """A joined row v * 4 + b is row 2 v + b mod 2 of process b // 2."""
    *images, affine = batch()
    alone, replica = network(), DistributedDataParallel(network())
    sampler = AnatomicalEmbeddingLoss(
        ROI, LocalPairSampler(9, negatives=(30, 12)), GlobalPairSampler(25.0, None, 5.0, (9, 4), 11)
    )
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        maps = alone(*images)
        joined, drawn = record(sampler, maps, affine, generator)
    cells = maps[1][0, 0].numel()
    row, cell = drawn[1].diverse // cells, drawn[1].diverse % cells
    view, volume = row // VOLUMES, row % VOLUMES
    drawn[1] = drawn[1]._replace(diverse=(volume // 2 * 4 + 2 * view + volume % 2) * cells + cell)
    mine = tuple(PairSamples(*(None if x is None else half(x, rank) for x in samples)) for samples in drawn)
    own = sampler(replica(*(half(x, rank) for x in images)), half(affine, rank), mine)
    compare(joined, alone, own, replica)


def record(
    loss: AnatomicalEmbeddingLoss, maps: list[Tensor], affine: Tensor, generator: torch.Generator
) -> tuple[Tensor, list[PairSamples]]:
    """The loss and what it drew."""
    drawn = []
    for name in ("local_sampler", "global_sampler"):
        sampler = getattr(loss, name)
        setattr(loss, name, lambda *args, s=sampler, **kwargs: drawn.append(s(*args, **kwargs)) or drawn[-1])
    return loss(maps, affine, generator=generator), drawn


def check_own_volumes_only(rank: int) -> None:
    """Without gathering every process is as alone, and waits for no other."""
    *images, affine = batch()
    net = network()
    values = []
    for alone in (True, False):
        with mock.patch.object(dist, "is_initialized", return_value=not alone):
            output = net(*(half(x, rank) for x in images))
            values.append(loss_function(gather=False)(output, half(affine, rank)))
    torch.testing.assert_close(*values, atol=1e-12, rtol=0)
    gathered = loss_function()(output, half(affine, rank))
    assert (values[0] - gathered).abs() > 1e-3
    if rank == 0:
        loss_function(gather=False)(output, half(affine, rank))


def check_no_diverse_negatives(rank: int) -> None:
    """One volume on each process: the other's cells, and none of the own."""
    *images, affine = (x[rank : rank + 1] for x in batch())
    loss = loss_function()
    terms, drawn = record(loss, network()(*images), affine, torch.Generator().manual_seed(rank))
    cells = 3 * 4
    others = range(2 * cells, 4 * cells) if rank == 0 else range(2 * cells)
    assert terms.isfinite()
    assert [sorted(i) for i in drawn[1].diverse[0].tolist()] == [list(others)] * 2


CHECKS = [check_all_negatives, check_drawn_samples, check_own_volumes_only, check_no_diverse_negatives]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(two_processes: ProcessPair, check: Callable[[int], None]) -> None:
    two_processes(check)
