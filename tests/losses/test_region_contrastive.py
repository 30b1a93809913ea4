# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.losses import (
    RegionContrastiveLoss,
    published_regions,
    region_info_nce,
    region_negatives,
    region_starts,
    region_vectors,
    slice_pairs,
)

from .slice_batches import batch_a, random, slice_ids
from .test_partition_contrastive import Largest

E = math.e
TWO_SLICES = torch.tensor([7, 7, 3, 3])


def region_loop(
    regions: Tensor, weights: Tensor, negatives: Tensor, temperature: float, matched: Tensor | None = None
) -> Tensor:
    """The definition, one pair of maps and one region after the other."""
    unit = regions / regions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    score = lambda x, y: torch.exp(x @ y / temperature)
    total, maps = regions.new_zeros(()), range(len(regions))
    anchors = [r for r in range(len(negatives)) if negatives[r].any()]
    for a, b in product(maps, maps):
        for r in anchors if weights[a, b] else []:
            own = score(unit[a, r], unit[b, r])
            rest = [score(unit[a, r], unit[m, q]) for m in (a, b) for q in range(len(negatives)) if negatives[r, q]]
            rest += [score(unit[a, r], unit[m, r]) for m in maps if matched is not None and matched[a, m]]
            total = total - weights[a, b] * torch.log(own / (own + sum(rest))) / len(anchors)
    return total / weights.sum()


# ---- places


def test_starts() -> None:
    expected = [*product((0, 6, 12), (0, 8, 16)), (3, 4), (3, 12), (9, 4), (9, 12)]
    assert region_starts((15, 19), 3).tolist() == [list(place) for place in expected]
    cube = region_starts((15, 16, 17), 3)
    assert cube.shape == (35, 3)
    assert cube[0].tolist() == [0, 0, 0]
    assert cube[26].tolist() == [12, 13, 14]
    assert cube[27:].tolist() == [list(place) for place in product((3, 9), (3, 9), (3, 10))]
    assert len({tuple(place) for place in cube.tolist()}) == 35


@pytest.mark.parametrize("region_size", [1, 2, 3, 4])
@pytest.mark.parametrize("axes", [2, 3])
def test_smallest_map(region_size: int, axes: int) -> None:
    """5 K cells do; for the last four sizes below them two regions share a cell."""
    for length in range(5 * region_size, 5 * region_size + 5):
        negatives = region_negatives(region_starts((length,) * axes, region_size), region_size)
        assert torch.equal(negatives, ~torch.eye(len(negatives), dtype=torch.bool))
    for length in range(region_size, 5 * region_size):
        with pytest.raises(ValueError, match=rf"overlap: a map needs at least {5 * region_size} cells along each axis"):
            region_negatives(region_starts((length,) * axes, region_size), region_size)


@pytest.mark.parametrize("length", [12, 13, 14])
def test_small_maps_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="overlap: a map needs at least 15 cells"):
        RegionContrastiveLoss()(torch.rand(4, 2, length, length), TWO_SLICES)
    assert RegionContrastiveLoss()(torch.rand(4, 2, 15, 15), TWO_SLICES).isfinite()


def test_vectors() -> None:
    vectors = region_vectors(torch.arange(70.0).view(2, 1, 5, 7), torch.tensor([[1, 2]]), 3)
    assert vectors.shape == (2, 1, 9)
    assert vectors[0, 0].tolist() == [9, 10, 11, 16, 17, 18, 23, 24, 25]
    assert vectors[1, 0].tolist() == [44, 45, 46, 51, 52, 53, 58, 59, 60]


def test_vectors_are_those_of_unfold() -> None:
    features, starts = random(3, 4, 15, 19), region_starts((15, 19), 3)
    windows = F.unfold(features, 3).unflatten(2, (13, 17))  # (N, C K^2, rows, columns)
    expected = windows[:, :, starts[:, 0], starts[:, 1]].transpose(1, 2)
    assert torch.equal(region_vectors(features, starts, 3), expected)
    assert torch.equal(region_vectors(features, starts.tolist(), 3), expected)


def test_vectors_in_3d() -> None:
    features, starts = random(2, 3, 10, 11, 12), region_starts((10, 11, 12), 2)
    vectors = region_vectors(features, starts, 2)
    assert vectors.shape == (2, 35, 24)
    for number, (i, j, k) in enumerate(starts.tolist()):
        patch = features[:, :, i : i + 2, j : j + 2, k : k + 2]
        assert torch.equal(vectors[:, number], patch.flatten(1))


@pytest.mark.parametrize("starts", [[[13, 0]], [[0, -1]], [[0, 0, 0]]])
def test_vectors_outside(starts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"leave the map of \(15, 19\)|starts \(1, 3\) must be \(R, 2\)"):
        region_vectors(torch.zeros(1, 1, 15, 19), torch.tensor(starts), 3)


