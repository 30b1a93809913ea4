# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import AttentionUnet, BasicUNet, SegResNet, UNet
from monai.networks.nets.unet import CheckpointUNet
from torch import nn

import monai_ssl
from monai_ssl.networks import (
    UNetFeatures,
    UNetStages,
    save_pretrained,
    trained_blocks,
    trained_prefixes,
    unet_features,
    unet_stages,
)


def unet(dims: int = 2, channels: tuple[int, ...] = (4, 6, 8), residual: int = 2, **kwargs: Any) -> UNet:
    return UNet(dims, 2, 3, channels, (2,) * (len(channels) - 1), num_res_units=residual, norm="batch", **kwargs)


def basic_unet(dims: int = 2, upsample: str = "deconv") -> BasicUNet:
    return BasicUNet(dims, 2, 3, (4, 5, 6, 7, 8, 9), norm="batch", upsample=upsample)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (unet, (12, 16)),
    "plain": (lambda: unet(residual=0), (12, 16)),
    "3D residual": (lambda: unet(3, residual=1), (8, 12, 4)),
    "3D plain": (lambda: unet(3, residual=0), (8, 12, 4)),
    "two levels": (lambda: unet(channels=(4, 6)), (6, 8)),
    "six levels": (lambda: unet(channels=(4, 5, 6, 7, 8, 9)), (64, 32)),
    "unequal strides": (lambda: UNet(2, 2, 3, (4, 6, 8), ((2, 1), (2, 2)), num_res_units=1), (12, 10)),
    "BasicUNet": (basic_unet, (32, 48)),
    "BasicUNet of odd sizes": (basic_unet, (37, 51)),
    "BasicUNet nontrainable": (lambda: basic_unet(upsample="nontrainable"), (32, 48)),
    "3D BasicUNet": (lambda: basic_unet(3), (32, 48, 32)),
}
each = pytest.mark.parametrize("build, size", NETWORKS.values(), ids=NETWORKS)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


@each
@pytest.mark.parametrize("training", [False, True])
def test_all_blocks_are_the_network(build: Callable[[], nn.Module], size: tuple[int, ...], training: bool) -> None:
    """Bit for bit, statistics of the norms included."""
    image = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(1))
    one, other = seeded(build).train(training), seeded(build).train(training)
    stages = unet_stages(one)
    result = unet_features(one, image, len(stages.decoder))
    for name in stages.head:
        result = one.get_submodule(name)(result)
    assert torch.equal(result, other(image))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@each
