# SPDX-License-Identifier: Apache-2.0
"""Contrast of slices and regions on two processes: each computes the loss of the joined batch, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monai_ssl.losses import PartitionContrastiveLoss, RegionContrastiveLoss, gather_with_grad
from monai_ssl.networks import ContrastiveUNet

from .processes import ProcessPair, half
from .slice_batches import random, slice_ids

PLANE = (16, 20)
# each process gets the first or the second half of the items
BATCHES = {
    "even": slice_ids(4, 2, 2),
    "three partitions": slice_ids(4, 3, 1),
    "one volume on both": slice_ids([0, 1, 1, 2], 2, 2),
    # two views of every slice here, views of unlike slices there
    "uneven": {
        "source": torch.tensor([0, 0, 1, 1, 2, 2, 2**20, 2**20 + 1, 2**20 + 3, 2 * 2**20, 2 * 2**20 + 1, 3 * 2**20]),
        "partition": torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 1]),
        "volume": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3]),
        "view": torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1]),
    },
}


def network(blocks: int) -> ContrastiveUNet:
    """In evaluation mode: in training each process has batch statistics of its own, unless they are synchronised."""
    torch.manual_seed(0)
    unet = UNet(2, 1, 2, (4, 6, 8), (2, 2), num_res_units=1, norm="batch")
    return ContrastiveUNet(unet, PLANE, blocks, hidden_channels=9, out_channels=6, region_size=1).double().eval()


def compare(blocks: int, loss: nn.Module, ids: dict[str, Tensor], rank: int) -> None:
    images = random(len(ids["source"]), 1, *PLANE, seed=3)
    alone = network(blocks)
    with mock.patch.object(dist, "is_initialized", return_value=False):  # as one process alone
        joined = loss(alone(images), **ids)
        joined.backward()
    replica = DistributedDataParallel(network(blocks))
    own = loss(replica(half(images, rank)), **{name: half(x, rank) for name, x in ids.items()})
    own.backward()
    torch.testing.assert_close(own, joined, atol=1e-12, rtol=0)  # on every process, not only on average
    trained = 0
    for (name, expected), parameter in zip(alone.named_parameters(), replica.parameters()):
        assert (expected.grad is None) == (parameter.grad is None)
        if expected.grad is not None:
            assert expected.grad.any() or "bias" in name
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-12, rtol=1e-9)
            trained += 1
    assert trained >= 4


def check_slices(rank: int) -> None:
    for mode, ids in product(("GR", "GD-", "GD"), BATCHES.values()):
        if mode == "GD" or len(ids["source"].unique()) < len(ids["source"]):  # else there are no positives
            compare(0, PartitionContrastiveLoss(mode, 0.5), ids, rank)


def check_regions(rank: int) -> None:
    for mode, matched, ids in product(("LR", "LD"), (False, True), BATCHES.values()):
        if mode == "LD" or len(ids["source"].unique()) < len(ids["source"]):
            compare(1, RegionContrastiveLoss(mode, 0.5, region_size=1, matched_negatives=matched), ids, rank)


def check_own_batch_only(rank: int) -> None:
    ids, z = {name: half(x, rank) for name, x in BATCHES["even"].items()}, random(8, 5, seed=rank)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = PartitionContrastiveLoss()(z, **ids)
    assert torch.equal(PartitionContrastiveLoss(gather=False)(z, **ids), expected)
    assert not torch.equal(PartitionContrastiveLoss()(z, **ids), expected)


def check_absent_ids(rank: int) -> None:
    ids = {name: half(x, rank) for name, x in BATCHES["even"].items()}
    z = random(16, 5)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = PartitionContrastiveLoss("GD")(z, **{**BATCHES["even"], "view": None})
    value = PartitionContrastiveLoss("GD")(half(z, rank), **{**ids, "view": None})
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def check_gather(rank: int) -> None:
    x = torch.full((2, 3), float(rank), requires_grad=True)
    rows = gather_with_grad(x)
    assert rows.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    ((1 + rank) * rows[2:].sum() + rows[0].sum()).backward()
    assert torch.equal(x.grad, torch.tensor([[2.0] * 3, [0.0] * 3]) if rank == 0 else torch.full((2, 3), 3.0))


def check_unequal_batches(rank: int) -> None:
    num = 4 + 2 * rank
    source = torch.arange(num) // 2
    with pytest.raises(ValueError, match=r"different numbers of rows; set drop_last on the loader: \[4, 6\]"):
        PartitionContrastiveLoss("GR")(random(num, 5), source)
    with pytest.raises(ValueError, match=r"different numbers of rows.*\[4, 6\]"):
        RegionContrastiveLoss("LR")(random(num, 13, 5), source)


CHECKS = [check_slices, check_regions, check_own_batch_only, check_absent_ids, check_gather, check_unequal_batches]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(two_processes: ProcessPair, check: Callable[[int], None]) -> None:
    two_processes(check)
