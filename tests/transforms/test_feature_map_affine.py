# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_ssl.transforms import FeatureMapAffined


def test_spacing_and_origin_of_a_coarse_map() -> None:
    image = MetaTensor(torch.zeros(1, 40, 24, 16), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    image.affine[:3, 3] = torch.tensor([10.0, 0.0, -4.0])
    out = FeatureMapAffined("pred")({"image": image, "pred": torch.zeros(7, 5, 3, 2)})["pred"]
    # eight times coarser; the first coarse voxel's centre lies 3.5 fine voxels into the image
    expected = torch.diag(torch.tensor([16.0, 24.0, 8.0, 1.0], dtype=out.affine.dtype))
    expected[:3, 3] = torch.tensor([17.0, 10.5, -0.5])
    torch.testing.assert_close(out.affine, expected)


def test_source_without_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="'image' carries no affine"):
        FeatureMapAffined("pred")({"image": torch.zeros(1, 8, 8, 8), "pred": torch.zeros(1, 1, 1, 1)})


def test_two_dimensions() -> None:
    image = MetaTensor(torch.zeros(1, 40, 24), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    out = FeatureMapAffined("pred")({"image": image, "pred": torch.zeros(7, 5, 3)})["pred"]
    assert out.affine.diagonal()[:2].tolist() == [16.0, 24.0]
    assert out.affine[:2, 3].tolist() == [7.0, 10.5]
