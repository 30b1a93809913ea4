# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from embedding_fields import AFFINE, GEOMETRY, PERMUTED, StridedNet, coordinate_image, inside
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.apps import PointMatcher
from monai_ssl.apps.registration.instance import optimise_instance, register_instance
from monai_ssl.apps.registration.result import Registration
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

CONV = {2: F.conv2d, 3: F.conv3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors of which neighbours resemble each other."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    pool = F.avg_pool2d if len(shape) == 3 else F.avg_pool3d
    return F.normalize(pool(values[None], 3, 1, 1)[0], dim=0)


def by_hand(source: Tensor, target: Tensor, size: tuple[int, ...], steps: int, lr: float, weight: float) -> Tensor:
    """The equations, with filters as convolutions and Adam written out, in double precision."""
    n, cells = len(size), target.shape[1:]
    box = torch.full((1, 1, *[3] * n), 1 / 3**n, dtype=torch.float64)

    def filtered(field: Tensor) -> Tensor:
        for _ in range(3):
            field = torch.cat([CONV[n](field[:, c : c + 1], box, padding=1) for c in range(n)], 1)
        return field

    identity = torch.stack(
        torch.meshgrid(*[torch.linspace(-1, 1, c, dtype=torch.float64) for c in cells], indexing="ij")
    )[None]
    p, mean, square = (torch.zeros(1, n, *cells).double() for _ in range(3))
    for step in range(1, steps + 1):
        p.requires_grad_()
        d = filtered(p)
        places = (identity + d).flip(1).movedim(1, -1)
        moved = F.grid_sample(source[None].double(), places, padding_mode="border", align_corners=True)
        cosine = ((moved * target).sum(1) / moved.norm(dim=1) / target.norm(dim=0)).mean()
        rough = sum(
            (d.narrow(a, 1, d.shape[a] - 1) - d.narrow(a, 0, d.shape[a] - 1)).pow(2).mean() for a in range(2, n + 2)
        )
        (g,) = torch.autograd.grad(weight * rough - cosine, p)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-4)
        p = (p - lr * update).detach()
    return filtered(F.interpolate(p, size, mode=LINEAR[n], align_corners=True))


@pytest.mark.parametrize("cells, size", [((6, 8), (12, 17)), ((5, 4, 6), (10, 9, 12))])
def test_equals_the_equations(cells: tuple[int, ...], size: tuple[int, ...]) -> None:
    source, target = noise(6, *cells).double(), noise(6, *cells, seed=1).double()
    for lr, weight in ((0.05, 1000.0), (0.02, 3.0)):
        found = optimise_instance(source, target, size, 7, lr, weight)
        assert found.shape == (1, len(size), *size)
        torch.testing.assert_close(found, by_hand(source, target, size, 7, lr, weight), atol=1e-9, rtol=0)
    assert torch.equal(optimise_instance(source[None], target[None], size, 7, lr, weight), found)


def test_defaults() -> None:
    source, target = noise(6, 6, 8), noise(6, 6, 8, seed=1)
    default = optimise_instance(source, target, (12, 16))
    assert torch.equal(default, optimise_instance(source, target, (12, 16), 50, 0.05, 1000.0, 1e-4))
    assert not optimise_instance(source, target, (12, 16), steps=0).any()


@pytest.mark.parametrize("smoothness", [1.0, 1000.0])
def test_identical_maps_stay(smoothness: float) -> None:
    """On maps of some thousand cells, where steps are small against Adam's eps."""
    values = noise(16, 14, 12, 16)
    assert optimise_instance(values, values, (28, 24, 32), smoothness=smoothness).abs().max() < 1e-3


def test_finds_a_shift() -> None:
    """1.5 cells of 24 along the first axis, where the field is free of the border."""
    x = torch.arange(24.0)[:, None].expand(24, 20) / 2
    y = torch.arange(20.0) / 2
    field = lambda x: torch.stack([(x + k * y / 3).add(k).cos() for k in range(-4, 5)])
    source, target = field(x), field(x + 0.75)  # 0.75 is 1.5 cells
    found = optimise_instance(source, target, (24, 20), steps=100, smoothness=1.0)[0]
    middle = found[:, 6:-6, 6:-6] * torch.tensor([23 / 2, 19 / 2]).view(2, 1, 1)
    assert (middle[0] - 1.5).abs().mean() < 0.15
    assert middle[1].abs().mean() < 0.15


def test_smoothness_holds_the_field_back() -> None:
    source, target = noise(6, 12, 10), noise(6, 12, 10, seed=1)
    loose, stiff = (optimise_instance(source, target, (24, 20), smoothness=s).abs().max() for s in (1.0, 1e6))
    assert stiff < 0.05 * loose


def test_needs_no_gradient_of_the_caller_and_leaves_none() -> None:
    source, target = noise(6, 6, 8).requires_grad_(), noise(6, 6, 8, seed=1)
    with torch.no_grad():
        found = optimise_instance(source, target, (12, 16), steps=2)
    assert found.any()
    assert not found.requires_grad
    assert source.grad is None


