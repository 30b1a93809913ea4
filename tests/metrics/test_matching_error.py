# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from monai_ssl.apps import grid_points
from monai_ssl.metrics import (
    MatchingErrorMetric,
    center_point_matching,
    matching_distance,
    matching_summary,
    view_matching_error,
)
from monai_ssl.transforms import view_matrix

DISTANCE, RADIUS = [3.0, 8.0, 12.0], [5.0, 6.0, 20.0]


def test_distance_by_hand() -> None:
    pred, true = [[1.0, 2, 3], [0, 0, 0]], [[1.0, 5, 7], [1, 2, 2]]
    assert matching_distance(pred, true).tolist() == pytest.approx([5, 3], abs=1e-6)
    # 3 and 4 voxels of 2 and 0.5 mm
    assert matching_distance(pred[0], true[0], [9, 2, 0.5]).item() == pytest.approx(math.sqrt(40), abs=1e-6)
    assert matching_distance(torch.tensor(pred), torch.tensor(true), 2).tolist() == pytest.approx([10, 6])
    assert matching_distance(pred, true).dtype == torch.float64


@pytest.mark.parametrize("definition, share", [("plain", 2 / 3), ("min_radius", 1 / 3), ("radius", 2 / 3)])
def test_center_point_matching_by_hand(definition: str, share: float) -> None:
    assert float(center_point_matching(DISTANCE, RADIUS, definition=definition)) == pytest.approx(share, abs=1e-6)


def test_borders_of_the_definitions() -> None:
    """At most the threshold and the smaller of both, but less than the radius."""
    assert float(center_point_matching([10.0], definition="plain")) == 1
    assert float(center_point_matching([10.0], [10.0], definition="min_radius")) == 1
    assert float(center_point_matching([10.0], [10.0], definition="radius")) == 0
    assert float(center_point_matching([15.0], [20.0], definition="radius")) == 1
    assert float(center_point_matching([15.0], [20.0], 16.0, definition="min_radius")) == 1


def test_summary_by_hand() -> None:
    """Distances 3, 8 and 12 along x, y and z."""
    summary = matching_summary(torch.diag(torch.tensor(DISTANCE)), torch.zeros(3, 3), RADIUS)
    assert summary == pytest.approx(
        {
            "points": 3,
            "MED_mm": 7.666667,
            "MED_sd_mm": 3.681787,
            "MED_x_mm": 1,
            "MED_y_mm": 8 / 3,
            "MED_z_mm": 4,
            "CPM@10mm_plain": 2 / 3,
            "CPM@10mm_min_radius": 1 / 3,
            "CPM@Radius": 2 / 3,
        },
        abs=1e-6,
    )
    without = matching_summary(torch.diag(torch.tensor(DISTANCE)), torch.zeros(3, 3))
    assert set(summary) - set(without) == {"CPM@10mm_min_radius", "CPM@Radius"}


