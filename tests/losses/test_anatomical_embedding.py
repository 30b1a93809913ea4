# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.losses import (
    AnatomicalEmbeddingLoss,
    GlobalPairSampler,
    LocalPairSampler,
    PairSamples,
    _pair_products,
    info_nce,
    pair_contrast_loss,
)
from monai_ssl.losses.anatomical_embedding import info_nce as same_function
from monai_ssl.transforms import feature_affine, transform_points, voxel_index

from .pair_reference import global_samples, local_samples, loop_loss
from .test_pair_sampling import affines, as_reference, random, unit_maps


def E(negatives: int) -> float:
    """The loss of a positive of similarity 1 and so many of similarity 0 at temperature 0.5."""
    return math.log(1 + negatives * math.exp(-2))


# ---- values worked by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positive, negatives, mask, expected",
    [
        (1.0, (0.0, 0.0), None, 0.2395448),
        (0.5, (0.5, -0.5, 0.1), None, 0.9495956),
        (1.0, (0.0, 0.9), (True, False), 0.1269280),
        (0.3, (0.9, 0.8), (False, False), 0.0),
        (0.3, (), None, 0.0),
        (0.7, (0.7,) * 500, None, math.log(501)),
    ],
)
def test_info_nce(positive: float, negatives: Any, mask: Any, expected: float) -> None:
    assert info_nce is same_function
    rows = torch.tensor([[positive]]), torch.tensor(negatives).view(1, 1, -1)
    value = info_nce(*rows, 0.5, None if mask is None else torch.tensor(mask).view(1, 1, -1))
    assert value.shape == (1, 1)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_masked_similarities_get_no_gradient() -> None:
    negatives = torch.tensor([0.1, 9.0], requires_grad=True)
    info_nce(torch.tensor(0.5), negatives, 0.5, torch.tensor([True, False])).backward()
    assert negatives.grad[0] > 0
    assert negatives.grad[1] == 0


def views(shift: tuple[float, float] = (0.0, 0.0), volumes: int = 1) -> Tensor:
    """Two views of 2 mm voxels, the second shifted by mm."""
    out = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).repeat(volumes, 2, 1, 1)
    out[:, 1, :2, 2] = torch.tensor(shift, dtype=torch.float64)
    return out


def one_hot(affine: Tensor, size: tuple[int, ...]) -> Tensor:
    """Equal world position, equal vector; other volumes' vectors are orthogonal."""
    world = transform_points(feature_affine(affine, (8, 8), size), voxel_index(size)).round(decimals=4)
    volumes, number = len(affine), itertools.count()
    names: dict[Any, int] = {}
    out = torch.zeros(2 * volumes, 2 * world[..., 0].numel(), math.prod(size))
    for b, v, cell in itertools.product(range(volumes), range(2), range(math.prod(size))):
        place = (b, *world[b, v, cell].tolist())
        names[place] = names[place] if place in names else next(number)
        out[v * volumes + b, names[place], cell] = 1
    return out.unflatten(2, size)


EVERY = (1000, 1000)


@pytest.mark.parametrize(
    "radius, negatives, coarse, volumes, shift, expected",
    [
        (3.9, EVERY, (EVERY, 0), 1, (0, 0), (E(30), E(6))),
        (4.5, EVERY, (EVERY, 0), 1, (0, 0), ((4 * E(26) + 8 * E(24) + 4 * E(22)) / 16, E(6))),
        (3.9, (5, 5), ((3, 3), 0), 1, (0, 0), (E(5), E(3))),
        (3.9, EVERY, (EVERY, 8), 2, (0, 0), (E(30), E(14))),
        (3.9, EVERY, (EVERY, 0), 1, (0, 4), (E(30), None)),
        (3.9, EVERY, (EVERY, 0), 1, (100, 0), (E(15), E(7))),
    ],
)
def test_one_hot_cells(
    radius: float, negatives: Any, coarse: Any, volumes: int, shift: Any, expected: tuple[float, float | None]
) -> None:
    """Views of 8 x 8 voxels, maps of 4 x 4 and of 2 x 2 cells."""
    affine = views(shift, volumes)
    loss = AnatomicalEmbeddingLoss(
        (8, 8), LocalPairSampler(100, 2.0, radius, negatives), GlobalPairSampler(25.0, None, 5.0, *coarse)
    )
    maps = [one_hot(affine, (4, 4)), one_hot(affine, (2, 2))]
    value = loss(maps, affine)
    assert loss.last_terms[0].item() == pytest.approx(expected[0], abs=1e-6)
    if expected[1] is not None:
        assert loss.last_terms[1].item() == pytest.approx(expected[1], abs=1e-6)
    assert value.item() == pytest.approx(sum(float(t) for t in loss.last_terms), abs=1e-6)
    if shift == (0, 4):
        samples = loss.local_sampler(maps, feature_affine(affine, (8, 8), (4, 4)))
        assert samples.anchor_mask.sum(-1).tolist() == [[12, 12]]