@pytest.mark.parametrize(
    "source, target, size",
    [((6, 5, 7), (5, 5, 7), (9, 9)), ((6, 5, 7), (6, 5, 7), (9, 9, 9)), ((2, 6, 5, 7), (2, 6, 5, 7), (9, 9))],
)
def test_maps_are_checked(source: tuple, target: tuple, size: tuple) -> None:
    with pytest.raises(ValueError, match="maps") as error:
        optimise_instance(torch.ones(source), torch.ones(target), size)
    assert all(str(part) in str(error.value) for part in (source, target, size))


def test_numbers_are_checked() -> None:
    for options in ({"steps": -1}, {"smoothness": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            optimise_instance(noise(2, 4, 5), noise(2, 4, 5), (8, 10), **options)


# ---- on images ------------------------------------------------------------------------------------------------------

SIZE, WORLD = (28, 36, 35), torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64))


def bend(points: Tensor) -> Tensor:
    """4 mm in waves of 80 mm, fixed world -> fixed world."""
    return points + 4 * torch.sin(2 * math.pi * points[:, [1, 2, 0]] / 80)


def shown(places: Tensor, affine: Tensor, size: tuple[int, ...]) -> MetaTensor:
    return MetaTensor(places.T.reshape(-1, *size).float(), affine=affine)


def matcher() -> PointMatcher:
    return PointMatcher(StridedNet(channels=32), GEOMETRY, device="cpu")


def error(result: Registration, truth: Tensor, points: Tensor) -> float:
    return float((result.map_points(points) - truth).norm(dim=1).mean())


def test_refines_the_identity() -> None:
    """The fixed image shows at x what the moving one shows at bend(x)."""
    fixed = shown(bend(transform_points(WORLD, voxel_index(SIZE))), WORLD, SIZE)
    moving = coordinate_image(WORLD, (30, 38, 37))
    points = inside(WORLD, SIZE, 200)
    before = float((bend(points) - points).norm(dim=1).mean())
    result = register_instance(matcher(), moving, fixed, steps=40, lr=0.03, smoothness=10.0)
    assert error(result, bend(points), points) < 0.5 * before
    assert result.grid_size == (35, 36, 28)  # axes S, P, L of the network's input
    torch.testing.assert_close(result.affine, torch.eye(4).double())
    assert set(result.report) == {"folding_share", "seconds"}
    assert set(result.report["seconds"]) == {"instance"}
    assert 0 <= result.report["folding_share"] < 1e-3


def test_composes_inside_the_affine() -> None:
    """The moving image lies far away, on another grid with its axes exchanged, as the affine knows."""
    away = torch.eye(4, dtype=torch.float64)
    away[:3, 3] = torch.tensor([-1500.0, 1490, -1520])  # moving world -> place
    to_moving = torch.linalg.inv(away) @ AFFINE  # fixed place -> moving world
    grid, size = PERMUTED.clone(), (50, 30, 75)
    grid[:3, 3] += torch.tensor([72.0, 0, 86])
    moving = coordinate_image(grid, size, shows=torch.linalg.inv(AFFINE) @ away)
    fixed = shown(bend(transform_points(WORLD, voxel_index(SIZE))), WORLD, SIZE)
    box = transform_points(torch.linalg.inv(to_moving), transform_points(grid, voxel_index(size).double()))
    points = inside(WORLD, SIZE, 400)
    points = points[((points > box.amin(0) + 12) & (points < box.amax(0) - 12)).all(1)]
    assert len(points) > 50
    matches = torch.stack([points, transform_points(to_moving, bend(points))], 1)
    initial = Registration(
        to_moving, None, torch.eye(4), (2, 2, 2), matches, torch.ones(len(points)), {"counts": {"grid": 9}}
    )
    result = register_instance(matcher(), moving, fixed, initial, steps=40, lr=0.03, smoothness=10.0)
    before, after = (error(r, matches[:, 1], points) for r in (initial, result))
    assert before > 3
    assert after < 0.5 * before
    assert torch.equal(result.affine, initial.affine)
    assert torch.equal(result.points, initial.points)
    assert result.report["counts"] == {"grid": 9}
    assert result.report["residual_mean_mm"] == pytest.approx(after)
    assert result.displacement.shape == (3, 35, 36, 28)


def test_goes_on_from_a_displacement() -> None:
    """With the true displacement to begin with there is nothing to do; on another grid it is interpolated."""
    fixed = shown(bend(transform_points(WORLD, voxel_index(SIZE))), WORLD, SIZE)
    moving, points = coordinate_image(WORLD, (30, 38, 37)), inside(WORLD, SIZE, 200)
    nodes = transform_points(WORLD, voxel_index(SIZE))
    d = (bend(nodes) - nodes).T.reshape(3, *SIZE)
    initial = Registration(torch.eye(4), d, WORLD, SIZE, torch.zeros(0, 2, 3), torch.zeros(0), {})
    result = register_instance(matcher(), moving, fixed, initial, steps=20, smoothness=10.0)
    assert error(initial, bend(points), points) < 0.1
    assert error(result, bend(points), points) < 0.4
    still = register_instance(matcher(), moving, fixed, initial, steps=0)
    assert error(still, bend(points), points) < 0.1
