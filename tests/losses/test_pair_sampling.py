# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.losses import GlobalPairSampler, LocalPairSampler, PairSamples, choose, choose_negatives, valid_cells
from monai_ssl.losses.pair_sampling import choose_negatives as same_function

from .pair_reference import Anchor, Pair, diverse_cells, global_samples, local_samples

FINE, COARSE = {2: (5, 6), 3: (5, 6, 7)}, {2: (2, 3), 3: (3, 2, 4)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_maps(volumes: int, size: tuple[int, ...], channels: int = 7, seed: int = 0) -> Tensor:
    return F.normalize(random(2 * volumes, channels, *size, seed=seed) - 0.4, dim=1)


def affines(volumes: int, ndim: int, mm: float = 4.0, shift: float = 2.5, apart: int | None = None) -> Tensor:
    """Matrices of pairs of views of oblique volumes far from the origin, (B, 2, n + 1, n + 1).

    View 2 is shifted by some cells and has cells of another size; the views of the volume `apart` do not meet.
    """
    base = torch.eye(ndim + 1, dtype=torch.float64)
    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    base[:2, :2] = turn
    base[:-1, -1] = torch.tensor([1500.0, -700.0, 90.0], dtype=torch.float64)[:ndim]
    out = torch.eye(ndim + 1, dtype=torch.float64).repeat(volumes, 2, 1, 1)
    scale = torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)[:ndim] * mm
    out[..., :-1, :-1] = torch.diag_embed(scale * (0.9 + 0.2 * random(volumes, 2, 1, seed=3)))
    out[:, 1, :-1, -1] = (2 * random(volumes, ndim, seed=4) - 1) * shift * scale
    if apart is not None:
        out[apart, 1, 0, -1] = 500.0
    return base @ out


def as_reference(samples: PairSamples, place: bool = False) -> dict[Pair, list[Anchor]]:
    """What counts, as the reference lists it."""
    volumes = len(samples.anchors)
    found: dict[Pair, list[Anchor]] = {}
    for b in range(volumes):
        for v in range(2):
            found[b, v] = []
            for a in samples.anchor_mask[b, v].nonzero()[:, 0].tolist():
                mask = samples.negative_mask[b, v, a]
                index = samples.positive_index[b, v, a].numpy() if place else None
                anchor, positive = int(samples.anchors[b, v, a]), int(samples.positives[b, v, a])
                found[b, v].append(Anchor(anchor, positive, index, samples.negatives[b, v, a][mask].tolist()))
    return found


def compare(found: dict[Pair, list[Anchor]], expected: dict[Pair, list[Anchor]], place: bool = False) -> int:
    """Same anchors, positives and negatives; returns the number of anchors."""
    assert found.keys() == expected.keys()
    for key, anchors in expected.items():
        assert [a.cell for a in found[key]] == [a.cell for a in anchors], key
        for mine, theirs in zip(found[key], anchors):
            assert mine.positive == theirs.positive
            assert sorted(mine.negatives) == sorted(theirs.negatives)
            if place:
                assert mine.place == pytest.approx(theirs.place, abs=1e-6)
    return sum(map(len, expected.values()))


def masked(volumes: int, size: tuple[int, ...]) -> Tensor:
    """Three quarters of the cells without the first of the first axis and the last of the last, (B, 2, N) bool."""
    valid = (random(volumes, 2, math.prod(size), seed=9) < 0.75).unflatten(2, size)
    valid[:, :, 0] = valid[..., -1] = False
    return valid.flatten(2)


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_choose() -> None:
    eligible = torch.tensor([[True, False, True, True], [False, False, False, True]])
    index, mask = choose(eligible, 2, torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.1, 0.2, 0.3, 0.0]]))
    assert index[0].tolist() == [2, 3]
    assert index[1, 0] == 3  # a key of 0 beats those that are not eligible
    assert mask.tolist() == [[True, True], [True, False]]
    assert choose(eligible, 9, torch.rand(2, 4))[0].shape == (2, 4)


