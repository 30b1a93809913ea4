# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from monai_ssl.networks import AnisotropicResNet, encoder_channels, load_pretrained, save_pretrained


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "spatial_dims, base, expected",
    [
        (3, 64, 31_824_576),
        (3, 32, 7_960_928),
        (3, 16, 1_992_624),
        (3, 8, 499_352),
        (2, 64, 11_174_464),
        (2, 8, 176_008),
    ],
)
def test_sizes(spatial_dims: int, base: int, expected: int) -> None:
    with torch.device("meta"):  # shapes without memory
        assert count(AnisotropicResNet(spatial_dims, base_channels=base)) == expected


def test_maps_of_a_published_view() -> None:
    with torch.device("meta"):
        net = AnisotropicResNet()
        maps = net(torch.empty(2, 1, 32, 96, 96))
    assert [tuple(m.shape) for m in maps] == [
        (2, 64, 16, 48, 48), (2, 128, 16, 24, 24), (2, 256, 16, 12, 12), (2, 512, 8, 6, 6)
    ]  # fmt: skip
    assert net.channels == [64, 128, 256, 512]
    assert net.strides == [(2, 2, 2), (2, 4, 4), (2, 8, 8), (4, 16, 16)]


@pytest.mark.parametrize("spatial_dims, size", [(3, (8, 32, 48)), (2, (32, 48))])
def test_maps(spatial_dims: int, size: tuple[int, ...]) -> None:
    net = AnisotropicResNet(spatial_dims, in_channels=2, base_channels=4)
    maps = net(torch.rand(2, 2, *size))
    assert [m.shape[1] for m in maps] == net.channels == encoder_channels(net, 2, size)
    for m, stride in zip(maps, net.strides):
        assert tuple(m.shape[2:]) == tuple(n // s for n, s in zip(size, stride))
    assert net.strides[-1] == (4, 16, 16)[-spatial_dims:]


def test_layers() -> None:
    """Kernels and strides of the released backbone; the stem is not pooled."""
    net = AnisotropicResNet(base_channels=4)
    seen: list[Any] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv3d):
            assert module.bias is None
            assert module.padding == tuple(k // 2 for k in module.kernel_size)
            if (
                name.endswith(("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"))
                or name == "conv1"
            ):
                seen.append((module.kernel_size, module.stride))
            elif "downsample" in name:
                assert module.kernel_size == (1, 1, 1)
            else:
                assert module.stride == (1, 1, 1)
    first = [((3, 7, 7), (1, 1, 1))]
    layers = [((k, 3, 3), (s, 2, 2)) for k, s in ((1, 1), (1, 1), (3, 1), (3, 2))]
    assert seen == first + layers
    assert (net.pool.kernel_size, net.pool.stride) == ((2, 1, 1), (2, 1, 1))
    flat = AnisotropicResNet(2, base_channels=4)
    assert (flat.conv1.kernel_size, flat.conv1.stride) == ((7, 7), (1, 1))
    assert isinstance(flat.pool, nn.Identity)
    assert [n for n, _ in flat.named_parameters()] == [n for n, _ in net.named_parameters()]


def test_block_by_hand() -> None:
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut), and identity where neither stride nor width changes."""
    torch.manual_seed(0)
    net = AnisotropicResNet(2, base_channels=3).eval()
    x = torch.rand(1, 3, 6, 8)
    first, second = net.layer1
    for block, shortcut in ((first, first.downsample), (second, nn.Identity())):
        inner = torch.relu(block.bn1(block.conv1(x)))
        expected = torch.relu(block.bn2(block.conv2(inner)) + shortcut(x))
        torch.testing.assert_close(block(x), expected)
        x = expected
    assert not any("downsample" in name for name in second.state_dict())
    assert [type(m) for m in first.downsample] == [nn.Conv2d, nn.BatchNorm2d]


def test_initialisation() -> None:
    torch.manual_seed(0)
    net = AnisotropicResNet(base_channels=16)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv3d):
            fan_out = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
        elif isinstance(module, nn.BatchNorm3d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_scripted(spatial_dims: int) -> None:
    net = AnisotropicResNet(spatial_dims, base_channels=4).eval()
    x = torch.rand(1, 1, *(8, 32, 16)[-spatial_dims:])
    for a, b in zip(torch.jit.script(net)(x), net(x)):
        torch.testing.assert_close(a, b)


def test_other_numbers_of_blocks() -> None:
    net = AnisotropicResNet(2, base_channels=4, num_blocks=(1, 3, 1, 2))
    assert [len(layer) for layer in (net.layer1, net.layer2, net.layer3, net.layer4)] == [1, 3, 1, 2]


def test_saved_and_loaded(tmp_path: Any) -> None:
    net, other = (AnisotropicResNet(base_channels=4) for _ in range(2))
    load_pretrained(other, save_pretrained(net, tmp_path / "encoder.pt", {"method": "SAM"}))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"spatial_dims": 1}, "2 or 3, got 1"),
        ({"num_blocks": (2, 2, 2)}, "four"),
        ({"num_blocks": (2, 2, 0, 2)}, "four"),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnisotropicResNet(**kwargs)
