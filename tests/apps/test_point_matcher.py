# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding_fields import AFFINE, CoordinateNet, StridedNet, coordinate_image
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Orientation, Spacing, SpatialCrop
from torch import nn

from monai_ssl.apps import ImageEmbedding, PointMatcher
from monai_ssl.apps.network_maps import network_maps, slab_halo, total_stride
from monai_ssl.data import PHANTOM_LABELS, torso_phantom
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet
from monai_ssl.transforms.view_geometry import transform_points

GEOMETRY = Compose([Orientation(axcodes="SPL", labels=None), Spacing(pixdim=(2, 2, 2))])
# axes of the file point to the front, down and to the left, in steps of 1.5, 3 and 1 mm, far from the origin
PERMUTED = torch.tensor([[0, 0, -1.0, 1500], [1.5, 0, 0, -1490], [0, -3.0, 0, 1520], [0, 0, 0, 1]], dtype=torch.float64)
TURN = torch.tensor([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
OBLIQUE = TURN @ torch.tensor([[1.2, 0, 0, 40], [0, 1.6, 0, -30], [0, 0, 2.5, 7], [0, 0, 0, 1]], dtype=torch.float64)


def inside(affine: torch.Tensor, size: tuple[int, ...], number: int = 40, margin: float = 0.25) -> torch.Tensor:
    """World points in the middle of an image."""
    g = torch.Generator().manual_seed(1)
    share = margin + (1 - 2 * margin) * torch.rand(number, len(size), generator=g, dtype=torch.float64)
    return transform_points(affine, share * torch.tensor(size))


def ct(seed: int = 0, size: tuple[int, ...] = (19, 24, 22), spacing: float = 2.0) -> MetaTensor:
    g = torch.Generator().manual_seed(seed)
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    return MetaTensor(torch.randn(1, *size, generator=g) * 300, affine=affine)


def resnet(spatial_dims: int = 3, seed: int = 0) -> AnatomicalEmbeddingNet:
    torch.manual_seed(seed)
    encoder = AnisotropicResNet(spatial_dims, base_channels=8)
    for module in encoder.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):  # statistics of a trained network
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, spatial_dims, embed_dim=7)


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


def test_padded_cells_never_match() -> None:
    """What is searched for is found in the padding alone, which must not count."""

    class Bright(nn.Module):
        encoder = nn.Identity()

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            wanted = F.avg_pool3d(image, 2)
            wanted[:, :, 5:], wanted[:, :, :, 5:], wanted[..., 6:] = 1, 1, 1  # 9, 10 and 11 voxels end there
            return [F.normalize(torch.cat([wanted, 1 - wanted], 1), dim=1)]

    Bright.encoder.strides = [(2, 8, 8)]
    query, image = (MetaTensor(torch.full((1, 9, 10, 11), value), affine=ct().affine) for value in (1.0, 0.2))
    matcher = PointMatcher(Bright(), Compose([]))
    embedding = matcher.embed(image)
    assert embedding.padded_size == (10, 16, 16)
    mask = embedding.key_mask()
    assert mask.shape == (5, 8, 8)
    expected = torch.zeros(5, 8, 8, dtype=torch.bool)
    expected[:5, :5, :6] = True
    assert torch.equal(mask, expected)
    points = torch.tensor([[16.0, 18.0, 20.0], [2.0, 2.0, 2.0]])
    found = matcher.match(query, image, points)
    assert (found.points <= torch.tensor([17.0, 19.0, 21.0])).all()
    assert (found.score < 0.5).all()
    assert matcher.similarity_map(query, image, points).shape == (2, 9, 10, 11)