def test_choose_is_uniform() -> None:
    eligible = (torch.arange(8) % 4 != 0).expand(6000, 8)
    index, mask = choose(eligible, 3, torch.rand(6000, 8, generator=torch.Generator().manual_seed(0)))
    assert mask.all()
    counts = torch.zeros(8).scatter_add_(0, index.flatten(), torch.ones(18000))
    assert not counts[::4].any()
    assert (counts[eligible[0]] - 3000).abs().max() < 5 * math.sqrt(3000 / 2)
    assert all(len(set(row)) == 3 for row in index.tolist())


def test_negatives_are_drawn_by_rank() -> None:
    """Among the best scores, wherever these are."""
    assert choose_negatives is same_function
    score = random(50, 40).float()
    index, mask = choose_negatives(score, (10, 5), generator=torch.Generator().manual_seed(0))
    best = score.argsort(1, descending=True)[:, :10]
    assert mask.all()
    assert index.shape == (50, 5)
    assert all(set(i) <= set(b) and len(set(i)) == 5 for i, b in zip(index.tolist(), best.tolist()))
    assert len({tuple(sorted(b.index(j) for j in i)) for i, b in zip(index.tolist(), best.tolist())}) > 20
    keys = torch.tensor([0.5, 0.1, 0.9])
    index, _ = choose_negatives(torch.tensor([0.3, -math.inf, 0.2, 0.7, 0.1]), (3, 2), keys)
    assert index.tolist() == [2, 3]  # ranks 2 and 0
    index, mask = choose_negatives(torch.tensor([0.3, -math.inf, -math.inf]), (3, 3))
    assert (index[0], mask.tolist()) == (0, [True, False, False])
    with pytest.raises(ValueError, match=r"keys \(3,\) for 5 candidates"):
        choose_negatives(torch.rand(6), (5, 2), keys)


def test_valid_cells() -> None:
    valid = torch.zeros(4, 1, 4, 6)
    valid[0, 0, :2, :3] = torch.tensor([[0.6, 1, 0], [1, 0.3, 0.2]])  # 3 of 6
    valid[1, 0, 2:, :3] = 1
    valid[2, 0, 2:, 3:] = torch.tensor([[1.0, 1, 0.5], [0, 0, 0]])  # 2 of 6: 0.5 itself does not count
    valid[3] = 1
    out = valid_cells(valid, (2, 2))
    assert out.dtype == torch.bool
    assert out.tolist() == [[[True, False, False, False], [False] * 4], [[False, False, True, False], [True] * 4]]
    three = valid_cells(torch.ones(2, 1, 4, 6, 8), (2, 2, 8))
    assert three.shape == (1, 2, 32)
    assert three.all()
    for shape, size in (((3, 1, 4, 6), (2, 2)), ((2, 2, 4, 6), (2, 2)), ((2, 1, 4, 6), (2, 4)), ((2, 1, 4), (2, 2))):
        with pytest.raises(ValueError, match="valid"):
            valid_cells(torch.ones(shape), size)


