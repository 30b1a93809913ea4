# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding_fields import AFFINE, GEOMETRY, PERMUTED, CoordinateNet, StridedNet, coordinate_image, ct, inside, resnet
from monai.data import MetaTensor
from monai.transforms import Compose, SpatialCrop

from monai_ssl.apps import ImageEmbedding, PointMatcher
from monai_ssl.data import PHANTOM_LABELS, torso_phantom
from monai_ssl.transforms.view_geometry import transform_points

TURN = torch.tensor([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
OBLIQUE = TURN @ torch.tensor([[1.2, 0, 0, 40], [0, 1.6, 0, -30], [0, 0, 2.5, 7], [0, 0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("net", [CoordinateNet, StridedNet])
def test_world_positions_on_any_grid(net: type[CoordinateNet]) -> None:
    """A file with permuted, flipped and unequal axes against an oblique one, both 1.5 m from the origin."""
    sizes = (60, 34, 83), (70, 66, 37)
    key_affine = torch.eye(4, dtype=torch.float64)
    key_affine[:3, 3] = torch.tensor([1380, -1470, 1420])
    key_affine = key_affine @ OBLIQUE
    middle = inside(PERMUTED, sizes[0], 1, 0.5) - inside(key_affine, sizes[1], 1, 0.5)
    shows = torch.eye(4, dtype=torch.float64)
    shows[:3, 3] = middle[0]  # the key shows what lies this far away in the query
    query = coordinate_image(PERMUTED, sizes[0])
    key = coordinate_image(key_affine, sizes[1], shows)
    points = inside(PERMUTED, sizes[0])
    matcher = PointMatcher(net(), GEOMETRY)
    before = copy.deepcopy(query)
    found = matcher.match(query, key, points, cycle=True)
    signed = found.points - (points - middle)
    error = signed.norm(dim=1)
    assert error.mean() < 0.6  # cells of 4 mm
    assert error.max() < 1.5
    assert (signed.mean(0).abs() < 0.3).all()
    assert found.cycle_error_mm is not None
    assert found.cycle_error_mm.mean() < 1
    assert found.accepted.all()
    assert found.points.dtype == torch.float64
    assert torch.equal(query.as_tensor(), before.as_tensor())
    assert torch.equal(query.affine, before.affine)


def test_spaces_by_hand() -> None:
    """The same three points in RAS, LPS and as index of the file, whose axes are permuted."""
    size = (40, 24, 56)
    image = coordinate_image(PERMUTED, size)
    matcher = PointMatcher(CoordinateNet(), GEOMETRY)
    index = torch.tensor([[20.0, 12, 28], [15, 8, 20], [22.5, 13.25, 30]])
    # PERMUTED by hand: x = 1500 - k, y = 1.5 i - 1490, z = 1520 - 3 j
    ras = torch.tensor([[1472, -1460, 1484], [1480, -1467.5, 1496], [1470, -1456.25, 1480.25]], dtype=torch.float64)
    answers = {
        space: matcher.match(image, image, points, space).points
        for space, points in (("voxel", index), ("RAS", ras), ("LPS", ras * torch.tensor([-1, -1, 1])))
    }
    torch.testing.assert_close(answers["LPS"], answers["RAS"] * torch.tensor([-1, -1, 1]), atol=1e-6, rtol=0)
    i, j, k = answers["voxel"].T
    again = torch.stack([1500 - k, 1.5 * i - 1490, 1520 - 3 * j], 1)
    torch.testing.assert_close(answers["RAS"], again, atol=1e-6, rtol=0)
    assert (answers["RAS"] - ras).norm(dim=1).max() < 1.5
    precise = ras + 1e-5  # lost in float32, 1.5 m from the origin
    assert torch.equal(
        matcher.match(image, image, precise.tolist()).points, matcher.match(image, image, precise).points
    )
    assert not torch.equal(matcher.match(image, image, precise).points, answers["RAS"])


def test_embedding_keeps_the_grid() -> None:
    image = coordinate_image(PERMUTED, (40, 24, 56))
    embedding = PointMatcher(CoordinateNet(), GEOMETRY).embed(image)
    assert torch.equal(embedding.source_affine, PERMUTED)
    assert embedding.source_size == (40, 24, 56)
    assert embedding.affine.dtype == torch.float64
    assert embedding.size == (36, 30, 28)  # (z, y, x) of 72, 60 and 56 mm
    assert embedding.padded_size == (36, 32, 32)
    assert [tuple(m.shape) for m in embedding.maps] == [(128, 18, 16, 16), (128, 9, 2, 2)]
    assert embedding.stride.tolist() == [2, 2, 2]
    points = inside(PERMUTED, (40, 24, 56))
    torch.testing.assert_close(embedding.world(embedding.cells(points)), points, atol=1e-6, rtol=0)  # at 1.5 m
    # cell i lies between the voxels 2 i and 2 i + 1
    first = transform_points(embedding.affine, torch.tensor([[0.5, 2.5, 4.5]]))
    torch.testing.assert_close(embedding.cells(first), torch.tensor([[0.0, 1, 2]], dtype=torch.float64))


def test_filters() -> None:
    image, other = (coordinate_image(PERMUTED, (40, 24, 56), shift) for shift in (None, AFFINE))
    matcher = PointMatcher(CoordinateNet(), GEOMETRY)
    points = inside(PERMUTED, (40, 24, 56), 20, 0.05)
    plain = matcher.match(image, image, points)
    assert plain.cycle_error_mm is None
    assert plain.accepted.all()
    median = float(plain.score.median())
    assert torch.equal(matcher.match(image, image, points, min_score=median).accepted, plain.score >= median)
    cycle = matcher.match(image, other, points, max_cycle_mm=1.0)
    assert cycle.cycle_error_mm is not None
    assert torch.equal(cycle.accepted, cycle.cycle_error_mm <= 1.0)
    assert torch.equal(cycle.points, matcher.match(image, other, points).points)  # a filter does not move points


def test_refusals() -> None:
    image = coordinate_image(PERMUTED, (40, 24, 56))
    matcher = PointMatcher(CoordinateNet(), GEOMETRY)
    middle = inside(PERMUTED, (40, 24, 56), 1, 0.5)
    outside = torch.cat([middle, middle + 100, middle, middle * torch.tensor([-1, -1, 1])])
    with pytest.raises(
        ValueError, match=r"outside of their image, rows \[1, 3\].*RAS it lies between \(1444.5, -1490.75"
    ):
        matcher.match(image, image, outside)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        matcher.match(image, image, [[40, 10, 10]], "voxel")
    matcher.match(image, image, [[39.4, 10, 10]], "voxel")  # the outermost voxels end there
    with pytest.raises(ValueError, match=r"min_score 1.3 accepts nothing"):
        matcher.match(image, image, middle, min_score=1.3)
    with pytest.raises(ValueError, match="max_cycle_mm"):
        matcher.match(image, image, middle, max_cycle_mm=-1)
    with pytest.raises(ValueError, match="space must be one of RAS, LPS, voxel, got 'ras'"):
        matcher.match(image, image, middle, "ras")
    with pytest.raises(ValueError, match=r"points must be \(P, 3\), got \(3,\)"):
        matcher.match(image, image, middle[0])
    with pytest.raises(ValueError, match=r"rows \[0\] are not"):
        matcher.match(image, image, middle * float("nan"))
    cropped = PointMatcher(CoordinateNet(), Compose([GEOMETRY, SpatialCrop([8, 8, 8], [12, 12, 12])]))
    with pytest.raises(ValueError, match="outside of"):  # not silently at the border of what is left
        cropped.match(image, image, [[3, 3, 3]], "voxel")


def test_bad_images(tmp_path: Path) -> None:
    matcher = PointMatcher(resnet())
    with pytest.raises(FileNotFoundError, match=r"absent.nii.gz does not exist"):
        matcher.embed(tmp_path / "absent.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.nii.gz cannot be read as an image"):
        matcher.embed(tmp_path / "broken.nii.gz")
    values = np.zeros((20, 20, 20), np.float32)
    values[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii")
    with pytest.raises(ValueError, match=r"nan.nii holds NaN"):
        matcher.embed(tmp_path / "nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 20, 3), np.float32), np.eye(4)), tmp_path / "vectors.nii")
    with pytest.raises(ValueError, match=r"vectors.nii has 3 channels"):
        matcher.embed(tmp_path / "vectors.nii")
    with pytest.raises(ValueError, match="a file or a MetaTensor with its affine, got Tensor"):
        matcher.embed(torch.zeros(1, 20, 20, 20))
    with pytest.raises(ValueError, match="affine"):
        PointMatcher(resnet(), lambda image: image.as_tensor()).embed(ct())
    with pytest.raises(ValueError, match="device cuda:99 cannot be used"):
        PointMatcher(resnet(), device="cuda:99")
    with pytest.raises(ValueError, match="chunk_size"):
        PointMatcher(resnet(), chunk_size=0)


def test_two_dimensions() -> None:
    affine = torch.tensor([[0, 1.5, -40], [-2.5, 0, 60], [0, 0, 1]], dtype=torch.float64)
    strides = ((2, 2), (16, 16))
    image = coordinate_image(affine, (48, 90))
    image.affine = torch.eye(4, dtype=torch.float64)  # as MONAI keeps it for pictures
    image.affine[:2, :2], image.affine[:2, 3] = affine[:2, :2], affine[:2, 2]
    matcher = PointMatcher(CoordinateNet(rank=2, strides=strides), Compose([]))
    points = inside(affine, (48, 90))
    found = matcher.match(image, image, points, cycle=True)
    assert found.points.shape == (40, 2)
    assert (found.points - points).norm(dim=1).mean() < 1
    flipped = matcher.match(image, image, -points, "LPS").points
    torch.testing.assert_close(flipped, -found.points)


def test_default_transform_on_the_phantom_and_the_body() -> None:
    """Spacing, orientation and intensities of the default; air around the patient is refused, the lung is not."""
    volume = torso_phantom(0, (48, 40, 10), 8.0)
    image = MetaTensor(torch.from_numpy(volume.image)[None], affine=torch.from_numpy(volume.affine))
    matcher = PointMatcher(resnet())
    prepared = matcher.prepare(image)
    assert (prepared.min(), prepared.max()) == (pytest.approx(-50, abs=3), pytest.approx(60, abs=60))
    directions = (
        prepared.affine[:3, :3].as_tensor() if isinstance(prepared.affine, MetaTensor) else prepared.affine[:3, :3]
    )
    torch.testing.assert_close(
        directions, torch.tensor([[0, 0, -2.0], [0, -2.0, 0], [2.0, 0, 0]], dtype=directions.dtype), atol=1e-6, rtol=0
    )
    lung = np.argwhere(volume.label == PHANTOM_LABELS["lung_left"])  # as dark as air, in the middle of the body
    points = np.stack([volume.landmarks["heart"], volume.landmarks["spine_T8"], lung.mean(0) * 8 - (188, 156, 36)])
    embedding = matcher.embed(image)
    assert embedding.in_body(torch.from_numpy(points)).all()
    air = torch.tensor([[-185.0, 150.0, 0.0], [185.0, 150.0, 20.0]], dtype=torch.float64)
    assert not embedding.in_body(air).any()
    found = matcher.match(image, image, torch.cat([torch.from_numpy(points), air]))
    assert found.accepted.tolist() == [True, True, True, False, False]
    assert PointMatcher(resnet(), Compose([])).embed(ct()).body is None  # unknown intensities


def test_by_hand_made_embedding() -> None:
    """Without the optional fields the maps fill the image, by another stride along each axis."""
    maps = [F.normalize(torch.randn(5, 4, 6, 7), dim=0)]
    affine = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    embedding = ImageEmbedding(maps, affine, (16, 12, 7), affine)
    matcher = PointMatcher(CoordinateNet())
    points = torch.tensor([[5.5, 4.5, 3.0]]) * torch.tensor([3.0, 2.0, 1.0])  # the centre of cell (1, 2, 3)
    torch.testing.assert_close(embedding.cells(points), torch.tensor([[1.0, 2, 3]], dtype=torch.float64))
    assert float(matcher.match(embedding, embedding, points).score[0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="give padded_size"):
        ImageEmbedding(maps, affine, (16, 12, 8), affine)
