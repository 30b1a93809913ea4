# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embedding_fields import AFFINE, GEOMETRY, PERMUTED, StridedNet, coordinate_image, inside
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.apps import PointMatcher
from monai_ssl.apps.registration import pipeline
from monai_ssl.apps.registration.affine import register_affine
from monai_ssl.apps.registration.coarse import register_coarse
from monai_ssl.apps.registration.deform import register_deform
from monai_ssl.apps.registration.instance import register_instance
from monai_ssl.apps.registration.pipeline import STEPS, register
from monai_ssl.networks import RegistrationUNet
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

SIZE, WORLD = (36, 40, 38), torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64))
AWAY = torch.eye(4, dtype=torch.float64)
AWAY[:3, 3] = torch.tensor([1500.0, -1490, 1520])
TO_MOVING = AWAY @ AFFINE  # fixed world -> moving world, but for the bend


def bend(points: Tensor) -> Tensor:
    return points + 4 * torch.sin(2 * math.pi * points[:, [1, 2, 0]] / 80)


def images() -> tuple[MetaTensor, MetaTensor]:
    """Moving and fixed; each voxel holds the place in the fixed image, before the bend, that it shows."""
    places = bend(transform_points(WORLD, voxel_index(SIZE)))
    grid = PERMUTED.clone()
    grid[:3, 3] += torch.tensor([85.0, -4, 100])
    moving = coordinate_image(grid, (64, 38, 96), shows=torch.linalg.inv(TO_MOVING))
    return moving, MetaTensor(places.T.reshape(-1, *SIZE).float(), affine=WORLD)


def matcher() -> PointMatcher:
    return PointMatcher(StridedNet(channels=32), GEOMETRY, device="cpu")


def first_channel(image: MetaTensor) -> MetaTensor:
    return GEOMETRY(image)[:1]


def small_unet() -> RegistrationUNet:
    torch.manual_seed(0)
    net = RegistrationUNet(channels=(2, 2), up_channels=(2, 2))
    torch.nn.init.normal_(net.flow.weight, std=0.1)
    return net


def test_each_step_begins_where_the_one_before_ends() -> None:
    moving, fixed = images()
    one, network = matcher(), small_unet()
    options = {"coarse_steps": 60, "instance_steps": 5, "instance_smoothness": 10.0, "node_spacing": 8}
    result = register(moving, fixed, STEPS, one, network, transform=first_channel, min_score=0.6, **options)
    assert one.network.calls == 3  # moving, fixed, and the moved image for the instance
    by_hand = register_affine(one, moving, fixed, min_score=0.6)
    points = inside(WORLD, SIZE, 200)
    errors = [(r.map_points(points) - transform_points(TO_MOVING, bend(points))).norm(dim=1).mean() for r in [by_hand]]
    by_hand = register_coarse(one, moving, fixed, by_hand, node_spacing=8, steps=60)
    errors += [(by_hand.map_points(points) - transform_points(TO_MOVING, bend(points))).norm(dim=1).mean()]
    assert errors[1] < 0.7 * errors[0]
    by_hand = register_deform(network, moving, fixed, by_hand, transform=first_channel)
    by_hand = register_instance(one, moving, fixed, by_hand, steps=5, smoothness=10.0)
    torch.testing.assert_close(result.map_points(points), by_hand.map_points(points), atol=1e-4, rtol=0)
    assert torch.equal(result.points, by_hand.points)
    assert set(result.report) == {*by_hand.report, "steps"}
    steps = result.report["steps"]
    assert set(steps) == {"embed", *STEPS}
    assert all(entry["seconds"] > 0 for entry in steps.values())
    assert steps["coarse"]["residual_mean_mm"] < steps["affine"]["residual_mean_mm"]
    assert steps["instance"]["residual_mean_mm"] == result.report["residual_mean_mm"]
    assert {"match", *STEPS} <= set(result.report["seconds"])
    assert result.report["counts"]["grid"] > 100


def test_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument goes where it belongs; only what is asked for is called, in order."""
    calls: list[tuple[str, Any, dict[str, Any]]] = []
    start = register(*images(), steps=(), transform=first_channel)

    def record(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return start

        return call

    for step in STEPS:
        monkeypatch.setattr(pipeline, f"register_{step}", record(step))
    moving, fixed = images()
    one, network, generator = matcher(), small_unet(), torch.Generator()
    matches = {
        "moving_mask": 1, "fixed_mask": 2, "method": "ransac", "stride": 6, "matching": "stable", "min_score": 0.5,
        "generator": generator,
    }  # fmt: skip
    register(
        moving, fixed, STEPS, one, network, node_spacing=9, coarse_steps=11, coarse_smoothness=0.3,
        instance_steps=12, instance_smoothness=7.0, **matches,
    )  # fmt: skip
    assert [name for name, *_ in calls] == list(STEPS)
    given = {name: kwargs for name, _, kwargs in calls}
    for step in ("affine", "coarse"):
        assert given[step].items() >= matches.items()
        assert given[step]["moving"].maps is one.embed(moving).maps
        assert given[step]["fixed"].maps is one.embed(fixed).maps
    assert given["coarse"].items() >= {"initial": start, "node_spacing": 9, "steps": 11, "smoothness": 0.3}.items()
    assert given["instance"].items() >= {"initial": start, "steps": 12, "smoothness": 7.0}.items()
    assert given["instance"]["moving"] is moving
    assert calls[2][1] == (network, moving, fixed, start)
    assert given["deform"] == {"transform": one.transform}
    calls.clear()
    result = register(moving, fixed, ("deform",), network=network, initial=start)
    assert [name for name, *_ in calls] == ["deform"]
    assert calls[0][1] == (network, moving, fixed, start)
    assert calls[0][2] == {"transform": None}
    assert set(result.report["steps"]) == {"deform"}
    calls.clear()
    register(moving, fixed, ("coarse", "instance"), one)
    assert [name for name, *_ in calls] == ["coarse", "instance"]
    assert calls[0][2]["initial"] is None


@pytest.mark.parametrize("with_matcher", [False, True])
def test_no_step_is_the_identity_on_the_grid_of_the_network(with_matcher: bool) -> None:
    moving, fixed = images()
    result = register(moving, fixed, [], matcher() if with_matcher else None)
    points = inside(WORLD, SIZE)
    torch.testing.assert_close(result.map_points(points), points)
    assert result.grid_size == (38, 40, 36)
    assert result.report == {"steps": {}}


@pytest.mark.parametrize(
    "steps", [("affine", "bend"), ("coarse", "affine"), ("affine", "affine"), ("instance", "deform"), "affine"]
)
def test_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be some of affine, coarse, deform, instance") as error:
        register(None, None, steps, matcher(), small_unet())
    assert repr(steps) in str(error.value)


def test_what_the_steps_need_is_checked() -> None:
    start = register(*images(), steps=[], transform=first_channel)
    for step in ("affine", "coarse", "instance"):
        with pytest.raises(ValueError, match="need matcher"):
            register(None, None, [step], network=small_unet())
    with pytest.raises(ValueError, match="needs network"):
        register(None, None, matcher=matcher())
    with pytest.raises(ValueError, match="initial is given"):
        register(None, None, ["affine"], matcher(), initial=start)
