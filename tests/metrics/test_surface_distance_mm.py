# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_ssl.metrics import SurfaceDistanceMM


def voxel(place: tuple[int, int, int], spacing: tuple[float, float, float]) -> MetaTensor:
    """One-hot of a volume in which a single voxel is foreground."""
    foreground = torch.zeros(9, 6, 7)
    foreground[place] = 1
    return MetaTensor(torch.stack([1 - foreground, foreground]), affine=torch.diag(torch.tensor([*spacing, 1.0])))


@pytest.mark.parametrize("spacing, expected", [((1.0, 1.0, 1.0), 4.0), ((2.5, 1.0, 1.0), 10.0), ((1.0, 3.0, 2.0), 4.0)])
def test_distance_is_in_mm_along_the_right_axis(spacing: tuple[float, float, float], expected: float) -> None:
    metric = SurfaceDistanceMM()
    metric([voxel((2, 3, 3), spacing)], [voxel((6, 3, 3), spacing)])
    assert float(metric.aggregate()) == pytest.approx(expected)


def test_perfect_prediction_is_zero_and_missing_class_is_left_out() -> None:
    metric = SurfaceDistanceMM()
    label = voxel((2, 3, 3), (1.0, 1.0, 1.0))
    empty = MetaTensor(torch.stack([torch.ones(9, 6, 7), torch.zeros(9, 6, 7)]), affine=label.affine)
    metric([label, empty], [label, label])
    assert float(metric.aggregate()) == 0.0
