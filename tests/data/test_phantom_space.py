# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from monai_ssl.data.phantom_space import PERIOD_MM, PhantomCanvas, PhantomWarp, smooth_max, spline_at, spline_on_grid

AXES = [np.linspace(-170, 180, 6), np.linspace(-140, 150, 5), np.linspace(-190, 160, 7)]


def grid_points() -> np.ndarray:
    return np.stack(np.meshgrid(*AXES, indexing="ij"), axis=-1).reshape(-1, 3)


def test_warp_takes_template_points_back_to_where_they_came_from():
    warp = PhantomWarp(np.random.default_rng(1), (1.05, 0.95, 1.02))
    template = warp.to_template(AXES).reshape(3, -1).T
    assert np.abs(template - grid_points()).max() > 10  # mm: a real deformation
    assert np.abs(warp.to_world(template) - grid_points()).max() < 0.02


def test_lattice_gives_the_same_values_on_a_grid_and_at_points():
    lattice = np.random.default_rng(2).standard_normal((6, 6, 6)).astype(np.float32)
    assert spline_at(lattice[None], grid_points())[:, 0] == pytest.approx(
        spline_on_grid(lattice, AXES).ravel(), abs=1e-5
    )
    moved = spline_at(lattice[None], grid_points() + [PERIOD_MM, 0, -PERIOD_MM])
    assert moved == pytest.approx(spline_at(lattice[None], grid_points()))
    assert spline_on_grid(np.full((6, 6, 6), 2.5, dtype=np.float32), AXES) == pytest.approx(2.5)


def test_smooth_max_is_the_larger_one_away_from_the_edge():
    first, second = np.array([-5.0, 3, 1]), np.array([2.0, -9, 1])
    assert smooth_max(first, second, 4) == pytest.approx(
        [2, 3, 2]
    )  # where both are equal: a quarter of the radius more


@pytest.fixture
def canvas() -> PhantomCanvas:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-8, -6, -10)
    rng = np.random.default_rng(0)
    return PhantomCanvas(affine, (9, 7, 11), PhantomWarp(rng, (1, 1, 1)), rng)


def test_an_edge_is_a_ramp_and_the_label_changes_in_its_middle(canvas):
    x = np.broadcast_to(canvas.axes[0][:, None, None], (9, 7, 11))  # -8, -6, .., 8 mm
    canvas.paint((slice(0, 9), slice(0, 7), slice(0, 11)), x - 1, 0, label=3)
    assert canvas.edge == pytest.approx(2.5)  # hypot(1.5, 2)
    share = np.array([1, 1, 1, 1, 0.9, 0.1, 0, 0, 0])  # 0.5 - (x - 1) / 2.5
    assert canvas.image[:, 3, 5] == pytest.approx(-1000 * (1 - share), abs=1e-2)
    assert canvas.label[:, 3, 5].tolist() == [3] * 5 + [0] * 4


def test_a_tube_is_a_capsule_of_its_radius(canvas):
    ends = np.array([[0.0, 0, -6], [0, 0, 4]])
    canvas.tube(ends, 3, 40, label=5)
    points = np.stack(np.meshgrid(*canvas.axes, indexing="ij"), axis=-1)
    nearest = np.clip(points[..., 2], -6, 4)
    distance = np.hypot(np.hypot(points[..., 0], points[..., 1]), points[..., 2] - nearest)
    assert np.array_equal(canvas.label == 5, distance < 3)
    canvas.tube(ends, 3, 90, within=7)
    assert canvas.image.max() <= 40


def test_a_shape_outside_the_grid_paints_nothing(canvas):
    canvas.tube(np.array([[500.0, 0, 0], [510, 0, 0]]), 4, 40, label=5)
    assert (canvas.image == -1000).all()
    assert not canvas.label.any()


def test_noise_has_the_spread_asked_for_and_is_correlated_in_plane_only():
    rng = np.random.default_rng(0)
    canvas = PhantomCanvas(np.diag([20.0, 20, 20, 1]), (40, 36, 30), PhantomWarp(rng, (1, 1, 1)), rng)
    canvas.image[:] = 100
    noise = canvas.finish(12.0, rng) - 100
    assert noise.std() == pytest.approx(12, rel=0.02)
    along = [np.corrcoef(noise.ravel(), np.roll(noise, 1, axis).ravel())[0, 1] for axis in range(3)]
    assert min(along[:2]) > 0.3
    assert abs(along[2]) < 0.03