def test_published_places() -> None:
    starts, negatives = published_regions((48, 52))
    row, column = ({"0": 0, "q": m // 4, "h": m // 2, "t": 3 * m // 4, "m": m} for m in (44, 48))
    at = {name: [row[name[0]], column[name[1]]] for name in map("".join, product("0qhtm", repeat=2))}
    assert starts.tolist()[:5] == [at["00"], at["0h"], at["0m"], at["h0"], at["hh"]]
    assert starts.tolist()[-4:] == [at["hq"], at["ht"], at["qh"], at["th"]]
    assert negatives.sum(1).tolist() == [5] * 13 + [0] * 4
    places = lambda r, n: {tuple(place) for place in starts[published_regions((48, 52), n)[1][r]].tolist()}
    assert places(0, 5) == {tuple(at[name]) for name in ("0h", "qq", "qh", "h0", "hq")}
    assert places(8, 5) == {tuple(at[name]) for name in ("ht", "hm", "mh", "tt", "th")}
    assert places(12, 5) == {tuple(at[name]) for name in ("hh", "hm", "mh", "mm", "tq")}
    assert places(12, 4) == {tuple(at[name]) for name in ("hh", "hm", "mh", "mm")}
    last = starts.amax(0).tolist()
    assert last == [44, 48]  # one cell from the border, since regions have 3 cells


# ---- hand-worked values


def test_constant_maps_are_at_chance() -> None:
    constant = torch.full((4, 3, 15, 15), 0.7)
    assert RegionContrastiveLoss()(constant, TWO_SLICES).item() == pytest.approx(math.log(25), abs=1e-6)
    ids = batch_a()
    value = RegionContrastiveLoss("LD", matched_negatives=True)(torch.ones(8, 2, 15, 15), **ids)
    assert value.item() == pytest.approx(math.log(29), abs=1e-6)
    ids = slice_ids(3, 4, 2)
    assert int(slice_pairs("GD", **ids)[0].sum()) == 72
    value = RegionContrastiveLoss("LR", matched_negatives=True)(torch.ones(24, 13, 2), **ids)
    assert value.item() == pytest.approx(math.log(43), abs=1e-6)


def own_channels() -> Tensor:
    """A map of 15 x 15 in which every place is its own one-hot channel."""
    return torch.eye(225, dtype=torch.float64).view(225, 15, 15)[None]


def test_places_with_channels_of_their_own() -> None:
    maps = own_channels().expand(4, -1, -1, -1)
    for temperature, expected in ((1.0, 2.2853480), (0.1, 0.00108901)):
        value = RegionContrastiveLoss("LR", temperature)(maps, TWO_SLICES).item()
        assert value == pytest.approx(math.log(1 + 24 * math.exp(-1 / temperature)), abs=1e-12)
        assert value == pytest.approx(expected, abs=1e-6)
    matched = RegionContrastiveLoss("LR", 0.1, matched_negatives=True)
    value = matched(own_channels().expand(8, -1, -1, -1), **batch_a()).item()
    assert value == pytest.approx(math.log(5 + 24 * math.exp(-10)), abs=1e-12)
    assert value == pytest.approx(1.6096558, abs=1e-6)


@pytest.mark.parametrize("mode, number", [("LR", 11), ("LD", 9)])
def test_chance_of_published_regions(mode: str, number: int) -> None:
    loss = RegionContrastiveLoss(mode, regions="published")
    for features in (torch.ones(8, 2, 16, 20), torch.ones(8, 17, 4)):
        assert loss(features, **batch_a()).item() == pytest.approx(math.log(number), abs=1e-6)


# ---- against loops


@pytest.mark.parametrize(
    "ids",
    [slice_ids(2, 3, 2), slice_ids(1, 4, 3), slice_ids([5, 2, 5], 2, 2), slice_ids(1, 6, 2), slice_ids(3, 1, 2)],
    ids=["3 partitions", "one volume, 3 views", "repeated volume", "6 partitions", "one partition"],
)
@pytest.mark.parametrize("mode", ["LR", "LD"])
@pytest.mark.parametrize("matched", [False, True])
def test_equal_to_loops(mode: str, matched: bool, ids: dict[str, Tensor]) -> None:
    vectors = random(len(ids["source"]), 13, 5).requires_grad_()
    positives, _ = slice_pairs("GR" if mode == "LR" else "GD", **ids)
    differs = ids["partition"][:, None] != ids["partition"]
    negatives = ~torch.eye(13, dtype=torch.bool)
    expected = region_loop(vectors, positives.double(), negatives, 0.2, differs if matched else None)
    value = RegionContrastiveLoss(mode, 0.2, matched_negatives=matched)(vectors, **ids)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    gradients = [torch.autograd.grad(v, vectors)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_maps_equal_their_region_vectors() -> None:
    ids, maps = slice_ids(2, 2, 2), random(8, 2, 15, 19)
    for mode, regions in product(("LR", "LD"), ("lattice", "published")):
        starts = region_starts((15, 19), 3) if regions == "lattice" else published_regions((16, 20))[0]
        size = maps if regions == "lattice" else F.pad(maps, (0, 1, 0, 1))
        loss = RegionContrastiveLoss(mode, matched_negatives=True, regions=regions)
        torch.testing.assert_close(loss(size, **ids), loss(region_vectors(size, starts, 3), **ids), atol=1e-12, rtol=0)


def test_regions_in_3d_equal_loops() -> None:
    ids, maps = slice_ids(2, 2, 1), random(4, 2, 5, 6, 7)
    starts = region_starts((5, 6, 7), 1)
    vectors = torch.stack([maps[:, :, i, j, k] for i, j, k in starts.tolist()], 1)
    positives, _ = slice_pairs("GD", **ids)
    expected = region_loop(vectors, positives.double(), ~torch.eye(35, dtype=torch.bool), 0.3)
    for features in (maps, vectors):
        value = RegionContrastiveLoss("LD", 0.3, region_size=1)(features, **ids)
        torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("matched", [False, True])
def test_released_pairs_as_weights(matched: bool) -> None:
    """Anchors of the first view only, partners in the next two volumes, in one direction; places as published."""
    ids = slice_ids(3, 2, 2)
    item = lambda volume, partition, view: 4 * volume + 2 * partition + view
    weights = torch.zeros(12, 12, dtype=torch.float64)
    for volume, partition in product(range(3), range(2)):
        a = item(volume, partition, 0)
        weights[a, item(volume, partition, 1)] += 1
        for step in (1, 2):
            weights[a, item((volume + step) % 3, partition, 0)] += 1.5  # any weight
    negatives = published_regions((16, 16), 4)[1]
    differs = ids["partition"][:, None] != ids["partition"] if matched else None
    vectors = random(12, 17, 4)
    expected = region_loop(vectors, weights, negatives, 0.1, differs)
    value = region_info_nce(vectors, weights, negatives, 0.1, differs)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)


def test_gradcheck() -> None:
    ids = slice_ids(2, 1, 2)
    for mode in ("LR", "LD"):
        loss = RegionContrastiveLoss(mode, 0.5, matched_negatives=True)
        assert torch.autograd.gradcheck(lambda z, f=loss: f(z, **ids), (random(4, 13, 2).requires_grad_(),))


# ---- what belongs to what


def test_order_of_the_batch() -> None:
    ids, order = slice_ids(2, 3, 2), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    z = random(12, 13, 4)
    for mode, matched in product(("LR", "LD"), (False, True)):
        loss = RegionContrastiveLoss(mode, matched_negatives=matched)
        shuffled = loss(z[order], **{name: x[order] for name, x in ids.items()})
        torch.testing.assert_close(shuffled, loss(z, **ids), atol=1e-12, rtol=0)


def test_matched_negatives_without_partitions_are_other_slices() -> None:
    z = random(4, 13, 5)
    loss = RegionContrastiveLoss(matched_negatives=True)
    expected = region_loop(
        z, slice_pairs("GR", TWO_SLICES)[0].double(), ~torch.eye(13, dtype=torch.bool), 0.1,
        TWO_SLICES[:, None] != TWO_SLICES,
    )  # fmt: skip
    torch.testing.assert_close(loss(z, TWO_SLICES), expected, atol=1e-10, rtol=0)
    together = loss(z, TWO_SLICES, torch.zeros(4, dtype=torch.int64))  # one partition: nothing to match with
    torch.testing.assert_close(together, RegionContrastiveLoss()(z, TWO_SLICES), atol=1e-12, rtol=0)


def test_place_alone_does_not_solve_matched_negatives() -> None:
    """Every place told apart, slices not: 0 without matched negatives, with them no better than guessing the slice."""
    maps, ids = own_channels().expand(8, -1, -1, -1), batch_a()
    assert RegionContrastiveLoss("LR", 0.01)(maps, **ids).item() < 1e-9
    assert RegionContrastiveLoss("LR", 0.01, matched_negatives=True)(maps, **ids).item() == pytest.approx(math.log(5))


def test_no_positives() -> None:
    z = random(4, 13, 3).requires_grad_()
    value = RegionContrastiveLoss()(z, torch.arange(4))
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == 0
    assert not gradient.any()


# ---- numbers, memory, errors


@pytest.mark.parametrize("mode", ["LR", "LD"])
@pytest.mark.parametrize("matched", [False, True])
def test_low_temperature_and_zeros_are_finite(mode: str, matched: bool) -> None:
    loss, ids = RegionContrastiveLoss(mode, 0.005, matched_negatives=matched), slice_ids(2, 2, 2)
    for z in (random(8, 13, 5).float(), torch.zeros(8, 13, 5)):
        z.requires_grad_()
        value = loss(z, **ids)
        value.backward()
        assert value.isfinite()
        assert z.grad.isfinite().all()


def test_autocast_is_switched_off() -> None:
    ids, z = slice_ids(2, 2, 2), random(8, 3, 15, 15).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = RegionContrastiveLoss("LD")(z, **ids)
    assert torch.equal(inside, RegionContrastiveLoss("LD")(z, **ids))


def test_no_tensor_larger_than_all_pairs_of_regions() -> None:
    ids, z = slice_ids(2, 3, 2), random(12, 13, 400).requires_grad_()
    with Largest() as largest:
        RegionContrastiveLoss("LD", matched_negatives=True)(z, **ids).backward()
    assert largest.size == max(12 * 12 * 13 * 13, 12 * 13 * 400)


@pytest.mark.parametrize("mode", ["LR", "LD"])
def test_descent(mode: str) -> None:
    ids, z = slice_ids(3, 2, 2), random(12, 13, 16).requires_grad_()
    values = []
    for _ in range(20):
        value = RegionContrastiveLoss(mode, matched_negatives=True)(z, **ids)
        (gradient,) = torch.autograd.grad(value, z)
        values.append(value.item())
        with torch.no_grad():
            z -= 0.1 * gradient.sign()
    assert values[-1] < 0.5 * values[0]


VECTORS = torch.zeros(4, 13, 2)
SQUARE = torch.ones(4, 4, dtype=torch.bool)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "mode": (lambda: RegionContrastiveLoss("GR"), "mode must be one of LR, LD, got 'GR'"),
    "temperature": (lambda: RegionContrastiveLoss(temperature=-1), "temperature must be positive"),
    "regions": (lambda: RegionContrastiveLoss(regions="grid"), "regions must be one of lattice, published, got 'grid'"),
    "size of published": (lambda: RegionContrastiveLoss(region_size=2, regions="published"), "3 for published regions"),
    "no region": (lambda: RegionContrastiveLoss(region_size=0), "region_size must be at least 1"),
    "vectors": (
        lambda: RegionContrastiveLoss()(torch.zeros(4, 12, 2), TWO_SLICES),
        r"features \(4, 12, 2\) have 12 region vectors, lattice regions are 13 or 35",
    ),
    "published vectors": (
        lambda: RegionContrastiveLoss(regions="published")(VECTORS, TWO_SLICES),
        "have 13 region vectors, published regions are 17",
    ),
    "one axis": (lambda: RegionContrastiveLoss()(torch.zeros(4, 13), TWO_SLICES), "maps with 2 or 3 axes, got 0"),
    "published in 3D": (
        lambda: RegionContrastiveLoss(regions="published")(torch.zeros(4, 1, 16, 16, 16), TWO_SLICES),
        "published regions lie in maps with 2 axes, got 3",
    ),
    "published on a small map": (
        lambda: RegionContrastiveLoss(regions="published")(torch.zeros(4, 1, 15, 15), TWO_SLICES),
        "overlap: a map needs at least 16 cells",
    ),
    "no partition": (lambda: RegionContrastiveLoss("LD")(VECTORS, TWO_SLICES), "mode 'LD' needs partition and volume"),
    "source": (lambda: RegionContrastiveLoss()(VECTORS, TWO_SLICES[1:]), r"source \(3,\) must be \(N,\)"),
    "no anchors": (lambda: region_info_nce(VECTORS, SQUARE, torch.zeros(13, 13, dtype=torch.bool)), "no row of negat"),
    "negatives": (lambda: region_info_nce(VECTORS, SQUARE, SQUARE), r"negatives \(4, 4\) \(R, R\)"),
    "matched": (
        lambda: region_info_nce(VECTORS, SQUARE, torch.ones(13, 13, dtype=torch.bool), 0.1, SQUARE[1:]),
        r"positives and matched \[\(4, 4\), \(3, 4\)\] \(N, N\)",
    ),
    "published negatives": (lambda: published_regions((16, 16), 6), "between 1 and 5, got 6"),
    "published map": (lambda: published_regions((16, 3)), r"at least 4 cells, got \(16, 3\)"),
    "map below a region": (lambda: region_starts((15, 2), 3), r"do not fit into a map of \(15, 2\)"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
