# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from voxel_fields import SIZE, affine, bent, border_mask, embedding, matcher, same_cells

from monai_ssl.apps import (
    ImageEmbedding,
    Registration,
    compose_affine,
    fit_coarse_field,
    normalised_affine,
    register_affine,
    register_coarse,
)
from monai_ssl.apps.registration.fields import identity_field, to_normalised
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

MOVING, MASK = embedding(), border_mask()
INSIDE = voxel_index(SIZE)[MASK.flatten()].double()
NODES = (4, 3, 5)


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm(dim=1).mean())


def some_affine(n: int) -> Tensor:
    matrix = torch.eye(n + 1, dtype=torch.float64)
    matrix[:n, :n] += 0.1 * torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix[:n, n] = torch.tensor([0.1, -0.05, 0.2])[:n]
    return matrix


def test_exact_affine_beyond_the_grid() -> None:
    """A translation of 0.3 after 0.1 everywhere: 0.4 also at the border, where the released code has less."""
    matrix = torch.eye(4)
    matrix[:3, 3] = 0.3
    disp = torch.full((1, 3, *NODES), 0.1)
    step = compose_affine(matrix, disp, True) - identity_field(NODES)
    torch.testing.assert_close(step, torch.full_like(step, 0.4))
    torch.testing.assert_close(compose_affine(matrix, disp), compose_affine(matrix, disp, True))
    released = compose_affine(matrix, disp, False) - identity_field(NODES)
    torch.testing.assert_close(released[..., :-1, :-1, :-1], step[..., :-1, :-1, :-1])
    # a node of the last plane along axis 0 alone lands 0.1 beyond: of 2 / 3 to where the zeros begin
    torch.testing.assert_close(released[0, :, -1, 0, 0], torch.full((3,), 0.1 + 0.3 * (1 - 0.1 / (2 / 3))))
    assert (released[0, :, -1, -1, -1] < 0.3).all()


