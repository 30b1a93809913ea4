# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_ssl.losses import PartitionContrastiveLoss, masked_info_nce, slice_pairs

from .slice_batches import batch_a, random, slice_ids

E = math.e


def pair_loop(z: Tensor, positives: list[tuple[int, int, float]], negatives: Tensor, temperature: float) -> Tensor:
    """The definition: one pair after the other, exponentials and all."""
    unit = [row / row.norm().clamp_min(1e-12) for row in z]
    total, weights = z.new_zeros(()), 0.0
    for a, b, weight in positives:
        own = torch.exp(unit[a] @ unit[b] / temperature)
        others = sum(torch.exp(unit[a] @ unit[n] / temperature) for n in range(len(z)) if negatives[a, n])
        total = total - weight * torch.log(own / (own + others))
        weights += weight
    return total / weights


def loop_loss(mode: str, z: Tensor, ids: dict[str, Any], temperature: float) -> Tensor:
    positives, negatives = slice_pairs(mode, **ids)
    pairs = [(a, b, 1.0) for a in range(len(z)) for b in range(len(z)) if positives[a, b]]
    return pair_loop(z, pairs, negatives, temperature)


# ---- hand-worked values


@pytest.mark.parametrize("mode, number", [("GR", 7), ("GD-", 5), ("GD", 5)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equal_embeddings_are_at_chance(mode: str, number: int, temperature: float) -> None:
    z = random(1, 6).expand(8, -1)
    assert PartitionContrastiveLoss(mode, temperature)(z, **batch_a()).item() == pytest.approx(math.log(number))


@pytest.mark.parametrize("mode, number", [("GR", 23), ("GD-", 19), ("GD", 19)])
def test_chance_of_the_default_batch(mode: str, number: int) -> None:
    assert PartitionContrastiveLoss(mode)(torch.ones(24, 2), **slice_ids(3, 4, 2)).item() == pytest.approx(
        math.log(number), abs=1e-6
    )


BY_PARTITION = {"GR": math.log(3 + 4 / E), "GD-": math.log(1 + 4 / E), "GD": math.log(1 + 4 / E)}
BY_SOURCE = {
    "GR": math.log(1 + 6 / E),
    "GD-": math.log(1 + 4 / E),
    "GD": (math.log(1 + 4 / E) + math.log(5)) / 2,
}


@pytest.mark.parametrize("mode", ["GR", "GD-", "GD"])
def test_one_hot_embeddings(mode: str) -> None:
    ids, loss = batch_a(), PartitionContrastiveLoss(mode, 1.0)
    by_partition = F.one_hot(ids["partition"]).double()
    by_source = F.one_hot(2 * ids["volume"] + ids["partition"]).double()
    assert loss(by_partition, **ids).item() == pytest.approx(BY_PARTITION[mode], abs=1e-9)
    assert loss(by_source, **ids).item() == pytest.approx(BY_SOURCE[mode], abs=1e-9)
    assert loss(3 * by_source.float(), **ids).item() == pytest.approx(BY_SOURCE[mode], abs=1e-6)


def test_two_slices_in_two_views() -> None:
    source = torch.tensor([4, 4, 9, 9])
    one_hot = F.one_hot(torch.tensor([0, 0, 1, 1])).double()
    assert PartitionContrastiveLoss("GR", 1.0)(one_hot, source).item() == pytest.approx(0.5514447, abs=1e-6)
    assert PartitionContrastiveLoss("GR", 0.1)(one_hot, source).item() == pytest.approx(9.07957e-5, abs=1e-9)
    angle = torch.tensor([0.0, 60, 90, 150], dtype=torch.float64).deg2rad()
    z = torch.stack([angle.cos(), angle.sin()], 1)
    assert PartitionContrastiveLoss("GR", 0.5)(z, source).item() == pytest.approx(0.7986570, abs=1e-6)


def test_zero_embeddings() -> None:
    z = torch.zeros(4, 3, requires_grad=True)
    value = PartitionContrastiveLoss("GR")(z, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(3), abs=1e-6)
    assert z.grad.isfinite().all()


# ---- against loops

BATCHES = {
    "3 partitions": slice_ids(3, 3, 2),
    "4 partitions, 3 views": slice_ids(2, 4, 3),
    "6 partitions": slice_ids(2, 6, 2),
    "one volume": slice_ids(1, 4, 2),
    "repeated volume": slice_ids([5, 2, 5], 3, 2),
    "repeated slices": {name: torch.cat([x, x]) for name, x in slice_ids(2, 3, 2).items()},
    "no views": {**slice_ids(3, 3, 2), "view": None},
}


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("mode", ["GR", "GD-", "GD"])
@pytest.mark.parametrize("temperature", [0.04, 0.1, 0.7])
def test_equal_to_pair_loops(mode: str, ids: dict[str, Any], temperature: float) -> None:
    z = random(len(ids["source"]), 5).requires_grad_()
    expected = loop_loss(mode, z, ids, temperature)
    value = PartitionContrastiveLoss(mode, temperature)(z, **ids)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    gradients = [torch.autograd.grad(v, z)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_any_list_of_pairs_can_be_replayed() -> None:
    """Directed pairs, some of them several times, as weights: the groups of the released G^D, one after the other."""
    ids, z = slice_ids(3, 4, 2), random(24, 6)
    item = lambda volume, partition, view: 8 * volume + 2 * partition + view
    pairs = []
    for partition in range(4):
        for volume in range(3):
            after = (volume + 1) % 3  # groups [original, changed] of one volume and of the next, in a circle
            pairs += [(item(volume, partition, 0), item(volume, partition, 1), 1.0)]
            pairs += [(item(volume, partition, v), item(after, partition, v), 1.0) for v in range(2)] * 2
    weights = torch.zeros(24, 24)
    for a, b, weight in pairs:
        weights[a, b] += weight
    assert weights.max() == 2
    negatives = slice_pairs("GD", **ids)[1]
    expected = pair_loop(z, pairs, negatives, 0.1)
    torch.testing.assert_close(masked_info_nce(z, weights, negatives), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(masked_info_nce(z, 4 * weights, negatives), expected, atol=1e-10, rtol=0)


def test_gradcheck() -> None:
    ids = slice_ids(2, 3, 2)
    for mode in ("GR", "GD-", "GD"):
        loss = PartitionContrastiveLoss(mode, 0.5)
        assert torch.autograd.gradcheck(lambda z, f=loss: f(z, **ids), (random(12, 4).requires_grad_(),))


# ---- what belongs to what


def test_slices_of_the_own_partition_are_no_negatives() -> None:
    """Another volume's slice of the anchor's partition leaves the anchor's G^D- term; one of another does not."""
    ids = slice_ids(3, 4, 2)
    positives, negatives = slice_pairs("GD-", **ids)
    only = torch.zeros_like(positives)
    only[0, 1] = True  # volume 0, partition 0
    value = lambda z: masked_info_nce(z, positives & only, negatives).item()
    z, neighbour, other = (random(24, 6) for _ in range(3))
    neighbour[[8, 9, 16, 17]] += 1.0
    other[10] += 1.0
    assert value(neighbour) == value(z)
    assert abs(value(other) - value(z)) > 1e-6
    everywhere = PartitionContrastiveLoss("GR")
    assert everywhere(neighbour, **ids).item() != everywhere(z, **ids).item()


def test_one_volume_needs_no_partners() -> None:
    ids, z = slice_ids(1, 4, 2), random(8, 5)
    assert torch.equal(*(PartitionContrastiveLoss(mode)(z, **ids) for mode in ("GD", "GD-")))


def test_order_of_the_batch() -> None:
    ids, z = slice_ids(3, 3, 2), random(18, 5)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2)).roll(1)
    assert not (order == torch.arange(18)).any()
    for mode in ("GR", "GD-", "GD"):
        loss = PartitionContrastiveLoss(mode)
        shuffled = loss(z[order], **{name: x[order] for name, x in ids.items()})
        torch.testing.assert_close(shuffled, loss(z, **ids), atol=1e-12, rtol=0)


def test_no_positives_and_no_negatives() -> None:
    z = random(4, 3).requires_grad_()
    nothing, everything = torch.zeros(4, 4, dtype=torch.bool), ~torch.eye(4, dtype=torch.bool)
    for positives, negatives in ((nothing, everything), (everything, nothing)):
        value = masked_info_nce(z, positives, negatives)
        (gradient,) = torch.autograd.grad(value, z)
        assert value.item() == 0
        assert not gradient.any()
    alone = PartitionContrastiveLoss("GR")(z, torch.arange(4))  # one view of each slice
    assert alone.item() == 0


# ---- numbers, speed, errors


@pytest.mark.parametrize("mode", ["GR", "GD-", "GD"])
def test_low_temperature_is_finite(mode: str) -> None:
    ids, z = slice_ids(3, 4, 2), random(24, 5).float().requires_grad_()
    value = PartitionContrastiveLoss(mode, 0.005)(z, **ids)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_switched_off(autocast: torch.dtype) -> None:
    ids, z = slice_ids(2, 3, 2), random(12, 64).float()
    with torch.autocast("cpu", dtype=autocast):
        inside = PartitionContrastiveLoss()(z, **ids)
    assert torch.equal(inside, PartitionContrastiveLoss()(z, **ids))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


def test_no_tensor_of_pairs_and_dimensions() -> None:
    ids, z = slice_ids(3, 4, 2), random(24, 256).requires_grad_()
    with Largest() as largest:
        PartitionContrastiveLoss("GD")(z, **ids).backward()
    assert largest.size == 24 * 256


@pytest.mark.parametrize("mode", ["GR", "GD-", "GD"])
def test_descent(mode: str) -> None:
    ids, z = slice_ids(3, 4, 2), random(24, 8).requires_grad_()
    values = []
    for _ in range(20):
        value = PartitionContrastiveLoss(mode)(z, **ids)
        (gradient,) = torch.autograd.grad(value, z)
        values.append(value.item())
        with torch.no_grad():
            z -= 0.1 * gradient.sign()
    assert values[-1] < 0.5 * values[0]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "mode": (lambda: PartitionContrastiveLoss("LR"), "mode must be one of GR, GD-, GD, got 'LR'"),
    "temperature": (lambda: PartitionContrastiveLoss(temperature=0), "temperature must be positive, got 0"),
    "no partition": (lambda: PartitionContrastiveLoss("GD-")(torch.ones(4, 2), torch.arange(4)), "needs partition"),
    "source": (
        lambda: PartitionContrastiveLoss("GR")(torch.ones(4, 2), torch.arange(5)),
        r"source \(5,\) must be \(N,\), one for each row of embeddings \(N, D\), which has \(4, 2\)",
    ),
    "maps": (
        lambda: PartitionContrastiveLoss("GR")(torch.ones(4, 2, 3), torch.arange(4)),
        r"embeddings \(4, 2, 3\) must be \(N, D\)",
    ),
    "masks": (
        lambda: masked_info_nce(torch.ones(4, 2), torch.ones(4, 4), torch.ones(4, 5)),
        r"positives \(4, 4\) and negatives \(4, 5\) \(N, N\)",
    ),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
