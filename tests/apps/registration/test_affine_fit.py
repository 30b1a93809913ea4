# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.apps import fit_affine, normalised_affine
from monai_ssl.apps.registration.fields import identity_field, to_normalised
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

BOX = torch.tensor([300.0, 200, 250], dtype=torch.float64)
TRUE = torch.tensor(
    [[1.05, 0.02, 0, 3], [-0.03, 0.95, 0.04, -2], [0, -0.02, 1.08, 4], [0, 0, 0, 1]], dtype=torch.float64
)


def pairs(share: float, seed: int, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """140 points, mm, some of which are off by about 60 mm along each axis."""
    g = torch.Generator().manual_seed(seed)
    source = torch.rand(140, 3, generator=g, dtype=torch.float64) * BOX
    target = transform_points(TRUE, source) + noise * torch.randn(140, 3, generator=g, dtype=torch.float64)
    outliers = int(140 * share)
    target[:outliers] += 60 * torch.randn(outliers, 3, generator=g, dtype=torch.float64)
    return source, target


def field_error(matrix: Tensor, true: Tensor = TRUE) -> float:
    places = torch.rand(500, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * BOX
    return float((transform_points(matrix, places) - transform_points(true, places)).norm(dim=1).mean())


def fit(source: Tensor, target: Tensor, method: str) -> Tensor:
    return fit_affine(source, target, method, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    source = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    target = torch.tensor([[1.0, -1], [5, -1], [1, 0], [5, 0]])  # 2 x + 1, y / 2 - 1
    expected = torch.tensor([[2, 0, 1], [0, 0.5, -1], [0, 0, 1]], dtype=torch.float64)
    for method in ("lstsq", "huber", "ransac"):
        torch.testing.assert_close(fit(source, target, method), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["lstsq", "huber", "ransac"])
def test_exact_without_noise(method: str) -> None:
    """Also a metre from the origin of both spaces."""
    source, target = pairs(0, 1, noise=0)
    torch.testing.assert_close(fit(source, target, method), TRUE, atol=1e-9, rtol=0)
    away = fit(source + 1000, target - 1200, method)
    torch.testing.assert_close(transform_points(away, source + 1000), target - 1200, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("method", "share"), [("huber", 0.2), ("ransac", 0.2), ("ransac", 0.4)])
def test_outliers(method: str, share: float) -> None:
    for seed in range(5):
        source, target = pairs(share, seed)
        error = field_error(fit(source, target, method))
        assert error < 1
        assert error < field_error(fit(source, target, "lstsq")) / 4


def test_all_alike_without_outliers() -> None:
    for method in ("lstsq", "huber", "ransac"):
        errors = [field_error(fit(*pairs(0, seed), method)) for seed in range(8)]
        assert sum(errors) / 8 == pytest.approx(0.41, abs=0.06)


def by_loops(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The reweighted fit by normal equations, pair by pair."""
    matrix, rounds = torch.zeros(4, 3, dtype=torch.float64), 0
    robust = weights.clone()
    while True:
        normal, right = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
        for x, y, w in zip(source, target, robust):
            row = torch.cat([x, x.new_ones(1)])
            normal += w * row[:, None] * row
            right += w * row[:, None] * y
        before, matrix = matrix, torch.linalg.solve(normal, right)
        rounds += 1
        if rounds > 50 or (matrix - before).abs().max() < 1e-8:
            return matrix.T
        residuals = [float((torch.cat([x, x.new_ones(1)]) @ matrix - y).norm()) for x, y in zip(source, target)]
        delta = max(1.345 * 1.4826 * sorted(residuals)[(len(residuals) - 1) // 2], 1e-3)
        robust = torch.tensor([float(w) * min(1, delta / r) for w, r in zip(weights, residuals)], dtype=torch.float64)


def test_huber_equals_loops() -> None:
    source, target = pairs(0.2, 3)
    source, target = source[::4], target[::4]
    weights = torch.rand(len(source), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    found = fit_affine(source, target, "huber", weights)
    torch.testing.assert_close(found[:3], by_loops(source, target, weights), atol=1e-5, rtol=0)


def test_ransac_is_the_plain_fit_of_its_inliers() -> None:
    source, target = pairs(0.4, 2)
    close = (transform_points(fit(source, target, "ransac"), source) - target).norm(dim=1)
    inliers = torch.zeros(140, dtype=torch.bool)
    inliers[56:] = True
    assert (close[inliers] < 10).all()
    assert field_error(fit_affine(source[inliers], target[inliers]), fit(source, target, "ransac")) < 0.5


def test_ransac_with_a_seed() -> None:
    source, target = pairs(0.4, 0)

    def once(seed: int, trials: int = 500) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return fit_affine(source, target, "ransac", num_trials=trials, generator=g)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1, 4), once(2, 4))
    assert not torch.equal(fit_affine(source, target, "ransac", threshold=1.0), once(1))


@pytest.mark.parametrize("method", ["lstsq", "huber", "ransac"])
def test_weights(method: str) -> None:
    source, target = pairs(0, 5)
    spoilt = target.clone()
    spoilt[:30] += 500
    weights = torch.ones(140)
    weights[:30] = 0
    g = torch.Generator().manual_seed(0)
    without = fit_affine(source[30:], target[30:], method, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit_affine(source, spoilt, method, weights, generator=g), without)
    if method == "lstsq":  # a weight of 2 is the pair twice
        twice = torch.cat([source, source[:20]]), torch.cat([target, target[:20]])
        weights = torch.ones(140)
        weights[:20] = 2
        torch.testing.assert_close(fit_affine(source, target, weights=weights), fit_affine(*twice), atol=1e-9, rtol=0)


def test_same_transform_in_mm_and_normalised() -> None:
    source, target = pairs(0.2, 4)
    sizes = (150, 110, 125), (160, 97, 140)
    voxels = [p / 2 for p in (source, target)]  # 2 mm
    normal = [to_normalised(p, size) for p, size in zip(voxels, sizes)]
    torch.testing.assert_close(fit_affine(*normal), normalised_affine(fit_affine(*voxels), *sizes), atol=1e-9, rtol=0)


def test_two_dimensions_and_single_precision() -> None:
    source, target = (p[:, :2].float() for p in pairs(0, 1))
    found = fit_affine(source, target, "huber")
    assert found.shape == (3, 3)
    assert found.dtype == torch.float64
    assert found[2].tolist() == [0, 0, 1]
    before = source.clone()
    fit_affine(source, target)
    assert torch.equal(source, before)


PLANE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.double(),
    lambda x: x.float() + 1500,  # rounded to 1e-4 mm
]


@pytest.mark.parametrize("place", PLANE)
@pytest.mark.parametrize("method", ["lstsq", "huber", "ransac"])
def test_points_in_one_plane(method: str, place: Callable[[Tensor], Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    flat = torch.rand(40, 2, generator=g, dtype=torch.float64) * 200
    source = place(flat @ torch.tensor([[0.6, 0.8, 0], [-0.48, 0.36, 0.8]], dtype=torch.float64))  # oblique
    with pytest.raises(ValueError, match="lie in one plane"):
        fit(source, source + 1, method)
    assert fit(source + 0.5 * torch.rand(40, 3, generator=g), source, "lstsq").shape == (4, 4)
    level = torch.cat([flat, torch.full((40, 1), 7.0, dtype=torch.float64)], 1)  # exactly
    with pytest.raises(ValueError, match="lie in one plane"):
        fit(level, level + 1, method)


def test_refusals() -> None:
    source, target = pairs(0, 1)
    line = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2])
    with pytest.raises(ValueError, match="the 9 source points lie on one line"):
        fit_affine(line, line)
    with pytest.raises(ValueError, match="one line"):
        fit_affine(line * 0 + 7, line)
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        fit_affine(source[:3], target[:3])
    with pytest.raises(ValueError, match="at least 4 pairs, got 2"):
        fit_affine(source, target, weights=(torch.arange(140) < 2).float())
    with pytest.raises(ValueError, match=r"\(140, 3\) and \(139, 3\)"):
        fit_affine(source, target[1:])
    with pytest.raises(ValueError, match="lstsq, huber, ransac, got 'ols'"):
        fit_affine(source, target, "ols")
    with pytest.raises(ValueError, match="finite"):
        fit_affine(source, target * float("nan"))
    for weights in (torch.ones(3), -torch.ones(140)):
        with pytest.raises(ValueError, match=r"weights must be \(140,\)"):
            fit_affine(source, target, weights=weights)
    with pytest.raises(ValueError, match=r"num_trials at least 1, got 10\.0, 0"):
        fit_affine(source, target, "ransac", num_trials=0)
    random = torch.rand(140, 3, generator=torch.Generator().manual_seed(1)) * BOX
    with pytest.raises(ValueError, match=r"no 5 of 140 pairs agree .* within 0.01 mm in 500 trials"):
        fit_affine(source, random, "ransac", threshold=0.01)


@pytest.mark.parametrize("sizes", [((5, 6, 7), (4, 9, 3)), ((5, 6), (7, 3))])
def test_normalised_affine(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    source, target = sizes
    n = len(source)
    matrix = TRUE[:, [*range(n), 3]][[*range(n), 3]]
    found = normalised_affine(matrix, source, target)
    index = voxel_index(source).double()
    expected = to_normalised(transform_points(matrix, index), target)
    places = identity_field(source, found)[0].flatten(1).T
    torch.testing.assert_close(transform_points(found, places), expected)
    theta = found[:n].clone()  # as affine_grid takes it: x, y, z order of rows and columns
    theta[:, :n] = theta[:, :n].flip(0, 1)
    theta[:, n] = theta[:, n].flip(0)
    grid = F.affine_grid(theta[None], [1, 1, *source], align_corners=True)
    torch.testing.assert_close(grid.reshape(-1, n).flip(1), expected)


def test_normalised_affine_refuses() -> None:
    with pytest.raises(ValueError, match="2 voxels"):
        normalised_affine(torch.eye(3), (5, 1), (5, 6))
    with pytest.raises(ValueError, match=r"\(4, 4\) must be"):
        normalised_affine(torch.eye(4), (5, 6), (5, 6))
