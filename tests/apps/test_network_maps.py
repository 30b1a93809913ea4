# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from embedding_fields import CoordinateNet, StridedNet, coordinate_image, ct, resnet
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from monai_ssl.apps import PointMatcher
from monai_ssl.apps.network_maps import network_maps, slab_halo, total_stride
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet


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


def test_network_is_left_as_it_was() -> None:
    network = resnet().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    PointMatcher(network, Compose([])).embed(ct())
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
