# SPDX-License-Identifier: Apache-2.0
"""CPC and NT-Xent on two processes: candidates are those of both, and gradients those of the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monai_ssl.losses import CPCLoss, NTXentLoss
from monai_ssl.networks import CPCNet, PatchClassifier

from .processes import WORLD_SIZE, ProcessPair, half


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    encoder = SegResEncoder(2, init_filters=4, norm="instance", blocks_down=(1, 1))
    if kind == "cpc":
        return CPCNet(encoder, 8, code_size=6, context_size=5, spatial_dims=2).double()
    return PatchClassifier(encoder, nn.Linear(8, 6), "each", spatial_dims=2).double()


def compare(kind: str, images: Tensor, rank: int, loss: Callable[[Any, bool], Tensor]) -> None:
    """`loss` gets the network's output and whether it is that of the joined batch."""
    alone = network(kind)
    with mock.patch.object(dist, "is_initialized", return_value=False):  # as one process alone
        joined = loss(alone(images), True)
        joined.backward()
    replica = DistributedDataParallel(network(kind))
    own = loss(replica(half(images, rank)), False)
    own.backward()
    for (name, expected), parameter in zip(alone.named_parameters(), replica.parameters()):
        torch.testing.assert_close(
            parameter.grad, expected.grad, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert expected.grad.any() or "bias" in name
    total = own.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / WORLD_SIZE, joined.detach(), atol=1e-12, rtol=0)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_cpc(rank: int) -> None:
    images = random(4, 16, 1, 6, 8)
    rows = torch.randint(32, (32, 5), generator=torch.Generator().manual_seed(2))  # 4 volumes, 4 columns, 2 rows
    columns = torch.arange(16).roll(6)[:, None]
    for mode, negatives in (("infonce", None), ("infonce", rows), ("paper", None), ("paper", rows), ("bce", columns)):
        part = None if negatives is None else half(negatives, rank)
        loss = CPCLoss(mode, temperature=0.5)
        compare("cpc", images, rank, lambda out, all_, g=negatives, p=part, f=loss: f(*out, negatives=g if all_ else p))


def check_nt_xent(rank: int) -> None:
    loss = lambda views, _: NTXentLoss(0.5)(views[:, 0], views[:, 1])
    compare("exemplar", random(4, 2, 1, 6, 8), rank, loss)
    compare("exemplar", random(2, 2, 1, 6, 8), rank, loss)  # one item each has the other's as negatives


def check_drawn_negatives(rank: int) -> None:
    """Codes of the other process are drawn too; the own code never."""
    x = torch.eye(8, dtype=torch.float64)[4 * rank : 4 * rank + 4].view(2, 2, 1, 8)
    codes = torch.zeros(2, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(rank)
    CPCLoss(temperature=1.0, normalize=False, num_negatives=1000)(x, codes, generator=generator).backward()
    counts = codes.grad.flatten(0, 2) * 4 * 1001  # (own code, row of either process)
    own = counts[:, 4 * rank : 4 * rank + 4]
    torch.testing.assert_close(own.diagonal(), torch.full((4,), -1000.0, dtype=torch.float64))
    assert ((counts > 80) | (counts < 0)).all()  # 143 expected


def check_no_gradient_wanted(rank: int) -> None:
    views = random(2, 2, 5, seed=rank)
    with torch.no_grad():
        assert NTXentLoss()(views[0], views[1]).isfinite()


def check_unequal_batches(rank: int) -> None:
    num = 2 + rank
    with pytest.raises(ValueError, match=r"different numbers of rows; set drop_last on the loader: \[4, 6\]"):
        NTXentLoss()(random(num, 5), random(num, 5))
    with pytest.raises(ValueError, match=r"different numbers of rows.*\[8, 12\]"):
        CPCLoss()(random(num, 2, 2, 5), random(num, 2, 2, 5))
    with pytest.raises(ValueError, match=r"different numbers of rows.*\[4, 6\]"):
        CPCLoss("bce")(random(num, 2, 2, 5), random(num, 2, 2, 5))


CHECKS = [check_cpc, check_nt_xent, check_drawn_negatives, check_no_gradient_wanted, check_unequal_batches]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(two_processes: ProcessPair, check: Callable[[int], None]) -> None:
    two_processes(check)
