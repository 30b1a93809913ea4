# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import DVF2DDF
from torch import Tensor, nn

from monai_ssl.losses import RegistrationLoss
from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    EmbeddingRegistrationNet,
    RegistrationUNet,
    correlation_volume,
    integrate_velocity,
)

CONV = {2: F.conv2d, 3: F.conv3d}
POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(spatial_dims: int = 2, **kwargs: Any) -> RegistrationUNet:
    torch.manual_seed(0)
    return RegistrationUNet(spatial_dims, **{"channels": (3, 4), "up_channels": (5, 4, 3), **kwargs})


def waves(size: tuple[int, ...], shift: float = 0.0) -> Tensor:
    """A pattern of the size of some voxels in [-1, 1], moved along the first axis."""
    places = torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")
    return torch.sin((places[0] + shift) / 2.5) * torch.cos(sum(places[1:]) / 3)


# ---- the field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 12), (7, 9, 8)])
def test_integration_is_that_of_monai_and_in_normalised_units(size: tuple[int, ...]) -> None:
    n = len(size)
    half = (torch.tensor(size) - 1).view(n, *[1] * n) / 2
    velocity = 0.2 * F.avg_pool2d(rand(2, n, *size).double().flatten(3), 3, 1, 1).view(2, n, *size)  # normalised
    with pytest.warns(UserWarning, match="native grid_sample"):
        monai = DVF2DDF(7)(velocity * half)
    found = integrate_velocity(velocity * half)
    torch.testing.assert_close(found, monai, atol=1e-9, rtol=0)
    identity = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, s).double() for s in size], indexing="ij"))
    d = velocity / 2**7
    for _ in range(7):
        d = d + F.grid_sample(d, (identity + d).flip(1).movedim(1, -1), align_corners=True)
    torch.testing.assert_close(found, d * half, atol=1e-6, rtol=0)
    assert (found - velocity * half).abs().max() > 0.05  # integration is not the identity


def test_no_steps_leave_the_velocity() -> None:
    velocity = rand(1, 2, 5, 6)
    assert torch.equal(integrate_velocity(velocity, 0), velocity)


def test_half_precision_is_not_kept() -> None:
    velocity = rand(1, 2, 5, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(integrate_velocity(velocity), integrate_velocity(velocity.float()))
    assert integrate_velocity(velocity, 0).dtype == torch.float32


# ---- the U-Net ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spatial_dims, features, expected", [(3, 0, 327_331), (3, 27, 350_659), (2, 9, 111_762)], ids=str
)
def test_number_of_parameters(spatial_dims: int, features: int, expected: int) -> None:
    net = RegistrationUNet(spatial_dims, feature_channels=features)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert not list(net.buffers())


def by_hand(net: RegistrationUNet, image: Tensor, features: Tensor | None, levels: int, ups: int) -> Tensor:
    """The figure, layer by layer, from the bare parameters in their order."""
    n, (weights, biases) = image.ndim - 2, (list(net.parameters())[start::2] for start in (0, 1))
    conv = [lambda x, w=w, b=b: F.leaky_relu(CONV[n](x, w, b, padding=1), 0.2) for w, b in zip(weights, biases)]
    x, skips = image, []
    for level in range(levels):
        if level == net.feature_level and features is not None:
            x = torch.cat([x, features], 1)
        x = conv[level](x)
        skips.append(x)
        x = POOL[n](x, 2)
    for level in range(levels):
        x = conv[levels + level](x)
        for axis in range(2, n + 2):
            x = x.repeat_interleave(2, axis)
        x = torch.cat([x, skips[-1 - level]], 1)
    for level in range(levels, ups):
        x = conv[levels + level](x)
    return CONV[n](x, weights[-1], biases[-1], padding=1)