# ---- the samplers against loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("volumes", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positives": "interpolated", "valid": True},
        {"exclude": "zero", "valid": True, "exclusion_radius": 0.5},  # the anchor alone: equal scores have no order
        {"exclude": "zero", "valid": True, "negatives": (500, 500)},
        {"valid": True, "apart": 0},
        {"positives": "interpolated", "apart": 0},
        {"positive_radius": 0.01},
        {"exclude": "zero", "apart": 0, "negatives": (500, 500)},
    ],
    ids=str,
)
def test_local_sampler_against_loops(ndim: int, volumes: int, options: dict[str, Any]) -> None:
    size, given = FINE[ndim], dict(options)
    valid = masked(volumes, size) if given.pop("valid", False) else None
    matrices = affines(volumes, ndim, apart=given.pop("apart", None))
    arguments: dict[str, Any] = {
        "num_anchors": 9, "positive_radius": 2.0, "exclusion_radius": 6.0, "negatives": (12, 5),
        "positives": "nearest", "exclude": "inf", **given,
    }  # fmt: skip
    maps = [unit_maps(volumes, size), unit_maps(volumes, COARSE[ndim], 5, seed=1)]
    anchor_keys = random(volumes, 2, math.prod(size), seed=5)
    negative_keys = random(volumes, 2, 9, arguments["negatives"][0], seed=6)
    samples = LocalPairSampler(**arguments)(maps, matrices, valid, 4, anchor_keys, negative_keys)
    expected = local_samples(maps, matrices, valid, anchor_keys, negative_keys, **arguments)
    interpolated = arguments["positives"] == "interpolated"
    assert compare(as_reference(samples, interpolated), expected, interpolated) > 4 * volumes
    assert (samples.positive_index is not None) == interpolated
    assert samples.anchors.shape == samples.positives.shape == (volumes, 2, 9)
    drawn = min(arguments["negatives"][1], 2 * math.prod(size))
    assert samples.negatives.shape == samples.negative_mask.shape == (volumes, 2, 9, drawn)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("volumes", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axial_gate": (1.5, 0.7), "valid": True},
        {"axial_gate": None, "exclude": "zero", "valid": True, "exclusion_radius": 0.5},
        {"valid": True, "apart": 0},
        {"exclude": "zero", "apart": 0, "negatives": (900, 900)},
    ],
    ids=str,
)
def test_global_sampler_against_loops(ndim: int, volumes: int, options: dict[str, Any]) -> None:
    size, given = FINE[ndim], dict(options)
    valid = masked(volumes, size) if given.pop("valid", False) else None
    matrices = affines(volumes, ndim, apart=given.pop("apart", None))
    arguments: dict[str, Any] = {
        "positive_radius": 2.5, "axial_gate": 1.2, "exclusion_radius": 6.0, "negatives": (12, 5), "exclude": "inf",
        **given,
    }  # fmt: skip
    num = math.prod(size)
    maps, negative_keys = unit_maps(volumes, size), random(volumes, 2, num, arguments["negatives"][0], seed=6)
    for processes, rank in ((1, 0), (2, 1)):
        rows = 2 * volumes * processes
        diverse_keys = random(volumes, 2, rows * num, seed=7)
        sampler = GlobalPairSampler(**arguments, num_diverse=25)
        samples = sampler(maps, matrices, valid, rows, rank, negative_keys, diverse_keys)
        expected = global_samples(maps, matrices, valid, negative_keys, **arguments)
        assert compare(as_reference(samples), expected) > 4 * volumes
        if rows == 2:
            assert samples.diverse is None
            continue
        others = diverse_cells(volumes, num, rows, rank, diverse_keys, 25)
        assert {key: samples.diverse[key].tolist() for key in others} == others
    assert samples.anchors.tolist() == [[list(range(num))] * 2] * volumes


