# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from voxel_fields import embedding

from monai_ssl.apps.registration.mask_region import mask_region
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

SIZE = (8, 16, 32)
WORLD = torch.tensor([[0, 0, -2.0, 900], [1, 0, 0, -20], [0, -3.0, 0, 5], [0, 0, 0, 1]], dtype=torch.float64)
IMAGE = embedding(size=SIZE, world=WORLD)


def half(size: tuple[int, ...]) -> torch.Tensor:
    """True in one block that no symmetry keeps."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[1:3, 2:7, 5:20] = True
    return mask


def test_plain_tensor_is_on_the_networks_grid() -> None:
    mask = half(SIZE)
    points = transform_points(WORLD, voxel_index(SIZE))
    for given in (mask, mask[None], mask.float() * 0.9, mask.to(torch.uint8) * 3, mask.numpy()):
        assert torch.equal(mask_region(given, IMAGE)(points), mask.flatten())
    shift = torch.tensor([0.4, -0.4, 0.4])
    assert torch.equal(mask_region(mask, IMAGE)(transform_points(WORLD, voxel_index(SIZE) + shift)), mask.flatten())


def test_beyond_the_mask() -> None:
    inside = mask_region(torch.ones(SIZE, dtype=torch.bool), IMAGE)
    index = torch.tensor([[-0.5, 0, 0], [7.5, 15.5, 31.5], [-0.6, 0, 0], [0, 15.6, 0], [0, 0, 1000]]).double()
    assert inside(transform_points(WORLD, index)).tolist() == [True, True, False, False, False]


def test_masks_on_another_grid(tmp_path: Path) -> None:
    """Of voxels of 2, 1 and 4 mm with its own axes: a file, a MetaTensor with and without channel."""
    own = torch.tensor([[2, 0, 0, 840.0], [0, 0, 4, -22], [0, -1.0, 0, 10], [0, 0, 0, 1]], dtype=torch.float64)
    mask = torch.zeros(40, 70, 30, dtype=torch.bool)
    mask[1:9, 2:30, 1:2] = True
    nib.save(nib.Nifti1Image(mask.numpy().astype(np.uint8), own.numpy()), tmp_path / "mask.nii.gz")
    points = transform_points(WORLD, voxel_index(SIZE))
    expected = []
    for x, y, z in points.tolist():
        i, j, k = round((x - 840) / 2), round(10 - z), round((y + 22) / 4)
        expected.append(0 <= i < 40 and 0 <= j < 70 and 0 <= k < 30 and bool(mask[i, j, k]))
    expected_rows = torch.tensor(expected)
    for given in (
        tmp_path / "mask.nii.gz",
        str(tmp_path / "mask.nii.gz"),
        MetaTensor(mask, affine=own),
        MetaTensor(mask[None].float(), affine=own),
    ):
        found = mask_region(given, IMAGE)(points)
        assert torch.equal(found, expected_rows)
    assert 0 < sum(expected) < len(expected)


def test_without_a_mask_it_is_the_body() -> None:
    points = transform_points(WORLD, voxel_index(SIZE))
    assert mask_region(None, IMAGE)(points).all()  # not known
    body = torch.zeros(4, 8, 16, dtype=torch.bool)
    body[1, 2:4, 3] = True
    known = mask_region(None, dataclasses.replace(IMAGE, body=body))(points).reshape(SIZE)
    assert torch.equal(known, body.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_two_dimensions() -> None:
    image = embedding(size=(8, 16), strides=((2, 2), (4, 8)))
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[2, 3:9] = True
    for given in (mask, mask[None], MetaTensor(mask, affine=torch.eye(4))):
        assert torch.equal(mask_region(given, image)(voxel_index((8, 16)).double()), mask.flatten())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fixed_mask \(1, 8, 16, 31\) must have the size .* \(8, 16, 32\)"):
        mask_region(torch.ones(8, 16, 31), IMAGE, "fixed_mask")
    with pytest.raises(ValueError, match=r"moving_mask is empty: no voxel"):
        mask_region(torch.zeros(SIZE), IMAGE, "moving_mask")
    with pytest.raises(ValueError, match=r"one channel, got \(2, 8, 16, 32\)"):
        mask_region(torch.ones(2, *SIZE), IMAGE)
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.eye(4)), tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"moving_mask is empty \(.*none.nii\)"):
        mask_region(tmp_path / "none.nii", IMAGE, "moving_mask")
    with pytest.raises(FileNotFoundError, match=r"absent\.nii"):
        mask_region(tmp_path / "absent.nii", IMAGE)
