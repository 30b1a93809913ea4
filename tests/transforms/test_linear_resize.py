# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_ssl.transforms.linear_resize import resize_linear

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "old, new", [((5,), (9,)), ((3, 4), (7, 4)), ((3, 2, 4), (6, 7, 9)), ((6, 5, 4), (3, 9, 2)), ((1, 2, 1), (4, 1, 3))]
)
def test_equals_interpolate(old: tuple[int, ...], new: tuple[int, ...], align_corners: bool) -> None:
    x = torch.rand(2, *old, generator=torch.manual_seed(0), dtype=torch.float64)
    expected = F.interpolate(x[None], size=new, mode=MODES[len(old)], align_corners=align_corners)[0]
    torch.testing.assert_close(resize_linear(x, new, align_corners), expected, atol=1e-12, rtol=0)
    single = resize_linear(x.float(), new, align_corners)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-6, rtol=0)


def test_by_hand_and_no_rows() -> None:
    assert resize_linear(torch.tensor([[0.0, 4.0]]), (4,)).tolist() == [[0, 1, 3, 4]]
    assert resize_linear(torch.zeros(0, 2, 3), (4, 5)).shape == (0, 4, 5)
    with pytest.raises(ValueError, match=r"x \(2, 3, 4\) must be \(R, \*t\) with 3 axes"):
        resize_linear(torch.zeros(2, 3, 4), (4, 5, 6))