def test_gate_is_along_the_last_axis_of_the_world() -> None:
    """The first axis of the array, as in SPL."""
    matrix = torch.tensor([[0.0, 0, 4, 0], [0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    pair = matrix.repeat(1, 2, 1, 1)
    for axis, count in ((2, 0), (0, 2 * 3 * 4 * 5), (1, 2 * 3 * 4 * 5)):
        shifted = pair.clone()
        shifted[:, 1, axis, 3] = 1.9
        sampler = GlobalPairSampler(25.0, 1.5, 5.0, (10, 10), 0)
        samples = sampler(unit_maps(1, (3, 4, 5)), shifted)
        itself = samples.positives.flatten() == torch.arange(2 * 60)
        assert int((samples.anchor_mask.flatten() & ~itself).sum()) == count


def test_diverse_cells_of_few_volumes() -> None:
    maps, matrices = unit_maps(2, (2, 3)), affines(2, 2)
    samples = GlobalPairSampler(25.0, None, 5.0, (10, 10), 1000)(maps, matrices)
    assert [sorted(i) for i in samples.diverse[:, 0].tolist()] == [
        [*range(6, 12), *range(18, 24)],
        [*range(6), *range(12, 18)],
    ]
    assert GlobalPairSampler(25.0, None, 5.0, (10, 10), 0)(maps, matrices).diverse is None
    assert GlobalPairSampler(25.0, None, 5.0, (10, 10))(maps[::2], matrices[:1]).diverse is None
    with pytest.raises(ValueError, match="6 rows of 4 on each process"):
        GlobalPairSampler()(maps, matrices, num_rows=6)


# ---- what must not be drawn ------------------------------------------------------------------------------------------


def hits(samples: PairSamples, matrices: Tensor, size: tuple[int, ...], radius: float) -> tuple[int, int]:
    """Negatives that count and lie within the radius of their anchor, or are its positive."""
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).reshape(-1, len(size)).double()
    world = grid @ matrices[0, :, :-1, :-1].mT + matrices[0, :, None, :-1, -1]  # (2, N, n)
    near = positives = 0
    for v in range(2):
        for a in samples.anchor_mask[0, v].nonzero()[:, 0].tolist():
            drawn = samples.negatives[0, v, a][samples.negative_mask[0, v, a]]
            drawn = drawn[drawn < 2 * len(grid)]
            distances = (world.flatten(0, 1)[drawn] - world[v, samples.anchors[0, v, a]]).norm(dim=1)
            near += int((distances < radius).sum())
            positives += int((drawn == samples.positives[0, v, a]).sum())
    return near, positives


def test_neither_neighbours_nor_the_positive_are_negatives() -> None:
    """Pool of 40 cells, all of which are candidates, and a radius around the anchor that covers about ten."""
    size, matrices = (4, 5), affines(1, 2, shift=0.6)
    maps = [unit_maps(1, size), unit_maps(1, (2, 3), seed=1)]
    for exclude, excluded in (("inf", True), ("zero", False)):
        local = LocalPairSampler(20, 25.0, 8.0, (40, 40), exclude=exclude)(maps, matrices)
        coarse = GlobalPairSampler(25.0, None, 8.0, (40, 40), 0, exclude)(maps[0], matrices)
        for samples, zeroed in ((local, False), (coarse, exclude == "zero")):
            assert samples.anchor_mask.sum() >= 8
            near, positives = hits(samples, matrices, size, 8.0)
            assert (near == 0) == (excluded or zeroed)
            assert (positives == 0) == (excluded or zeroed)
        assert (coarse.negatives == 40).any() != excluded
    # the positive lies outside the radius around the anchor: only its own exclusion keeps it out
    for samples in (
        LocalPairSampler(20, 25.0, 0.01, (40, 40))(maps, matrices),
        GlobalPairSampler(25.0, None, 0.01, (40, 40), 0)(maps[0], matrices),
    ):
        assert hits(samples, matrices, size, 0.01) == (0, 0)
        assert samples.negative_mask[samples.anchor_mask].sum(-1).min() == 38


def test_masked_cells_are_in_no_sample() -> None:
    """The border of both views is masked, where the nearest cells of places outside would be."""
    size = (5, 6)
    valid = torch.zeros(2, 2, 5, 6, dtype=torch.bool)
    valid[..., 1:-1, 1:-1] = True
    valid = valid.flatten(2)
    matrices = affines(2, 2, apart=1)
    maps = [unit_maps(2, size), unit_maps(2, (2, 3), seed=1)]
    local = LocalPairSampler(20, 3.0, 5.0, (60, 60))(maps, matrices, valid)
    coarse = GlobalPairSampler(25.0, None, 5.0, (60, 60), 0)(maps[0], matrices, valid)
    for samples in (local, coarse):
        assert samples.anchor_mask.flatten(1).any(1).all()
        for b in range(2):
            pool = valid[b].flatten()
            for v in range(2):
                mask = samples.anchor_mask[b, v]
                assert valid[b, v][samples.anchors[b, v][mask]].all()
                assert pool[samples.positives[b, v][mask]].all()
                assert pool[samples.negatives[b, v][mask][samples.negative_mask[b, v][mask]]].all()
    nothing = torch.zeros_like(valid)
    assert not LocalPairSampler()(maps, matrices, nothing).anchor_mask.any()
    assert not GlobalPairSampler()(maps[0], matrices, nothing).anchor_mask.any()


def test_views_that_do_not_meet() -> None:
    maps, matrices = [unit_maps(1, (4, 5)), unit_maps(1, (2, 2))], affines(1, 2, apart=0)
    local = LocalPairSampler(30, 2.0, 3.0, (40, 40))(maps, matrices)
    assert local.anchor_mask.sum(-1).tolist() == [[20, 0]]
    assert torch.equal(local.positives[0, 0], local.anchors[0, 0])
    assert local.negatives[0, 0][local.negative_mask[0, 0]].max() < 20
    coarse = GlobalPairSampler(25.0, None, 3.0, (40, 40), 0)(maps[0], matrices)
    assert coarse.anchor_mask.all()
    assert coarse.positives.flatten().tolist() == list(range(40))
    assert coarse.negatives[0, 0][coarse.negative_mask[0, 0]].max() >= 20


def test_places_beyond_the_valid_cells_are_no_anchors() -> None:
    """Half a cell beyond the centre of the outermost valid cell, which is the nearest all the same."""
    size, mm = (1, 6), torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64))
    matrices = mm.repeat(1, 2, 1, 1)
    matrices[0, 0, 1, 2] = -1.6  # cell j of view 1 lies at j - 0.4 of view 2
    valid = torch.ones(1, 2, 6, dtype=torch.bool)
    maps = [unit_maps(1, size), unit_maps(1, size)]
    draw = lambda: LocalPairSampler(9, 3.0, 5.0, (9, 9))(maps, matrices, valid)
    samples = draw()
    assert sorted(samples.anchors[0, 0][samples.anchor_mask[0, 0]].tolist()) == [1, 2, 3, 4, 5]
    valid[0, 1, 0] = valid[0, 1, -1] = False
    samples = draw()
    assert sorted(samples.anchors[0, 0][samples.anchor_mask[0, 0]].tolist()) == [2, 3, 4]