def test_numbers_of_the_table() -> None:
    numbers = [E(30), (4 * E(26) + 8 * E(24) + 4 * E(22)) / 16, E(5), E(3), E(6), E(14), E(15), E(7), E(500) + E(1200)]
    expected = [1.6213780, 1.4454423, 0.5168135, 0.3407530, 0.5944377, 1.0628794, 1.1085722, 0.6664679, 9.325494]
    assert numbers == pytest.approx(expected, abs=1e-6)


def test_half_a_cell_off() -> None:
    """Cell j of view 1 lies between cells j - 1 and j of view 2 and has the mean of their vectors."""
    size = (2, 6)
    affine = torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)).repeat(1, 2, 1, 1)
    affine[0, 0, 1, 2] = -2.0
    second = torch.eye(12).view(12, *size)
    first = second + second.roll(1, 2)
    first[:, :, 0] = second[:, :, 0]  # lies outside view 2
    maps = torch.stack([F.normalize(first, dim=0), second])
    for positives, similarity in (("nearest", 0.7071068), ("interpolated", 1.0)):
        sampler = LocalPairSampler(100, 2.0, 3.9, (5, 5), positives)
        samples = sampler([maps, maps], affine)
        assert samples.anchor_mask.sum(-1).tolist() == [[10, 10]]
        only = samples._replace(  # of view 1, against the zero vector
            anchor_mask=samples.anchor_mask & torch.tensor([[True], [False]]),
            negatives=torch.full_like(samples.negatives[..., :1], 24),
            negative_mask=samples.negative_mask[..., :1],
        )
        value = pair_contrast_loss(maps, only).item()
        assert value == pytest.approx(math.log(1 + math.exp(-similarity / 0.5)), abs=1e-6)


@pytest.mark.parametrize("volumes, expected", [(3, 13.307516), (1, 11.519911)])
def test_chance_of_the_published_sizes(volumes: int, expected: float) -> None:
    """All similarities equal: ln 501 + ln 1201, and for one volume without diverse negatives ln 501 + ln 201."""
    maps = [torch.ones(2 * volumes, 1, 16, 48, 48), torch.ones(2 * volumes, 1, 8, 6, 6)]
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)).repeat(volumes, 2, 1, 1)
    affine[:, 1, :3, 3] = torch.tensor([9.0, -20.0, 31.0], dtype=torch.float64)
    loss = AnatomicalEmbeddingLoss((32, 96, 96))
    assert loss(maps, affine).item() == pytest.approx(expected, abs=2e-6)
    assert loss.last_terms[0].item() == pytest.approx(6.216606, abs=1e-6)
    assert loss.last_terms[1].item() == pytest.approx(7.090910 if volumes > 1 else 5.303305, abs=1e-6)