def test_errors_of_the_shares() -> None:
    with pytest.raises(ValueError, match=r"plain, min_radius, radius, got 'cpm'"):
        center_point_matching(DISTANCE, definition="cpm")
    with pytest.raises(ValueError, match="needs the radius"):
        center_point_matching(DISTANCE, definition="min_radius")
    with pytest.raises(ValueError, match="without NaN"):
        center_point_matching([float("nan")], definition="plain")
    with pytest.raises(ValueError, match="no points"):
        matching_summary(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 3\)"):
        matching_summary(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(TypeError):
        center_point_matching(DISTANCE, RADIUS)  # type: ignore[call-arg]


def test_grid_points() -> None:
    points = grid_points((32, 48, 64))
    assert points.shape == (192, 3)
    assert points.dtype == torch.int64
    assert points[0].tolist() == [3, 3, 3]
    assert points[1].tolist() == [3, 3, 11]  # last axis fastest
    assert points[-1].tolist() == [27, 43, 59]
    assert grid_points((5, 7), 1).shape == (35, 2)
    assert grid_points((5, 7), 1)[0].tolist() == [0, 0]
    mask = torch.zeros(9, 17, dtype=torch.bool)
    mask[3:5, 10:] = True
    assert grid_points((9, 17), 8, mask).tolist() == [[3, 11]]
    for size, stride in product(range(1, 30), range(1, 10)):
        along = grid_points((size,), stride).flatten()
        assert ((along >= 0) & (along < size)).all()
    with pytest.raises(ValueError, match="stride"):
        grid_points((5, 7), 0)
    with pytest.raises(ValueError, match=r"mask \(5, 6\)"):
        grid_points((5, 7), 2, torch.ones(5, 6))


# two volumes in 2D at 2 mm: boxes of both views in a volume, cut to 16 x 20 pixels
ROI = (16, 20)
BOXES = [(([0, 4], [16, 20]), ([4, 0], [16, 20])), (([2, 2], [16, 20]), ([2, 2], [16, 20]))]


def pairs(boxes: Any = BOXES, shift: Any = (0.0, 0.0)) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps of Fourier features of places, in view 2 of places moved by `shift` mm, and the matrices."""
    g = torch.Generator().manual_seed(0)
    weight, phase = torch.randn(64, 2, generator=g, dtype=torch.float64) / 12, torch.rand(64, generator=g) * 6.28
    world = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    affine = torch.stack([torch.stack([world @ view_matrix(*box, ROI, [False] * 2) for box in pair]) for pair in boxes])
    rows = []
    for view in range(2):
        for volume in range(len(boxes)):
            grid = torch.stack(torch.meshgrid(*(torch.arange(n // 2) * 2 + 0.5 for n in ROI), indexing="ij"), -1)
            places = grid.double() @ affine[volume, view, :2, :2].T + affine[volume, view, :2, 2]
            places = places + view * torch.tensor(shift, dtype=torch.float64)
            rows.append(F.normalize(torch.cos(places @ weight.T + phase), dim=-1).movedim(-1, 0))
    return [torch.stack(rows).float()], affine


def test_views_that_agree_and_views_that_are_off() -> None:
    maps, affine = pairs()
    assert float(view_matching_error(maps, affine, ROI, stride=4)) < 1
    moved, _ = pairs(shift=(3.0, -4.0))
    assert float(view_matching_error(moved, affine, ROI, stride=4)) == pytest.approx(5, abs=0.7)


def test_only_what_both_views_show_counts() -> None:
    """The grid of view 1 has points at 3 and 11, and at 3, 11 and 19 pixels along its axes."""
    maps, affine = pairs()
    metric = MatchingErrorMetric(ROI)
    rows = metric(maps, affine)
    # in view 2 of the first volume they are at -1 and 7, and at 7, 15 and 23
    assert rows[:, 1].tolist() == [2, 6]
    shares_nothing = pairs([(([0, 0], [16, 20]), ([40, 40], [16, 20]))])
    assert math.isnan(float(view_matching_error(*shares_nothing, ROI)))


def test_metric_is_the_mean_over_points() -> None:
    maps, affine = pairs()
    whole = float(view_matching_error(maps, affine, ROI))
    metric = MatchingErrorMetric(ROI)
    for volume in range(2):
        part = [m[[volume, 2 + volume]] for m in maps]
        metric(part, {"view_affine": affine[[volume]], "valid": None})
    assert float(metric.aggregate()) == pytest.approx(whole, abs=1e-6)
    metric.reset()
    with pytest.raises(ValueError, match="nothing to aggregate"):
        metric.aggregate()
    metric(maps, affine)
    assert float(metric.aggregate()) == pytest.approx(whole, abs=1e-9)


def test_rows_must_belong_to_the_matrices() -> None:
    maps, affine = pairs()
    with pytest.raises(ValueError, match="two rows for each volume"):
        view_matching_error([m[:3] for m in maps], affine, ROI)
    with pytest.raises(ValueError, match="two rows for each volume"):
        view_matching_error(maps, affine[0], ROI)
