# SPDX-License-Identifier: Apache-2.0
"""Embeddings whose answer is known: random Fourier features of the place in the world, in mm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from torch import Tensor, nn

from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

SCALES = (10.0, 60.0)  # mm, of the local and the global map
STRIDES = ((2, 2, 2), (4, 16, 16))
# place in the query = A place in the key + t, mm
AFFINE = torch.tensor(
    [[1.05, 0.02, 0, 3], [-0.03, 0.95, 0.04, -2], [0, -0.02, 1.08, 4], [0, 0, 0, 1]], dtype=torch.float64
)
# axes of the file point to the front, down and to the left, in steps of 1.5, 3 and 1 mm, far from the origin
PERMUTED = torch.tensor([[0, 0, -1.0, 1500], [1.5, 0, 0, -1490], [0, -3.0, 0, 1520], [0, 0, 0, 1]], dtype=torch.float64)
GEOMETRY = Compose([Orientation(axcodes="SPL", labels=None), Spacing(pixdim=(2, 2, 2))])


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


def fields(channels: int = 128, rank: int = 3, seed: int = 0) -> list[Callable[[Tensor], Tensor]]:
    """World points (P, n) -> unit vectors (P, channels), for each level."""
    g = torch.Generator().manual_seed(seed)

    def field(scale: float) -> Callable[[Tensor], Tensor]:
        weight = torch.randn(channels, rank, generator=g, dtype=torch.float64) / scale
        phase = torch.rand(channels, generator=g, dtype=torch.float64) * 2 * math.pi
        return lambda points: F.normalize(torch.cos(points.double() @ weight.T + phase), dim=-1)

    return [field(scale) for scale in SCALES]


def maps_of(
    size: Sequence[int], world: Callable[[Tensor], Tensor], strides: Sequence[Sequence[int]] = STRIDES, **options: int
) -> list[Tensor]:
    """Maps at the cell centres of an image, padded to the strides; `world` takes its voxels to mm."""
    maps = []
    total = [math.lcm(*axis) for axis in zip(*strides)]
    for stride, field in zip(strides, fields(rank=len(size), **options)):
        cells = [-(-n // t) * t // s for n, t, s in zip(size, total, stride)]
        step = torch.tensor(stride, dtype=torch.float64)
        maps.append(field(world(voxel_index(cells) * step + (step - 1) / 2)).T.reshape(-1, *cells).float())
    return maps


def coordinate_image(affine: Tensor, size: Sequence[int], shows: Tensor | None = None) -> MetaTensor:
    """(n, *size): each voxel holds its world position, or where `shows` takes that."""
    points = transform_points(affine.double(), voxel_index(size))
    points = points if shows is None else transform_points(shows, points)
    return MetaTensor(points.T.reshape(-1, *size).float(), affine=affine.double())


class CoordinateNet(nn.Module):
    """Embeds a coordinate image by the places that its voxels show."""

    def __init__(self, channels: int = 128, rank: int = 3, strides: Sequence[Sequence[int]] = STRIDES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.fields, self.strides, self.rank, self.calls = fields(channels, rank), strides, rank, 0
        self.pool = F.avg_pool2d if rank == 2 else F.avg_pool3d

    def forward(self, image: Tensor) -> list[Tensor]:
        assert type(image) is Tensor
        assert not self.training
        self.calls += 1
        maps = []
        for stride, field in zip(self.strides, self.fields):
            places = self.pool(image * self.weight, tuple(stride))
            maps.append(field(places.movedim(1, -1)).movedim(-1, 1).float())
        return maps


class StridedNet(CoordinateNet):
    """The same with an encoder that tells its strides."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.encoder = nn.Module()
        self.encoder.strides = self.strides  # type: ignore[assignment]
