# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai_ssl.apps import foreground_mask, grid_points


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [2, 7, 16, 21])
def test_counts_along_an_axis(stride: int, length: int) -> None:
    """floor((N - ceil(stride / 2)) / stride) + 1 points, where there is room for one."""
    along = grid_points((length,), stride).flatten().tolist()
    number = (length - (stride + 1) // 2) // stride + 1
    assert len(along) == max(0, number)
    assert along == [max(stride // 2 - 1, 0) + stride * i for i in range(len(along))]
    assert all(0 <= point < length for point in along)


def test_foreground() -> None:
    """-500 HU on the scale on which [-1024, 3071] HU are [-50, 205], or what is asked for."""
    hu = torch.tensor([[-1024.0, -501, -499], [-90, 40, 3071]])
    image = (hu + 1024) / 4095 * 255 - 50
    assert foreground_mask(image).tolist() == [[False, False, True], [True, True, True]]
    assert foreground_mask(image, 10).tolist() == [[False, False, False], [False, True, True]]