# ---- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("volumes", [1, 2, 3])
@pytest.mark.parametrize("apart", [None, 0])
@pytest.mark.parametrize("positives, exclude", [("nearest", "inf"), ("interpolated", "inf"), ("nearest", "zero")])
def test_loss_against_loops(ndim: int, volumes: int, apart: int | None, positives: str, exclude: str) -> None:
    size = (5, 6, 7)[:ndim]
    affine = affines(volumes, ndim, apart=apart)
    maps = [unit_maps(volumes, size, 5).requires_grad_(), unit_maps(volumes, (3, 2, 4)[:ndim], 5, 1).requires_grad_()]
    own = {"num_anchors": 9, "positive_radius": 2.0, "exclusion_radius": 6.0, "negatives": (12, 5)}
    own |= {"positives": positives, "exclude": exclude}
    # a single cell is excluded around each anchor, since equal scores, which "zero" makes, have no order
    coarse = {"positive_radius": 3.0, "axial_gate": 1.2, "exclusion_radius": 0.5, "negatives": (12, 5)}
    coarse |= {"exclude": exclude}
    own["exclusion_radius"] = 0.5 if exclude == "zero" else 6.0
    anchor_keys = random(volumes, 2, math.prod(size), seed=5)
    keys = random(volumes, 2, 9, 12, seed=6), random(volumes, 2, maps[1][0, 0].numel(), 12, seed=7)
    plain = [m.detach() for m in maps]
    expected = [
        local_samples(plain, affine, None, anchor_keys, keys[0], **own),
        global_samples(plain[1], affine, None, keys[1], **coarse),
    ]
    samples = (
        LocalPairSampler(**own)(maps, affine, None, 4, anchor_keys, keys[0]),
        GlobalPairSampler(**coarse, num_diverse=11)(maps[1], affine, negative_keys=keys[1]),
    )
    diverse = samples[1].diverse
    others = None
    if diverse is not None:
        others = {(b, v): diverse[b, v].tolist() for b in range(volumes) for v in range(2)}
    loss = AnatomicalEmbeddingLoss((5, 6, 7)[:ndim], temperature=0.4)
    value = loss(maps, affine, samples)
    gradients = torch.autograd.grad(value, maps)
    terms = [
        loop_loss(maps[0], expected[0], 0.4, positives == "interpolated"),
        loop_loss(maps[1], expected[1], 0.4, diverse=others),
    ]
    torch.testing.assert_close(torch.stack(loss.last_terms), torch.stack(terms).detach(), atol=1e-10, rtol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(sum(terms), maps)):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
        assert theirs.any()
    single = [m.detach().float().requires_grad_() for m in maps]
    value = loss(single, affine, samples)
    assert value.item() == pytest.approx(sum(terms).item(), abs=1e-5)
    for mine, theirs in zip(torch.autograd.grad(value, single), gradients):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-6, rtol=0)


