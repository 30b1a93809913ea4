# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from monai_ssl.metrics import FoldingMetric, LandmarkErrorMetric


def test_share_of_folded_voxels() -> None:
    """Along the first axis x + u(x) is 0, 1, 2, 1.5, 1, 5: by central differences it falls at one voxel of six."""
    places = torch.tensor([0.0, 1.0, 2.0, 1.5, 1.0, 5.0])
    ddf = torch.zeros(2, 6, 5)
    ddf[0] = (places - torch.arange(6.0))[:, None]
    slopes = [1.0, 1.0, 0.25, -0.5, 1.75, 4.0]  # by hand
    metric = FoldingMetric()
    metric([ddf], [ddf])
    metric([torch.zeros(2, 4, 7)], [torch.zeros(2, 4, 7)])
    assert float(metric.aggregate()) == pytest.approx((1 / 6 + 0) / 2)
    spread = FoldingMetric("sdlogj")
    spread([ddf], [ddf])
    logs = [math.log(s) for s in slopes if s > 0]
    mean = sum(logs) / len(logs)
    assert float(spread.aggregate()) == pytest.approx(
        math.sqrt(sum((v - mean) ** 2 for v in logs) / len(logs)), abs=1e-6
    )
    with pytest.raises(ValueError, match="folding"):
        FoldingMetric("jacobian")


def test_error_of_landmarks_is_the_mean_over_pairs() -> None:
    """Distances 5 and 0 in one pair, 2 in the other: (2.5 + 2) / 2."""
    metric = LandmarkErrorMetric()
    metric([torch.tensor([[3.0, 4, 0], [1, 1, 1]])], [torch.tensor([[0.0, 0, 0], [1, 1, 1]])])
    metric([torch.tensor([[0.0, 0, 2]])], [torch.zeros(1, 3)])
    assert float(metric.aggregate()) == pytest.approx(2.25)
    with pytest.raises(ValueError, match="must be equal"):
        metric([torch.zeros(2, 3)], [torch.zeros(1, 3)])