@pytest.mark.parametrize("n, size", [(2, (8, 12)), (3, (4, 8, 12))])
@pytest.mark.parametrize("features, level", [(0, 1), (2, 1), (2, 0)])
def test_layers(n: int, size: tuple[int, ...], features: int, level: int) -> None:
    net = small(n, feature_channels=features, feature_level=level, integration_steps=0)
    nn.init.normal_(net.flow.weight)
    image = rand(2, 2, *size)
    maps = rand(2, features, *(s // 2**level for s in size)) if features else None
    half = torch.tensor([(s - 1) / 2 for s in size]).view(n, *[1] * n)
    expected = by_hand(net, image, maps, 2, 3) * half
    torch.testing.assert_close(net(image, maps), expected, atol=1e-5, rtol=1e-5)


def test_flow_counts_in_half_image_extents() -> None:
    net = small(integration_steps=0)
    nn.init.zeros_(net.flow.weight)
    net.flow.bias.data = torch.tensor([0.25, -0.5])
    velocity = net(rand(1, 2, 8, 12))
    assert velocity[0, 0].unique().tolist() == [0.25 * 3.5]
    assert velocity[0, 1].unique().tolist() == [-0.5 * 5.5]


def test_same_weights_with_and_without_integration() -> None:
    velocity_net, net = small(integration_steps=0), RegistrationUNet(2, channels=(3, 4), up_channels=(5, 4, 3))
    nn.init.normal_(velocity_net.flow.weight, std=0.03)
    net.load_state_dict(velocity_net.state_dict())
    image = rand(1, 2, 8, 12)
    velocity, displacement = velocity_net(image), net(image)
    torch.testing.assert_close(displacement, integrate_velocity(velocity, 7), atol=0, rtol=0)
    assert (displacement - velocity).abs().max() > 1e-3


def test_starts_at_the_identity() -> None:
    torch.manual_seed(0)
    net = RegistrationUNet(feature_channels=27)
    with torch.no_grad():
        field = net(rand(1, 2, 192, 16, 32).clamp(-1, 1), 2 * rand(1, 27, 96, 8, 16).clamp(-1, 1))
    assert field.shape == (1, 3, 192, 16, 32)
    assert 0 < field.abs().max() < 1e-2
    assert net.flow.weight.std().item() == pytest.approx(1e-5, rel=0.1)
    assert not net.flow.bias.any()


def test_half_precision_gives_a_full_field() -> None:
    net, image, dtypes = small(), rand(1, 2, 8, 12), []
    expected = net(image)
    for layer in (net.full[-1], net.flow):
        layer.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        field = net(image)
    assert dtypes == [torch.bfloat16, torch.float32]  # at 1e-5 half precision is coarse
    assert field.dtype == torch.float32
    torch.testing.assert_close(field, expected, atol=1e-6, rtol=0.05)


def test_copies() -> None:
    net, image = small(), rand(1, 2, 8, 12)
    expected = net(image)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(image), expected)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"channels": (4, 4, 4), "up_channels": (4, 4)}, "up_channels"),
        ({"channels": ()}, "channels"),
        ({"feature_level": 4}, "feature_level"),
        ({"feature_channels": -1}, "feature_channels"),
        ({"integration_steps": -1}, "integration_steps"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RegistrationUNet(**arguments)


@pytest.mark.parametrize(
    "image, features, message",
    [
        ((1, 2, 16, 24), None, "multiple of 16"),
        ((1, 3, 16, 16), None, "image"),
        ((1, 2, 16), None, "image"),
        ((1, 2, 16, 32), (1, 9, 8, 16), "feature_channels=0"),
    ],
)
def test_images_are_checked(image: tuple, features: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RegistrationUNet(2)(torch.zeros(image), None if features is None else torch.zeros(features))
    assert str(image) in str(error.value)


@pytest.mark.parametrize("features", [None, (1, 9, 16, 32), (1, 8, 8, 16), (2, 9, 8, 16)])
def test_features_are_checked(features: tuple | None) -> None:
    with pytest.raises(ValueError, match=r"features .* must be \(1, 9, 8, 16\)"):
        small(feature_channels=9, channels=(2, 2, 2, 2), up_channels=(2, 2, 2, 2))(
            torch.zeros(1, 2, 16, 32), None if features is None else torch.zeros(features)
        )


# ---- with an embedder -----------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """A local map at half and a global map at a quarter of the size; what it was shown."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.levels, self.shown = levels, []
        self.norm = nn.BatchNorm2d(1)
        self.convs = nn.ModuleList(nn.Conv2d(1, 4, s, s) for s in (2, 4, 2))

    def forward(self, image: Tensor) -> Any:
        self.shown.append(image.clone())
        maps = [conv(self.norm(image)) for conv in self.convs[: self.levels]]
        return maps if len(maps) > 1 else maps[0]


class Spy(RegistrationUNet):
    """Keeps what the U-Net is given."""

    def forward(self, image: Tensor, features: Tensor | None = None) -> Tensor:
        self.given = image, features
        return super().forward(image, features)


def embedding_net(levels: int = 2, cls: type = RegistrationUNet, **kwargs: Any) -> EmbeddingRegistrationNet:
    torch.manual_seed(0)
    return EmbeddingRegistrationNet(
        Maps(levels), cls(2, feature_channels=9, channels=(3, 4), up_channels=(5, 4), **kwargs)
    )


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_features_are_the_sum_of_the_correlations(levels: int) -> None:
    net = embedding_net(levels, Spy)
    image = rand(2, 2, 8, 12) * 30
    net(image)
    moving, fixed = image[:, :1], image[:, 1:]
    with torch.no_grad():
        maps = [[conv(net.embedder.norm(x)) for conv in net.embedder.convs] for x in (moving, fixed)]
        expected = correlation_volume(maps[0][0], maps[1][0])
        if levels > 1:
            large = [F.normalize(F.interpolate(m[1], size=(4, 6), mode="bilinear"), dim=1) for m in maps]
            expected = expected + correlation_volume(*large)
    torch.testing.assert_close(net.unet.given[1], expected, atol=1e-6, rtol=0)
    assert torch.equal(net.embedder.shown[0], moving)
    assert torch.equal(net.embedder.shown[1], fixed)


def test_window_of_the_unet() -> None:
    """[-800, 400] HU become [-1, 1]; -200 HU lie in the middle, beyond the ends nothing changes."""
    net = embedding_net(cls=Spy)
    hu = torch.tensor([-1024.0, -800, -500, -200, 400, 3071])
    image = (hu + 1024) / 4095 * 255 - 50
    net(image.repeat(2).view(1, 1, 1, 12).expand(1, 2, 4, 12))
    assert net.unet.given[0][0, 1, 2, :6].tolist() == pytest.approx([-1, -1, -0.5, 0, 1, 1], abs=2e-4)


def test_the_embedder_is_frozen() -> None:
    net = embedding_net(integration_steps=0)
    before = {k: v.clone() for k, v in net.embedder.state_dict().items()}
    assert net.training
    assert not any(m.training for m in net.embedder.modules())
    for mode in (True, False, True):
        net.train(mode)
        assert net.training == net.unet.training == mode
        assert not any(m.training for m in net.embedder.modules())
    velocity = net(rand(2, 2, 8, 12) * 30)
    velocity.square().sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in net.embedder.parameters())
    assert all(p.grad is not None for p in net.unet.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.embedder.state_dict().items())


def test_one_file_holds_everything() -> None:
    net, other = embedding_net(integration_steps=0), embedding_net()
    names = {f"embedder.{k}" for k in net.embedder.state_dict()} | {f"unet.{k}" for k in net.unet.state_dict()}
    assert set(net.state_dict()) == names
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    net.load_state_dict(other.state_dict())
    image = rand(1, 2, 8, 12) * 30
    torch.testing.assert_close(integrate_velocity(net(image)), other(image), atol=0, rtol=0)


@pytest.mark.parametrize("spatial_dims, size", [(2, (16, 32)), (3, (16, 32, 16))])
def test_with_the_network_of_sam(spatial_dims: int, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = AnisotropicResNet(spatial_dims, base_channels=8)
    embedder = AnatomicalEmbeddingNet(encoder, encoder.channels, spatial_dims, embed_dim=7, semantic=True)
    net = EmbeddingRegistrationNet(embedder, RegistrationUNet(spatial_dims, feature_channels=3**spatial_dims))
    image = rand(1, 2, *size) * 30
    assert net(image).shape == (1, spatial_dims, *size)
    same = net.features(image[:, :1].expand_as(image))
    torch.testing.assert_close(same[:, 3**spatial_dims // 2], torch.full_like(same[:, 0], 2.0))


def test_constructor_and_image_are_checked() -> None:
    unet = small(feature_channels=9)
    with pytest.raises(ValueError, match="radius=2 it needs 25 and 2"):
        EmbeddingRegistrationNet(Maps(), unet, radius=2)
    with pytest.raises(ValueError, match="in_channels=3"):
        EmbeddingRegistrationNet(Maps(), small(feature_channels=9, in_channels=3))
    with pytest.raises(ValueError, match="window"):
        EmbeddingRegistrationNet(Maps(), unet, window=(5, -5))
    for shape in ((1, 1, 8, 12), (1, 2, 8), (2, 8, 12)):
        with pytest.raises(ValueError, match="moving and fixed") as error:
            EmbeddingRegistrationNet(Maps(), unet)(torch.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize("with_embedder", [False, True])
def test_thirty_steps_lower_the_loss(with_embedder: bool) -> None:
    torch.manual_seed(0)
    if with_embedder:
        net, scale = embedding_net(integration_steps=0), 37.0
    else:
        net, scale = small(integration_steps=0), 1.0
    size = (24, 20)
    moving, fixed = scale * waves(size)[None, None], scale * waves(size, 1.0)[None, None]
    loss_function = RegistrationLoss(smoothness_weight=0.1)
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = loss_function(net(torch.cat([moving, fixed], 1)), {"moving": moving, "fixed": fixed})
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
