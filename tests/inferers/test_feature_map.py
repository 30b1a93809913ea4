# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai_ssl.inferers import FeatureMapInferer


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_equals_the_whole_volume_pass(overlap: float) -> None:
    network = torch.nn.AvgPool3d(8)  # stride 8, no context across cells: windows must agree with the whole exactly
    image = torch.rand(1, 1, 32, 48, 16)
    inferer = FeatureMapInferer(roi_size=(16, 16, 16), stride=8, overlap=overlap)
    torch.testing.assert_close(inferer(image, network), network(image))


@pytest.mark.parametrize("roi_size, overlap", [((16, 16, 16), 0.25), ((12, 16, 16), 0.0), ((16, 16, 8), 0.5)])
def test_refuses_windows_off_the_coarse_grid(roi_size: tuple[int, ...], overlap: float) -> None:
    with pytest.raises(ValueError, match="overlap"):
        FeatureMapInferer(roi_size=roi_size, stride=8, overlap=overlap)