def test_one_direction_may_have_no_anchors() -> None:
    """View 2 is so small that it lies between the cells of view 1: anchors come from it alone."""
    matrices = torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)).repeat(1, 2, 1, 1)
    matrices[0, 1, :2, :2] *= 0.1
    matrices[0, 1, :2, 2] = 5.0
    samples = LocalPairSampler(30, 4.0, 0.01, (40, 40))([unit_maps(1, (4, 5))] * 2, matrices)
    assert samples.anchor_mask.sum(-1).tolist() == [[0, 20]]
    assert samples.positives[0, 1].max() < 20
    assert samples.negatives[0, 1][samples.negative_mask[0, 1]].max() >= 20  # of both views


def test_positions_far_from_the_origin_are_exact() -> None:
    """A shift of 1 mm at 1500 mm decides; in half precision it would be lost."""
    size = (4, 5)
    for shift, near in ((0.999, True), (1.001, False)):
        matrices = torch.diag(torch.tensor([4.0, 4, 1], dtype=torch.float64)).repeat(1, 2, 1, 1)
        matrices[..., :-1, 2] = 1500.0
        matrices[:, 1, 0, 2] += shift
        samples = GlobalPairSampler(1.0, None, 3.0, (40, 40), 0)(unit_maps(1, size), matrices)
        assert bool((samples.positives[0, 0] >= 20).all()) == near


# ---- draws -----------------------------------------------------------------------------------------------------------


def flat(samples: PairSamples) -> list[Tensor]:
    return [x for x in samples if x is not None]


def test_generator_and_blocks() -> None:
    """The same generator, the same samples, in blocks of any size; the global random state is only used without one."""
    maps, matrices = [unit_maps(2, (5, 6, 7)), unit_maps(2, (3, 2, 4), seed=1)], affines(2, 3)

    def draw(seed: int, chunk_size: int = 128) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        local = LocalPairSampler(11, 2.0, 6.0, (50, 20))(maps, matrices, None, chunk_size, generator=generator)
        coarse = GlobalPairSampler(25.0, 6.0, 6.0, (20, 10), 30)(maps[1], matrices, generator=generator)
        return [*flat(local), *flat(coarse)]

    first = draw(0)
    for chunk_size in (7, 10**6):
        assert all(torch.equal(a, b) for a, b in zip(first, draw(0, chunk_size)))
    assert not torch.equal(first[0], draw(1)[0])
    assert not torch.equal(first[2], draw(1)[2])
    torch.manual_seed(3)
    one = LocalPairSampler(11)(maps, matrices)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(LocalPairSampler(11)(maps, matrices))))