def test_many_and_few_negatives() -> None:
    """Few are fetched one by one, for many the products with all cells are taken: the same values and gradients."""
    maps = unit_maps(2, (9, 11), 6).requires_grad_()
    affine = affines(2, 2)
    for count in (2, 150):
        samples = LocalPairSampler(7, 2.0, 6.0, (count, count), exclude="zero")([maps, maps], affine)
        samples.negatives[0, 0, 0, 0] = 2 * 99  # the zero vector
        value = pair_contrast_loss(maps, samples)
        reference = loop_loss(maps, as_reference(samples), 0.5)
        assert value.item() == pytest.approx(reference.item(), abs=1e-10)
        for mine, theirs in zip(torch.autograd.grad(value, maps), torch.autograd.grad(reference, maps)):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_vectors_and_products(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one query, of several with a rest, and in one; also when called under autocast."""
    monkeypatch.setattr(_pair_products, "BLOCK", block)
    maps = random(4, 3, 20).requires_grad_()  # two volumes
    draw = lambda *shape: torch.randint(41, shape, generator=torch.Generator().manual_seed(0))
    picks, index = draw(2, 9), draw(2, 7, 4)
    picks[0, 0] = index[1, 0, 0] = 40  # the zero vector
    assert _pair_products.DENSE * 4 < 2 * 20

    def slow(maps: Tensor) -> tuple[Tensor, Tensor]:
        pools = [torch.cat([maps[b].T, maps[2 + b].T, torch.zeros(1, 3, dtype=maps.dtype)]) for b in (0, 1)]
        picked = torch.stack([pool[p] for pool, p in zip(pools, picks)])
        named = torch.stack([pool[i] for pool, i in zip(pools, index)])  # (2, 7, 4, 3)
        return picked, (picked[:, :7, None] * named).sum(-1)

    function = lambda maps: _pair_products.vectors_and_products(maps, picks, index)
    for mine, theirs in zip(function(maps), slow(maps)):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(function, maps)
    single = maps.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            value = sum(x.square().sum() for x in function(single))
        value.backward()
    sum(x.square().sum() for x in slow(maps)).backward()
    torch.testing.assert_close(single.grad.double(), maps.grad, atol=1e-4, rtol=1e-4)


def test_volumes_without_anchors_count_zero() -> None:
    maps, affine = unit_maps(3, (5, 6)), affines(3, 2)
    samples = LocalPairSampler(9, negatives=(20, 10))([maps, maps], affine)
    every = pair_contrast_loss(maps, samples)
    samples.anchor_mask[1] = False
    alone = lambda b: PairSamples(*(None if x is None else x[b : b + 1] for x in samples))
    others = [pair_contrast_loss(maps[b::3], alone(b)) for b in (0, 2)]
    assert pair_contrast_loss(maps, samples).item() == pytest.approx(float(sum(others)) / 3, abs=1e-12)
    assert every > pair_contrast_loss(maps, samples)
    samples.anchor_mask[:] = False
    maps.requires_grad_()
    value = pair_contrast_loss(maps, samples)
    value.backward()
    assert value.item() == 0
    assert not maps.grad.any()


# ---- what must hold --------------------------------------------------------------------------------------------------


def loss_of_all(ndim: int = 3, **kwargs: Any) -> AnatomicalEmbeddingLoss:
    """All cells that qualify, all negatives: nothing is drawn."""
    return AnatomicalEmbeddingLoss(
        (10, 12, 14)[:ndim],
        LocalPairSampler(1000, 2.0, 6.0, (1000, 1000)),
        GlobalPairSampler(25.0, 1.5, 5.0, (1000, 1000), 1000),
        **kwargs,
    )


def inputs(volumes: int, ndim: int = 3, apart: int | None = None) -> tuple[list[Tensor], Tensor]:
    maps = [unit_maps(volumes, (5, 6, 7)[:ndim]).requires_grad_(), unit_maps(volumes, (5, 2, 2)[:ndim], 6, 1)]
    return [maps[0], maps[1].requires_grad_()], affines(volumes, ndim, mm=2.0, apart=apart)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("volumes", [1, 2, 3])
def test_exchanged_views(ndim: int, volumes: int) -> None:
    """No direction is treated otherwise than the other, e.g. by a gate of its own."""
    maps, affine = inputs(volumes, ndim)
    loss = loss_of_all(ndim)
    value = loss(maps, affine)
    swapped = loss([m.roll(volumes, 0) for m in maps], affine.flip(1))
    assert value.item() == pytest.approx(swapped.item(), abs=1e-10)
    assert value.item() != pytest.approx(loss(maps, affine.flip(1)).item(), abs=1e-3)


@pytest.mark.parametrize("apart", [None, 0])
def test_one_volume(apart: int | None) -> None:
    maps, affine = inputs(1, apart=apart)
    value = AnatomicalEmbeddingLoss((10, 12, 14))(maps, affine)
    value.backward()
    assert value.isfinite()
    for m in maps:
        assert m.grad.isfinite().all()
        assert m.grad.any()


def test_where_gradients_go() -> None:
    """To both views of the own map; the local term leaves the global map alone, though it found the negatives."""
    maps, affine = inputs(2)
    loss = loss_of_all()
    fine, coarse = loss.terms(maps, affine)
    grads = torch.autograd.grad(fine, maps, retain_graph=True, allow_unused=True)
    assert grads[1] is None
    assert all(grads[0][row].any() for row in range(4))
    grads = torch.autograd.grad(coarse, maps, allow_unused=True)
    assert grads[0] is None
    assert all(grads[1][row].any() for row in range(4))


def test_samples_replace_all_drawing() -> None:
    maps, affine = inputs(2)
    loss = AnatomicalEmbeddingLoss((10, 12, 14), LocalPairSampler(5, negatives=(9, 4)))
    cells = [feature_affine(affine, (10, 12, 14), m.shape[2:]) for m in maps]
    samples = loss.local_sampler(maps, cells[0]), loss.global_sampler(maps[1], cells[1])
    assert loss(maps, affine, samples) == loss(maps, affine, samples)
    fine, coarse = loss.terms(maps, affine, samples)
    assert fine == pair_contrast_loss(maps[0], samples[0])
    assert coarse == pair_contrast_loss(maps[1], samples[1])
    assert (fine + coarse).item() == pytest.approx(loss(maps, affine, samples).item(), abs=1e-12)
    assert not any(t.requires_grad for t in loss.last_terms)


def test_generator_and_chunk_size() -> None:
    maps, affine = inputs(2)
    values = []
    for chunk_size in (7, 10**6):
        loss = AnatomicalEmbeddingLoss((10, 12, 14), LocalPairSampler(19, negatives=(40, 9)), chunk_size=chunk_size)
        values += [loss(maps, affine, generator=torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] == pytest.approx(values[3], abs=1e-12)
    assert values[0] != values[2]


def test_mask_of_voxels() -> None:
    """Voxels beyond the mask change nothing, whatever the network says there."""
    maps, affine = inputs(2)
    valid = torch.zeros(4, 1, 10, 12, 14)
    valid[:, :, 2:8, 2:10, 2:12] = 1.0
    loss = AnatomicalEmbeddingLoss(
        (10, 12, 14),
        LocalPairSampler(1000, 4.0, 3.0, (1000, 1000)),
        GlobalPairSampler(25.0, None, 5.0, (1000, 1000), 0),
    )
    target = {"view_affine": affine, "valid": valid}
    value = loss(maps, target)
    noise = [torch.where(F.adaptive_avg_pool3d(valid, m.shape[2:]) >= 0.5, m, torch.randn_like(m)) for m in maps]
    torch.testing.assert_close(loss([noise[0], maps[1]], target), value, atol=1e-12, rtol=0)
    assert loss.last_terms[0] > 1
    assert not torch.allclose(loss([noise[0], maps[1]], affine), value, atol=1e-3)
    torch.testing.assert_close(loss(maps, {"view_affine": affine}), loss(maps, affine), atol=1e-12, rtol=0)


def test_further_maps_are_not_looked_at() -> None:
    maps, affine = inputs(1)
    loss = loss_of_all()
    value = loss([*maps, torch.full((2, 1), math.nan)], affine)
    torch.testing.assert_close(value, loss(maps, affine), atol=1e-12, rtol=0)


def test_autocast_and_half_precision() -> None:
    maps, affine = inputs(2)
    loss = loss_of_all()
    exact = loss(maps, affine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(maps, affine).item() == pytest.approx(exact.item(), abs=1e-12)
        single = loss([m.float() for m in maps], affine)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(exact.item(), abs=1e-5)
    low = loss([m.bfloat16() for m in maps], affine)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), abs=0.02)


def test_descends() -> None:
    torch.manual_seed(0)
    maps, affine = inputs(2)
    leaves = [m.detach().clone().requires_grad_() for m in maps]
    optimizer = torch.optim.Adam(leaves, 0.02)
    loss, values = loss_of_all(), []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss([F.normalize(x, dim=1) for x in leaves], affine)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.5


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_shapes_are_checked() -> None:
    (fine, coarse), affine = inputs(2)
    loss = loss_of_all()
    for bad in ([fine[:3], coarse[:3]], [fine, coarse[:2]], [fine[:2], coarse[:2]]):
        with pytest.raises(ValueError, match="two rows for each matrix") as error:
            loss(bad, affine)
        assert str(tuple(bad[0].shape)) in str(error.value)
    for matrices in (affine[:1], affine[:, :, :3, :3], affine[:, :1]):
        with pytest.raises(ValueError, match="two rows for each matrix") as error:
            loss([fine, coarse], matrices)
        assert str(tuple(matrices.shape)) in str(error.value)
    with pytest.raises(ValueError, match=r"\(10, 12, 15\) voxels does not divide into a map of \(5, 6, 7\)"):
        AnatomicalEmbeddingLoss((10, 12, 15))([fine, coarse], affine)
    with pytest.raises(ValueError, match=r"valid \(4, 1, 10, 12, 7\)"):
        loss([fine, coarse], {"view_affine": affine, "valid": torch.ones(4, 1, 10, 12, 7)})
    with pytest.raises(ValueError, match="two rows for each of 2 volumes"):
        pair_contrast_loss(fine[:2], LocalPairSampler()([fine, coarse], affine))


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"chunk_size": 0}])
def test_arguments_are_checked(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        AnatomicalEmbeddingLoss((8, 8), **kwargs)