@pytest.mark.parametrize("size", [(5, 9, 7), (1, 16, 3), (3, 3, 40)])
def test_volumes_smaller_than_a_patch(size: tuple[int, ...]) -> None:
    matcher = PointMatcher(resnet(), Compose([]))
    image = ct(size=size)
    points = torch.tensor([[4.0 * (s // 4) + 1 for s in size]])  # the centre of a cell
    found = matcher.match(image, image, points, cycle=True)
    assert found.score[0] > 0.99
    assert (found.points - points).abs().max() <= 2  # half a cell
    assert found.cycle_error_mm is not None
    assert torch.isfinite(found.cycle_error_mm).all()


@pytest.mark.parametrize("slab", [8, 32])
def test_slabs_equal_the_whole_volume(slab: int) -> None:
    network, image = resnet().double(), torch.randn(1, 77, 16, 23, dtype=torch.float64)
    whole, padded = network_maps(network, image)
    assert padded == (80, 16, 32)
    parts, again = network_maps(network, image, slab)
    assert again == padded
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)


def test_halo_is_the_receptive_field() -> None:
    network, image = resnet(), torch.zeros(1, 9, 9, 9)
    assert total_stride(network, image) == (4, 16, 16)
    assert slab_halo(network, image, (4, 16, 16)) == 28
    # by hand: 2 x 2 convolutions of 3 at stride 2, then 2 at 2 and 3 times 4, the head's 4, stem and pooling 1 each
    short = AnisotropicResNet(base_channels=8, num_blocks=(1, 1, 1, 1))
    network = AnatomicalEmbeddingNet(short, short.channels, embed_dim=7)
    assert slab_halo(network, image, (4, 16, 16)) == 4 + 8 + 4
    assert slab_halo(CoordinateNet(), torch.zeros(3, 9, 9, 9), (4, 16, 16)) == 0


def test_slabs_of_a_matcher() -> None:
    image = ct(size=(60, 20, 20))
    embeddings = [PointMatcher(resnet(), Compose([]), slab_size=slab).embed(image) for slab in (None, 12)]
    for one, other in zip(*(e.maps for e in embeddings)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_slabs_that_cannot_be_exact_are_refused() -> None:
    class Whole(StridedNet):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return super().forward(image - image.mean((2, 3, 4), keepdim=True))

    with pytest.raises(ValueError, match="sees the whole first axis"):
        PointMatcher(Whole(), Compose([]), slab_size=8).embed(coordinate_image(torch.eye(4), (20, 16, 16)))
    for slab in (30, 0, (32, 64, 64), 16.0):
        with pytest.raises(ValueError, match=r"slab_size.*multiple of 4.*not divided along other axes"):
            PointMatcher(CoordinateNet(), slab_size=slab)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs volumes"):
        PointMatcher(resnet(2), Compose([]), slab_size=16).embed(ct(size=(40, 32)))


def test_an_image_is_embedded_once(tmp_path: Path) -> None:
    image, other = (coordinate_image(PERMUTED, (24, 16, 40), shift) for shift in (None, AFFINE))
    network = StridedNet()
    matcher = PointMatcher(network, GEOMETRY, cache_dir=tmp_path / "cache")
    points = inside(PERMUTED, (24, 16, 40), 3)
    first = matcher.match(image, other, points, cycle=True)
    assert network.calls == 2
    again = matcher.match(image, other, points, cycle=True)
    assert network.calls == 2
    assert torch.equal(first.points, again.points)
    files = sorted((tmp_path / "cache").iterdir())
    assert [len(file.name) for file in files] == [64 + 3] * 2
    fresh = PointMatcher(StridedNet(), GEOMETRY, cache_dir=tmp_path / "cache")
    assert torch.equal(fresh.match(image, other, points).points, first.points)
    assert fresh.network.calls == 0
    content = torch.load(files[0], weights_only=True)
    assert all(type(m) is torch.Tensor for m in content["maps"])


def test_the_cache_knows_what_it_holds(tmp_path: Path) -> None:
    image = coordinate_image(PERMUTED, (24, 16, 40))
    network = StridedNet()

    def calls(image: MetaTensor, transform: object = GEOMETRY) -> int:
        before = network.calls
        PointMatcher(network, transform, cache_dir=tmp_path).embed(image)  # type: ignore[arg-type]
        return network.calls - before

    assert [calls(image), calls(image)] == [1, 0]
    moved = MetaTensor(image.as_tensor(), affine=PERMUTED.clone())
    moved.affine[0, 3] += 10
    assert calls(moved) == 1
    changed = image.clone()
    changed[0, 5:8, 5:8, 5:8] += 1
    assert calls(changed) == 1
    assert calls(image, Compose([Orientation(axcodes="SPL", labels=None), Spacing(pixdim=(2, 2, 4))])) == 1
    with torch.no_grad():
        network.weight += 0.001
    assert [calls(image), calls(image)] == [1, 0]
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert [calls(image), calls(image)] == [1, 0]  # damaged files are written anew


def test_voxel_space_is_that_of_the_image_at_hand(tmp_path: Path) -> None:
    """Two files with the same voxels in the world, one stored back to front: one embedding, two kinds of index."""
    image = coordinate_image(PERMUTED, (24, 16, 40))
    other = Flip(0)(image)
    matcher = PointMatcher(StridedNet(), GEOMETRY, cache_dir=tmp_path)
    index = torch.tensor([[10.0, 8.0, 20.0]])
    found = matcher.match(image, image, index, "voxel").points
    flipped = matcher.match(image, other, index, "voxel").points
    torch.testing.assert_close(flipped, found * torch.tensor([-1, 1, 1]) + torch.tensor([23, 0, 0]), atol=1e-4, rtol=0)


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


def test_network_is_left_as_it_was() -> None:
    network = resnet().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    PointMatcher(network, Compose([])).embed(ct())
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_by_hand_made_embedding() -> None:
    """Without the optional fields the maps fill the image."""
    maps = [F.normalize(torch.randn(5, 4, 6, 7), dim=0)]
    affine = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    embedding = ImageEmbedding(maps, affine, (8, 12, 14), affine)
    matcher = PointMatcher(CoordinateNet())
    points = torch.tensor([[2.5, 4.5, 6.5]]) * torch.tensor([3.0, 2.0, 1.0])  # the centre of cell (1, 2, 3)
    torch.testing.assert_close(embedding.cells(points), torch.tensor([[1.0, 2, 3]], dtype=torch.float64))
    assert float(matcher.match(embedding, embedding, points).score[0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="give padded_size"):
        ImageEmbedding(maps, affine, (8, 12, 15), affine)