def test_shapes_depend_on_shapes_alone() -> None:
    """Views that meet, that do not, and masks: always the same shapes, so that no value need be read."""
    maps = [unit_maps(2, (5, 6)), unit_maps(2, (2, 3), seed=1)]
    shapes = set()
    for apart in (None, 0):
        for valid in (None, masked(2, (5, 6)), torch.zeros(2, 2, 30, dtype=torch.bool)):
            for exclude in ("inf", "zero"):
                local = LocalPairSampler(9, negatives=(20, 10), exclude=exclude)(
                    maps, affines(2, 2, apart=apart), valid
                )
                coarse = GlobalPairSampler(exclude=exclude)(maps[0], affines(2, 2, apart=apart), valid)
                shapes.add(tuple(x.shape for x in (*flat(local), *flat(coarse))))
    assert len(shapes) == 1


def test_keys_for_more_anchors_than_there_are_cells() -> None:
    maps, keys = [unit_maps(1, (4, 4)), unit_maps(1, (2, 2), seed=1)], torch.rand(1, 2, 100, 40)
    anchors = torch.rand(1, 2, 16)
    draw = lambda k: LocalPairSampler(100, negatives=(32, 9))(maps, affines(1, 2), None, 128, anchors, k)
    assert all(torch.equal(a, b) for a, b in zip(flat(draw(keys)), flat(draw(keys[:, :, :16, :32]))))


def test_no_gradient_and_half_precision() -> None:
    maps = [unit_maps(1, (5, 6)).requires_grad_(), unit_maps(1, (2, 3)).requires_grad_()]
    samples = LocalPairSampler(9, negatives=(20, 10))(maps, affines(1, 2))
    assert not any(x.requires_grad for x in flat(samples))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        auto = LocalPairSampler(9, negatives=(20, 10))(maps, affines(1, 2), generator=generator)
    generator = torch.Generator().manual_seed(0)
    plain = LocalPairSampler(9, negatives=(20, 10))(maps, affines(1, 2), generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(flat(auto), flat(plain)))


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LocalPairSampler(0), "num_anchors must be at least 1, got 0"),
        (lambda: LocalPairSampler(positive_radius=0.0), "positive_radius must be above 0 mm"),
        (lambda: GlobalPairSampler(positive_radius=-1.0), "positive_radius must be above 0 mm"),
        (lambda: LocalPairSampler(exclusion_radius=-1.0), "exclusion_radius must not be negative"),
        (lambda: LocalPairSampler(positives="linear"), "'nearest' or 'interpolated', got 'linear'"),
        (lambda: LocalPairSampler(exclude="none"), "'inf' or 'zero', got 'none'"),
        (lambda: LocalPairSampler(negatives=(5,)), "candidates and of those drawn"),
        (lambda: GlobalPairSampler(negatives=(5, 0)), "candidates and of those drawn"),
        (lambda: GlobalPairSampler(axial_gate=(1.0, 2.0, 3.0)), "one for each direction"),
        (lambda: GlobalPairSampler(num_diverse=-1), "must not be negative"),
    ],
)
def test_arguments_are_checked(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_shapes_are_checked() -> None:
    maps, matrices = [unit_maps(2, (5, 6)), unit_maps(2, (2, 3))], affines(2, 2)
    for bad in (affines(3, 2), affines(2, 3), matrices[:, :1]):
        for call in (lambda m: LocalPairSampler()(maps, m), lambda m: GlobalPairSampler()(maps[1], m)):
            with pytest.raises(ValueError, match="affines") as error:
                call(bad)
            assert str(tuple(bad.shape)) in str(error.value)
    with pytest.raises(ValueError, match=r"valid \(2, 2, 29\)"):
        LocalPairSampler()(maps, matrices, torch.ones(2, 2, 29, dtype=torch.bool))
    with pytest.raises(ValueError, match="negative_keys"):
        LocalPairSampler(9)(maps, matrices, negative_keys=torch.rand(2, 2, 9, 5))
    with pytest.raises(ValueError, match="diverse_keys"):
        GlobalPairSampler()(maps[1], matrices, diverse_keys=torch.rand(2, 2, 5))
