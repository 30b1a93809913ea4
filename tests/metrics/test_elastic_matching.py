# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_ssl.apps import grid_points
from monai_ssl.apps.registration.fields import jacobian_determinant
from monai_ssl.metrics import ElasticMatchingErrorMetric, wave_displacement
from monai_ssl.transforms.view_geometry import voxel_index

ROI = {2: (32, 40), 3: (16, 32, 40)}


def affines(ndim: int, volumes: int) -> Tensor:
    """Views of voxels of unequal sizes, of each volume of others, on turned axes; view 2 is of no importance."""
    matrix = torch.eye(ndim + 1, dtype=torch.float64).repeat(volumes, 2, 1, 1)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    for b in range(volumes):
        spacing = torch.tensor([3.0, 2.0, 1.5][:ndim], dtype=torch.float64) * (1 + 0.1 * b)
        matrix[b, :, :-1, :-1] = torch.diag(spacing)
        matrix[b, :, :2, :ndim] = turn @ matrix[b, 0, :2, :ndim]
    matrix[:, 1, :-1, -1] = 1000.0
    return matrix


class PlaceNet(nn.Module):
    """Embeds an image of two or three channels, the voxel that each one shows, by Fourier features of that place.

    With `of_the_view` it looks at where in the view a cell is, instead of at the image.
    """

    def __init__(self, ndim: int, of_the_view: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(64, ndim, generator=generator) / 6
        self.phase = 6.28 * torch.rand(64, generator=generator)
        self.of_the_view = of_the_view
        self.pool = F.avg_pool2d if ndim == 2 else F.avg_pool3d

    def forward(self, image: Tensor) -> list[Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        shown = coordinates(tuple(image.shape[2:]), len(image)) if self.of_the_view else image
        features = torch.cos(self.pool(shown, 2).movedim(1, -1) @ self.weight.T + self.phase)
        return [F.normalize(features, dim=-1).movedim(-1, 1)]


def coordinates(size: tuple[int, ...], volumes: int) -> Tensor:
    return voxel_index(size).T.reshape(1, -1, *size).float().expand(volumes, -1, *[-1] * len(size))


def measured(ndim: int, volumes: int, of_the_view: bool = False, **options: float) -> tuple[float, Tensor]:
    """Mean error, and one row of sum and number for each volume; in batches of one."""
    network = PlaceNet(ndim, of_the_view)
    image, affine = coordinates(ROI[ndim], volumes), affines(ndim, volumes)
    metric = ElasticMatchingErrorMetric(network, ROI[ndim], **{"amplitude_mm": 6.0, "wavelength_mm": 70.0} | options)
    rows = []
    for b in range(volumes):
        with torch.no_grad():
            maps = [torch.cat([m, torch.zeros_like(m)]) for m in network.eval()(image[b : b + 1])]
        network.train()
        rows.append(metric(maps, {"image": image[b : b + 1], "view_affine": affine[b : b + 1]}))
        assert network.training
    return float(metric.aggregate()), torch.cat(rows)


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_follows_the_image_finds_the_points(ndim: int) -> None:
    error, rows = measured(ndim, 2)
    assert error < 0.8  # cells of 3 to 6 mm
    assert error == pytest.approx(float(rows[:, 0].sum() / rows[:, 1].sum()), abs=1e-9)


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_follows_the_view_is_off_by_the_displacement(ndim: int) -> None:
    """Such a network finds each point where it is in the copy: the error is the length of the known field there."""
    error, rows = measured(ndim, 2, of_the_view=True)
    points = grid_points(ROI[ndim]).double()
    lengths = []
    for b, affine in enumerate(affines(ndim, 2)):
        spacing = torch.tensor([3.0, 2.0, 1.5][:ndim], dtype=torch.float64) * (1 + 0.1 * b)
        assert (affine[0, :-1, :-1].norm(dim=0) - spacing).abs().max() < 1e-9
        moved = wave_displacement(points * spacing, 6.0, 70.0, seed=b)
        inside = points + moved / spacing
        shown = ((inside >= 0) & (inside <= torch.tensor(ROI[ndim]) - 1)).all(1)
        assert int(shown.sum()) == int(rows[b, 1])
        lengths.append(moved[shown].norm(dim=1))
    mean = float(torch.cat(lengths).mean())
    assert mean > 3
    assert error == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize("ndim", [2, 3])
def test_field(ndim: int) -> None:
    """Within its amplitude, unlike any affine map, and folded nowhere although close to the limit."""
    size, spacing = (24, 30, 36)[:ndim], torch.tensor([3.0, 2.0, 1.5][:ndim], dtype=torch.float64)
    places = voxel_index(size) * spacing
    wavelength = 1.05 * 2 * math.pi * math.sqrt(ndim) * 6.0
    for seed in range(5):
        moved = wave_displacement(places, 6.0, wavelength, seed)
        assert moved.dtype == torch.float64
        assert 2 < moved.abs().max() <= 6
        voxels = (moved / spacing).T.reshape(1, ndim, *size)
        assert jacobian_determinant(voxels).min() > 0
        homogeneous = torch.cat([places, torch.ones(len(places), 1, dtype=torch.float64)], 1)
        rest = moved - homogeneous @ torch.linalg.lstsq(homogeneous, moved).solution
        assert rest.norm(dim=1).mean() > 0.5
        assert torch.equal(moved, wave_displacement(places, 6.0, wavelength, seed))
    assert not torch.allclose(moved, wave_displacement(places, 6.0, wavelength, seed + 1))


def test_one_wave_by_hand() -> None:
    """Along its own direction the mean of three sines; nothing else of the place counts."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(3, 2, generator=generator, dtype=torch.float64)
    expected = []
    for axis in range(2):
        total = 0.0
        for wave in range(3):
            x, y = directions[wave, axis].tolist()
            along = (5.0 * x - 7.0 * y) / math.hypot(x, y)
            total += math.sin(2 * math.pi * along / 90 + float(phases[wave, axis]))
        expected.append(4.0 * total / 3)
    found = wave_displacement(torch.tensor([5.0, -7.0]), 4.0, 90.0, 3)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_fields_depend_on_the_volume_alone() -> None:
    """Not on the batch; after a reset they start again, and another seed gives others."""
    network, image, affine = PlaceNet(2, of_the_view=True).eval(), coordinates(ROI[2], 3), affines(2, 3)
    maps = [torch.zeros(6, 64, 16, 20)]
    with torch.no_grad():
        maps[0][:3] = network(image)[0]
    metric = ElasticMatchingErrorMetric(network, ROI[2], 6.0, 70.0)
    first = metric(maps, {"image": image, "view_affine": affine})
    _, alone = measured(2, 3, of_the_view=True)
    torch.testing.assert_close(first, alone, atol=1e-3, rtol=0)
    assert len(set(first[:, 0].tolist())) == 3
    assert not torch.allclose(first[:1], metric(maps, {"image": image, "view_affine": affine})[:1])
    metric.reset()
    assert torch.equal(first, metric(maps, {"image": image, "view_affine": affine}))
    other = ElasticMatchingErrorMetric(network, ROI[2], 6.0, 70.0, seed=7)
    assert not torch.allclose(first, other(maps, {"image": image, "view_affine": affine}))


def test_refused() -> None:
    network, affine = PlaceNet(3), affines(3, 2)
    with pytest.raises(ValueError, match=r"10.0 mm would fold at a wavelength of 100.0 mm in 3D.*more than 108.8"):
        ElasticMatchingErrorMetric(network, ROI[3], 10.0, 100.0)
    ElasticMatchingErrorMetric(network, ROI[2], 10.0, 100.0)  # the limit in 2D is 88.9
    with pytest.raises(ValueError, match="amplitude positive"):
        wave_displacement(torch.zeros(1, 2), 0.0, 100.0, 0)
    metric = ElasticMatchingErrorMetric(network, ROI[3])
    maps = [torch.zeros(4, 64, 8, 16, 20)]
    with pytest.raises(ValueError, match=r"image \(2, 3, 16, 32, 44\) must be 2 views of \(16, 32, 40\)"):
        metric(maps, {"image": torch.zeros(2, 3, 16, 32, 44), "view_affine": affine})
    with pytest.raises(ValueError, match="two rows for each volume"):
        metric([maps[0][:3]], {"image": torch.zeros(2, 3, *ROI[3]), "view_affine": affine})