@pytest.mark.parametrize("size", [(4, 3, 5), (4, 3)])
def test_composition_is_the_affine_of_the_nodes(size: tuple[int, ...]) -> None:
    matrix, n = some_affine(len(size)), len(size)
    disp = torch.randn(1, n, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    phi = compose_affine(matrix, disp)
    assert phi.shape == disp.shape
    for node in voxel_index(size).tolist():
        at = (0, slice(None), *node)
        place = torch.tensor([2 * i / (s - 1) - 1 for i, s in zip(node, size)], dtype=torch.float64) + disp[at]
        torch.testing.assert_close(phi[at], matrix[:n, :n] @ place + matrix[:n, n])


def by_loops(
    source: Tensor, target: Tensor, matrix: Tensor, size: tuple[int, ...], steps: int, lr: float, smoothness: float
) -> Tensor:
    """The equation, point by point and node by node."""
    n = len(size)
    disp = torch.zeros(n, *size, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([disp], lr=lr)
    for _ in range(steps):
        misfit = torch.zeros(())
        for p, q in zip(source, target):
            place = [min(max((float(x) + 1) / 2 * (s - 1), 0), s - 1) for x, s in zip(q, size)]
            found = torch.zeros(n, dtype=torch.float64)
            for corner in itertools.product((0, 1), repeat=n):
                low = [min(int(x), s - 2) for x, s in zip(place, size)]
                node = [a + c for a, c in zip(low, corner)]
                weight = 1.0
                for x, a, c in zip(place, low, corner):
                    weight *= (x - a) if c else 1 - (x - a)
                at = torch.tensor([2 * i / (s - 1) - 1 for i, s in zip(node, size)], dtype=torch.float64)
                at = at + disp[(slice(None), *node)]
                found = found + weight * (matrix[:n, :n] @ at + matrix[:n, n])
            misfit = misfit + (found - p).square().sum() / len(source)
        rough = torch.zeros(())
        interior = list(itertools.product(*(range(s - 1) for s in size)))
        for axis in range(n):
            for node in interior:
                ahead = [i + (a == axis) for a, i in enumerate(node)]
                step = disp[(slice(None), *ahead)] - disp[(slice(None), *node)]
                rough = rough + step.square().mean() / len(interior)
        adam.zero_grad()
        (misfit + smoothness / n * rough).backward()
        adam.step()
    return disp.detach()[None]


@pytest.mark.parametrize("size", [(2, 3, 4), (4, 3)])
def test_fit_equals_loops(size: tuple[int, ...]) -> None:
    n, g = len(size), torch.Generator().manual_seed(0)
    target = 2.4 * torch.rand(9, n, generator=g, dtype=torch.float64) - 1.2  # some beyond the grid
    source = target + 0.2 * torch.randn(9, n, generator=g, dtype=torch.float64)
    phi, disp = fit_coarse_field(source, target, some_affine(n), size, 7, 0.03, 0.5)
    torch.testing.assert_close(disp, by_loops(source, target, some_affine(n), size, 7, 0.03, 0.5), atol=1e-9, rtol=0)
    torch.testing.assert_close(phi, compose_affine(some_affine(n), disp))


def test_fit_defaults_and_types() -> None:
    g = torch.Generator().manual_seed(0)
    target = 2 * torch.rand(60, 3, generator=g) - 1
    source = target + 0.1 * torch.randn(60, 3, generator=g)
    matrix = torch.eye(4)
    with torch.no_grad():
        phi, disp = fit_coarse_field(source, target, matrix, NODES)
    assert phi.shape == disp.shape == (1, 3, *NODES)
    assert phi.dtype == disp.dtype == torch.float32
    assert not disp.requires_grad
    torch.testing.assert_close(disp, fit_coarse_field(source, target, matrix, NODES, 100, 0.05, 0.04, True)[1])
    smooth = fit_coarse_field(source, target, matrix, NODES, smoothness=40.0)[1]
    inner = (slice(None), slice(None), *[slice(-1)] * 3)  # the last nodes take part in few differences
    assert smooth[inner].std() < 0.5 * disp[inner].std()
    none = fit_coarse_field(source, target, matrix, NODES, steps=0)[0]
    torch.testing.assert_close(none, identity_field(NODES))
    matrix[0, 3] = 0.3
    exact, released = (fit_coarse_field(source, target, matrix, NODES, extrapolate=e)[1] for e in (True, False))
    assert not torch.allclose(released, exact, atol=1e-2)


def test_fit_finds_a_bend() -> None:
    g = torch.Generator().manual_seed(0)
    target = 2 * torch.rand(400, 2, generator=g, dtype=torch.float64) - 1
    wave = lambda x: 0.1 * torch.sin(2 * x.flip(1))
    matrix = some_affine(2)
    source = transform_points(matrix, target + wave(target))
    phi, disp = fit_coarse_field(source, target, matrix, (7, 9), smoothness=1e-4)
    nodes = identity_field((7, 9), disp)[0].flatten(1).T
    assert (disp[0].flatten(1).T - wave(nodes)).norm(dim=1).mean() < 0.01
    expected = transform_points(matrix, nodes + wave(nodes))
    assert (phi[0].flatten(1).T - expected).norm(dim=1).mean() < 0.01


def test_fit_stays_where_matches_are_exact() -> None:
    """Rounding errors are no reason to move: Adam divides by the size of the gradient."""
    matrix = some_affine(3)
    target = 2 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    _, disp = fit_coarse_field(transform_points(matrix, target), target, matrix, NODES)
    assert disp.abs().max() < 1e-7


@pytest.mark.parametrize(("shows", "spacing"), [(affine, 16), (bent, 8)])
def test_fourier_field(shows: object, spacing: int) -> None:
    fixed = embedding(shows)  # type: ignore[arg-type]
    start = register_affine(matcher(), MOVING, fixed, MASK, MASK)
    found = register_coarse(matcher(), MOVING, fixed, start, spacing)
    before, after = (error(r.map_points(INSIDE), shows(INSIDE)) for r in (start, found))  # type: ignore[operator]
    if spacing == 16:
        assert after < 0.25
    else:
        assert after < 0.5 * before
        assert after < 1


def test_what_a_result_holds(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = embedding(bent)
    start = register_affine(matcher(), MOVING, fixed, MASK, MASK)
    found = register_coarse(matcher(), MOVING, fixed, start, 8)
    assert found.displacement is not None
    assert found.displacement.shape == (3, *SIZE)
    assert found.displacement.dtype == torch.float32
    for name in ("affine", "points", "scores", "grid_affine"):
        assert torch.equal(getattr(found, name), getattr(start, name))
    assert found.report["counts"] == start.report["counts"]
    residual = (found.map_points(found.points[:, 0]) - found.points[:, 1]).norm(dim=1)
    assert found.report["residual_mean_mm"] == pytest.approx(float(residual.mean()))
    assert found.report["residual_median_mm"] == pytest.approx(float(residual.median()))
    assert found.report["residual_mean_mm"] < start.report["residual_mean_mm"]
    assert 0 <= found.report["folding_share"] < 0.05
    assert list(found.report["seconds"]) == ["embed", "match", "affine", "coarse"]
    assert "coarse" not in start.report["seconds"]
    alone = register_coarse(matcher(), MOVING, fixed, None, 8, moving_mask=MASK, fixed_mask=MASK)
    assert torch.equal(alone.affine, start.affine)
    torch.testing.assert_close(alone.displacement, found.displacement)
    assert capsys.readouterr() == ("", "")


def test_matching_arguments_are_passed_on() -> None:
    fixed = embedding(affine)
    options = {"moving_mask": MASK, "fixed_mask": MASK, "method": "lstsq", "stride": 6, "matching": "stable"}
    found = register_coarse(matcher(), MOVING, fixed, steps=1, min_score=0.9, **options)  # type: ignore[arg-type]
    start = register_affine(matcher(), MOVING, fixed, min_score=0.9, **options)  # type: ignore[arg-type]
    assert torch.equal(found.points, start.points)
    assert torch.equal(found.affine, start.affine)
    with pytest.raises(ValueError, match=r"min_score 1\.2"):
        register_coarse(matcher(), MOVING, fixed, min_score=1.2)
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    register_coarse(matcher(), MOVING, fixed, method="ransac", steps=1, generator=g)
    assert not torch.equal(g.get_state(), before)


def test_displacement_in_mm_by_hand() -> None:
    """On an oblique grid: nodes span the fixed image, and d is R (disp (N - 1) / 2)."""
    world = torch.tensor([[1.2, 0, 0.9, 5], [0, -3.0, 0, 2], [-1.6, 0, 1.2, 9], [0, 0, 0, 1]], dtype=torch.float64)
    moving_world = torch.diag(torch.tensor([2.0, 2, 1, 1], dtype=torch.float64))
    fixed, moving = embedding(world=world), embedding(size=(32, 32, 48), world=moving_world)
    g = torch.Generator().manual_seed(0)
    index = torch.rand(80, 3, generator=g, dtype=torch.float64) * (torch.tensor(SIZE) - 1)
    true = moving_world @ torch.diag(torch.tensor([0.9, 0.6, 0.7, 1]).double()) @ torch.linalg.inv(world)
    ends = torch.stack([transform_points(world, index), transform_points(true @ world, index)], 1)
    ends[:, 1] += 3 * torch.randn(80, 3, generator=g, dtype=torch.float64)
    start = Registration(true, None, world, SIZE, ends, torch.ones(80), {})
    found = register_coarse(matcher(), moving, fixed, start, 15, steps=20, lr=0.01, smoothness=0.1)
    matrix = normalised_affine(torch.linalg.inv(moving_world) @ true @ world, SIZE, moving.size)
    places = to_normalised(transform_points(torch.linalg.inv(moving_world), ends[:, 1]), moving.size)
    _, disp = fit_coarse_field(places, to_normalised(index, SIZE), matrix, (2, 3, 4), 20, 0.01, 0.1)
    nodes = voxel_index((2, 3, 4)).double() / torch.tensor([1, 2, 3]) * (torch.tensor(SIZE) - 1)  # some between voxels
    voxels = disp[0].flatten(1).T * (torch.tensor(SIZE) - 1) / 2
    corners = [0, 3, 20, 23]
    assert found.displacement is not None
    for row in corners:
        at = found.displacement[(slice(None), *nodes[row].long())].double()
        torch.testing.assert_close(at, world[:3, :3] @ voxels[row], atol=1e-4, rtol=0)
    mapped = found.map_points(transform_points(world, nodes[corners]))
    expected = transform_points(true, transform_points(world, nodes[corners] + voxels[corners]))
    torch.testing.assert_close(mapped, expected, atol=1e-3, rtol=0)
    assert disp.abs().max() > 0.02


@pytest.mark.parametrize("rank", [2, 3])
def test_exact_on_grids_that_share_nothing(rank: int) -> None:
    fixed_world = torch.diag(torch.tensor([1.5, 2, 2.5, 1][4 - rank - 1 :], dtype=torch.float64))
    moving_world = torch.diag(torch.tensor([2.5, -1, -2, 1][4 - rank - 1 :], dtype=torch.float64))
    moving_world[:rank, rank] = torch.tensor([1000.0, -1100, 900][:rank]).double()
    moving, fixed, true = same_cells((5, 6, 8)[:rank], fixed_world, moving_world)
    found = register_coarse(matcher(), moving, fixed, node_spacing=4, stride=2, matching="stable")
    places = transform_points(fixed_world, voxel_index(fixed.size))
    torch.testing.assert_close(found.map_points(places), transform_points(true, places), atol=1e-6, rtol=0)
    assert found.report["folding_share"] == 0


def test_matches_of_the_affine_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = embedding(affine)
    start = register_affine(matcher(), MOVING, fixed, MASK, MASK)
    with monkeypatch.context() as patch:
        patch.setattr("monai_ssl.apps.PointMatcher.search", None)
        few = dataclasses.replace(start, points=start.points[:30], scores=start.scores[:30])
        assert torch.equal(register_coarse(matcher(), MOVING, fixed, few).points, few.points)
    # an affine without matches keeps its matrix and is matched
    none = dataclasses.replace(start, affine=start.affine * 1.0, points=torch.zeros(0, 2, 3), scores=torch.zeros(0))
    found = register_coarse(matcher(), MOVING, fixed, none, moving_mask=MASK, fixed_mask=MASK)
    assert torch.equal(found.points, start.points)
    assert torch.equal(found.affine, start.affine)
    assert found.report["counts"] == start.report["counts"]


def test_refusals() -> None:
    fixed = embedding(affine)
    start = register_affine(matcher(), MOVING, fixed)
    done = dataclasses.replace(start, displacement=torch.zeros(3, *SIZE))
    with pytest.raises(ValueError, match="has a displacement already"):
        register_coarse(matcher(), MOVING, fixed, done)
    other = embedding(size=(32, 48, 32))
    with pytest.raises(ValueError, match=r"another fixed image than this: \(32, 48, 32\)"):
        register_coarse(matcher(), MOVING, other, start)
    moved = embedding(world=torch.diag(torch.tensor([1, 1, 2.0, 1])).double())
    with pytest.raises(ValueError, match="another fixed image"):
        register_coarse(matcher(), MOVING, moved, start)
    with pytest.raises(ValueError, match="node_spacing must be at least 1"):
        register_coarse(matcher(), MOVING, fixed, start, node_spacing=0)
    points, matrix = torch.rand(6, 3), torch.eye(4)
    for arguments, message in (
        ((points, points[:5], matrix, NODES), r"\(P, 3\) .* \(6, 3\) and \(5, 3\)"),
        ((points[:0], points[:0], matrix, NODES), r"\(P, 3\)"),
        ((points, points, torch.eye(3), NODES), r"affine must be \(4, 4\), got \(3, 3\)"),
        ((points, points, matrix, (4, 1, 5)), "at least 2 nodes"),
        ((points / 0, points, matrix, NODES), "finite"),
        ((points, points, matrix, NODES, -1), "steps"),
        ((points, points, matrix, NODES, 1, 0.0), "lr"),
        ((points, points, matrix, NODES, 1, 0.1, -1.0), "smoothness"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_coarse_field(*arguments)  # type: ignore[arg-type]


def test_matches_far_from_the_affine_can_be_left_out() -> None:
    """Exact matches of the identity and one that is 60 mm wrong: the field bends to it, unless it is left out."""
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    size = (16, 14, 12)
    image = ImageEmbedding([torch.zeros(2, *size)], affine, size, affine)
    places = torch.cartesian_prod(*(torch.arange(2.0, length, 3) for length in size)).double()
    points = torch.stack([places * torch.tensor([2.0, 3.0, 4.0])] * 2, 1)
    points[0, 1, 0] += 60
    initial = Registration(torch.eye(4), None, affine, size, points, torch.ones(len(points)), {})
    options = {"matcher": None, "moving": image, "fixed": image, "initial": initial, "node_spacing": 4}
    bent = register_coarse(**options)
    straight = register_coarse(**options, max_residual=30.0)
    assert float(bent.displacement.abs().max()) > 5
    assert float(straight.displacement.abs().max()) < 1e-3
    assert straight.report["counts"]["max_residual"] == len(points) - 1 == len(straight.points)
    doubled = dataclasses.replace(initial, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    with pytest.raises(ValueError, match="raise max_residual"):
        register_coarse(**{**options, "initial": doubled}, max_residual=0.5)