def test_stages_hold_every_tensor_once(build: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    network = build()
    stages = unet_stages(network)
    names = [name for part in stages for name in part]
    held = [f"{name}.{key}" for name in names for key in network.get_submodule(name).state_dict()]
    assert sorted(held) == sorted(network.state_dict())
    assert len(stages.decoder) == len(stages.encoder) - 1


@each
def test_maps_grow_finer(build: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    network, image = build().eval(), torch.rand(1, 2, *size)
    sizes = [unet_features(network, image, blocks).shape[2:] for blocks in range(len(unet_stages(network).decoder) + 1)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    for blocks, shape in enumerate(sizes):
        assert UNetFeatures(network, blocks)(image).shape[2:] == shape


@each
def test_nothing_beyond_the_trained_prefixes_matters(build: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    network, image = seeded(build).eval(), torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(1))
    for blocks in range(len(unet_stages(network).decoder) + 1):
        prefixes = tuple(trained_prefixes(network, blocks))
        expected = unet_features(network, image, blocks)
        assert all(prefix.endswith(".") for prefix in prefixes)
        changed = seeded(build).eval()
        for name, value in changed.named_parameters():
            if not name.startswith(prefixes):
                value.data += 1
        assert torch.equal(unet_features(changed, image, blocks), expected)
        for prefix in prefixes:
            spoiled = seeded(build).eval()
            for value in spoiled.get_submodule(prefix.rstrip(".")).parameters():
                value.data += 1
            assert not torch.equal(unet_features(spoiled, image, blocks), expected)


def test_names() -> None:
    assert unet_stages(unet()) == UNetStages(
        encoder=("model.0", "model.1.submodule.0", "model.1.submodule.1.submodule"),
        decoder=("model.1.submodule.2", "model.2"),
        head=(),
    )
    stages = unet_stages(basic_unet())
    assert stages.decoder == ("upcat_4", "upcat_3", "upcat_2", "upcat_1")
    assert stages.head == ("final_conv",)
    assert trained_prefixes(unet(), 0) == ["model.0.", "model.1.submodule.0.", "model.1.submodule.1.submodule."]
    assert trained_prefixes(unet(), 1)[3:] == ["model.1.submodule.2."]


def test_sizes_and_counts_of_the_published_setting() -> None:
    network = UNet(2, 1, 4, (16, 32, 64, 128, 128, 128), (2,) * 5, num_res_units=2, norm="BATCH", act="RELU").eval()
    count = lambda names: sum(p.numel() for name in names for p in network.get_submodule(name).parameters())
    stages = unet_stages(network)
    assert sum(p.numel() for p in network.parameters()) == 1_817_328
    assert count(stages.encoder) == 1_130_288
    assert count(stages.decoder[:3]) == 674_112
    image = torch.zeros(1, 1, 192, 192)
    shapes = [tuple(unet_features(network, image, blocks).shape[1:]) for blocks in range(5)]
    assert shapes == [(128, 6, 6), (128, 12, 12), (64, 24, 24), (32, 48, 48), (16, 96, 96)]
    basic = BasicUNet(2, 1, 4, (16, 32, 64, 128, 128, 16), norm="batch").eval()
    assert sum(p.numel() for p in basic.parameters()) == 1_185_492
    shapes = [tuple(unet_features(basic, image, blocks).shape[1:]) for blocks in range(5)]
    assert shapes == [(128, 12, 12), (128, 24, 24), (64, 48, 48), (32, 96, 96), (16, 192, 192)]


def test_features_hold_the_whole_network() -> None:
    network = unet()
    features = UNetFeatures(network, 1)
    assert features.network is network
    assert list(features.state_dict()) == [f"network.{name}" for name in network.state_dict()]
    traced = torch.jit.trace(features.eval(), torch.rand(1, 2, 12, 16))
    image = torch.rand(3, 2, 12, 16)
    torch.testing.assert_close(traced(image), features(image))


@pytest.mark.parametrize(
    "network",
    [
        AttentionUnet(2, 1, 2, (4, 8), (2,)),
        SegResNet(2),
        CheckpointUNet(2, 1, 2, (4, 8), (2,)),
        nn.Conv2d(1, 1, 1),
    ],
)
def test_other_networks_are_refused(network: nn.Module) -> None:
    expected = r"expected monai.networks.nets.UNet or monai.networks.nets.BasicUNet, got .*" + type(network).__name__
    with pytest.raises(TypeError, match=expected):
        unet_stages(network)
    with pytest.raises(TypeError, match=expected):
        UNetFeatures(network)


@pytest.mark.parametrize("blocks", [-1, 3])
def test_number_of_blocks(blocks: int) -> None:
    for call in (
        lambda: unet_features(unet(), torch.zeros(1, 2, 12, 16), blocks),
        lambda: UNetFeatures(unet(), blocks),
        lambda: trained_prefixes(unet(), blocks),
    ):
        with pytest.raises(ValueError, match=f"num_decoder_blocks must be between 0 and 2 for this UNet, got {blocks}"):
            call()


def test_blocks_of_a_file(tmp_path: Path) -> None:
    for blocks in (0, 1):
        prefixes = trained_prefixes(unet(), blocks)
        provenance = {"settings": {"num_decoder_blocks": blocks}}
        assert trained_blocks(save_pretrained(unet(), tmp_path / "unet.pt", provenance, include=prefixes)) == blocks
    others = [
        save_pretrained(unet(), tmp_path / "other.pt", {"settings": {"seed": 0}}),
        save_pretrained(unet(), tmp_path / "bare.pt", {}),
        tmp_path / "plain.pt",
    ]
    torch.save(unet().state_dict(), others[2])
    for file in others:
        with pytest.raises(ValueError, match=rf"{file.name} does not say how many decoder blocks .* unet_encoder.pt"):
            trained_blocks(file)
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: run the training that writes it.*absent.pt"):
        trained_blocks(tmp_path / "absent.pt")


def test_function_and_module_of_one_name() -> None:
    """The package's attribute is the function, whatever is imported afterwards; classes are found by their names."""
    module = importlib.import_module("monai_ssl.networks.unet_stages")
    assert module is sys.modules["monai_ssl.networks.unet_stages"]
    from monai_ssl.networks.unet_stages import unet_stages as from_module

    assert module.unet_stages is from_module is unet_stages is monai_ssl.networks.unet_stages
    assert module.UNetFeatures is UNetFeatures
    config = {"imports": ["$import monai_ssl"], "it": {"_target_": "UNetFeatures", "_mode_": "callable"}}
    assert ConfigParser(config).get_parsed_content("it") is UNetFeatures
