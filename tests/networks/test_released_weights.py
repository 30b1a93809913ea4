# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    MergedEmbeddingNet,
    inflate_resnet18,
    load_mmdet_checkpoint,
)

State = dict[str, Tensor]


def net(semantic: bool = False, base: int = 4, cls: Any = AnatomicalEmbeddingNet) -> Any:
    encoder = AnisotropicResNet(base_channels=base)
    return cls(encoder, encoder.channels, embed_dim=6, semantic=semantic)


def randomized(module: nn.Module) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(7)
        for name, t in module.state_dict().items()
    }


def mmdet_names(semantic: bool) -> list[tuple[str, str]]:
    """Names in the released files and ours, written out from the modules of mmdet."""
    names = [("backbone.conv1.conv.weight", "encoder.conv1.weight")]
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norm = lambda theirs, ours: [(f"{theirs}.{t}", f"{ours}.{t}") for t in tensors]
    names += norm("backbone.conv1.bn", "encoder.bn1")
    for layer in range(1, 5):
        for block in range(2):
            theirs, ours = f"backbone.layer{layer}.{block}", f"encoder.layer{layer}.{block}"
            for conv in (1, 2):
                names += [(f"{theirs}.conv{conv}.conv.weight", f"{ours}.conv{conv}.weight")]
                names += norm(f"{theirs}.conv{conv}.bn", f"{ours}.bn{conv}")
            if block == 0:
                names += [(f"{theirs}.downsample.conv.weight", f"{ours}.downsample.0.weight")]
                names += norm(f"{theirs}.downsample.bn", f"{ours}.downsample.1")
    heads = [("neck", "local_head", 3), ("read_out_head", "global_head", 1), ("semantic_head", "semantic_head", 3)]
    for theirs, ours, levels in heads if semantic else heads[:2]:
        for tensor in ("weight", "bias"):
            names += [
                (f"{theirs}.lateral_convs.{i}.conv.{tensor}", f"{ours}.lateral.{i}.{tensor}") for i in range(levels)
            ]
            names += [(f"{theirs}.fpn_convs.0.conv.{tensor}", f"{ours}.smooth.{tensor}")]
    return names


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("form", ["bare", "nested", "module", "old"])
def test_strict_load_of_released_names(semantic: bool, form: str, tmp_path: Path) -> None:
    """Every tensor of either side is accounted for, 138 without the semantic head."""
    network = net(semantic)
    own = randomized(network)
    names = mmdet_names(semantic)
    assert sorted(ours for _, ours in names) == sorted(own)
    assert len(names) == (146 if semantic else 138)
    content: Any = {theirs: own[ours] for theirs, ours in names}
    if form == "old":
        content = {name: t for name, t in content.items() if "num_batches" not in name}
    if form == "module":
        content = {f"module.{name}": t for name, t in content.items()}
    if form != "bare":
        content = {"meta": {"epoch": 3}, "state_dict": content}
    torch.save(content, tmp_path / "SAM.pth")
    load_mmdet_checkpoint(tmp_path / "SAM.pth", network)
    for name, tensor in network.state_dict().items():
        if form != "old" or "num_batches" not in name:
            assert torch.equal(tensor, own[name]), name


def test_published_shapes() -> None:
    """Of the released model code, base width 64 and vectors of 128."""
    with torch.device("meta"):
        encoder = AnisotropicResNet()
        shapes = {n: tuple(t.shape) for n, t in AnatomicalEmbeddingNet(encoder, encoder.channels).state_dict().items()}
    by_name = {theirs: shapes[ours] for theirs, ours in mmdet_names(False)}
    assert by_name["backbone.conv1.conv.weight"] == (64, 1, 3, 7, 7)
    assert by_name["backbone.layer2.0.conv1.conv.weight"] == (128, 64, 1, 3, 3)
    assert by_name["backbone.layer4.1.conv2.conv.weight"] == (512, 512, 3, 3, 3)
    assert by_name["backbone.layer1.0.downsample.conv.weight"] == (64, 64, 1, 1, 1)
    assert by_name["neck.lateral_convs.2.conv.weight"] == (128, 256, 1, 1, 1)
    assert by_name["read_out_head.lateral_convs.0.conv.weight"] == (128, 512, 1, 1, 1)
    assert by_name["read_out_head.fpn_convs.0.conv.weight"] == (128, 128, 3, 3, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: s.update({"bbox_head.fc.weight": torch.ones(1)}), KeyError, r"lacks: \['bbox_head\.fc\.weight'\]"),
        (
            lambda s: s.update({"neck.fpn_convs.1.conv.bias": torch.ones(6)}),
            KeyError,
            r"neck\.fpn_convs\.1\.conv\.bias",
        ),
        (lambda s: s.update({"backbone.layer5.0.conv1.conv.weight": torch.ones(1)}), KeyError, "layer5"),
        (lambda s: s.update({"semantic_head.fpn_convs.0.conv.bias": torch.ones(6)}), KeyError, "semantic_head"),
        (lambda s: s.pop("neck.lateral_convs.1.conv.bias"), KeyError, r"it lacks \['local_head\.lateral\.1\.bias'\]"),
        (
            lambda s: s.update({"backbone.conv1.bn.weight": torch.ones(5)}),
            ValueError,
            r"bn1\.weight \(5,\) in .*\(4,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, error: Any, message: str, tmp_path: Path) -> None:
    network = net(cls=MergedEmbeddingNet)
    own = randomized(network)
    content = {theirs: own[ours] for theirs, ours in mmdet_names(False)}
    change(content)
    torch.save(content, tmp_path / "SAM.pth")
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(error, match=message):
        load_mmdet_checkpoint(tmp_path / "SAM.pth", network)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_mmdet_checkpoint(tmp_path / "no.pth", net())
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match="cannot be read"):
        load_mmdet_checkpoint(tmp_path / "text.pth", net())


# ---- ResNet-18 -------------------------------------------------------------------------------------------------------


def resnet18(base: int = 64) -> State:
    """Shapes and names of torchvision's ResNet-18."""
    generator = torch.Generator().manual_seed(1)
    state: State = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator)

    def norm(name: str, channels: int) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{tensor}"] = torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    conv("conv1", base, 3, 7)
    norm("bn1", base)
    inputs = base
    for layer in range(1, 5):
        width = base * 2 ** (layer - 1)
        for block in range(2):
            name = f"layer{layer}.{block}"
            conv(f"{name}.conv1", width, inputs, 3)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if inputs != width:
                conv(f"{name}.downsample.0", width, inputs, 1)
                norm(f"{name}.downsample.1", width)
            inputs = width
    state["fc.weight"], state["fc.bias"] = torch.randn(1000, inputs, generator=generator), torch.zeros(1000)
    return state


@pytest.mark.parametrize("old", [False, True])
def test_inflated(old: bool, tmp_path: Path) -> None:
    """The RGB axis is the depth of the stem, 1-deep kernels are taken over, 3-deep ones repeated and divided by 3."""
    state = resnet18(8)
    state = {name: t for name, t in state.items() if not (old and "num_batches" in name)}
    encoder = AnisotropicResNet(base_channels=8)
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    torch.save(state, tmp_path / "resnet18.pth")
    inflate_resnet18(tmp_path / "resnet18.pth", encoder)
    after = encoder.state_dict()
    assert after["conv1.weight"].shape == (8, 1, 3, 7, 7)
    assert torch.equal(after["conv1.weight"][:, 0], state["conv1.weight"])
    for name, tensor in after.items():
        if name == "conv1.weight":
            continue
        if name.startswith("layer1.0.downsample") or (old and "num_batches" in name):
            assert torch.equal(tensor, before[name])
        elif re.match(r"layer[34].*conv\d.weight", name):
            assert tensor.shape[2] == 3
            for tap in range(3):
                torch.testing.assert_close(tensor[:, :, tap], state[name] / 3)
        elif tensor.ndim == 5:
            assert torch.equal(tensor[:, :, 0], state[name])
        else:
            assert torch.equal(tensor, state[name])


def test_inflated_kernels_see_a_constant_stack_as_the_plane() -> None:
    """Away from the ends a volume of equal slices gives each layer what a slice gave the 2D layer."""
    state = {name: t.double() for name, t in resnet18(8).items()}
    volume, flat = (AnisotropicResNet(d, base_channels=8).double().eval() for d in (3, 2))
    inflate_resnet18(state, volume)
    inflate_resnet18(state, flat)
    plane = torch.rand(1, 64, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    for name, channels in (("layer2", 8), ("layer3", 16), ("layer4", 32)):
        x = plane[:, :channels]
        stack = getattr(volume, name)(x[:, :, None].expand(-1, -1, 17, -1, -1))
        torch.testing.assert_close(stack[:, :, stack.shape[2] // 2], getattr(flat, name)(x), rtol=1e-9, atol=0)


def test_inflated_in_2d() -> None:
    state = resnet18(8)
    encoder = AnisotropicResNet(2, base_channels=8)
    inflate_resnet18(state, encoder)
    torch.testing.assert_close(encoder.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    grey = torch.rand(1, 1, 20, 22)
    torch.testing.assert_close(
        encoder.conv1(grey),
        F.conv2d(grey.expand(-1, 3, -1, -1), state["conv1.weight"], padding=3),
        atol=1e-4,
        rtol=1e-4,
    )
    assert torch.equal(encoder.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_published_width() -> None:
    state, encoder = resnet18(), AnisotropicResNet()
    inflate_resnet18(state, encoder)
    assert torch.equal(encoder.bn1.weight, state["bn1.weight"])
    assert encoder.conv1.weight.shape == (64, 1, 3, 7, 7)


@pytest.mark.parametrize(
    "encoder, change, error, message",
    [
        ({"in_channels": 3}, {}, ValueError, "one input channel, the encoder has 3"),
        ({"base_channels": 4}, {}, ValueError, "shapes differ"),
        ({"num_blocks": (2, 2, 1, 2)}, {}, KeyError, r"lacks: \['layer3\.1\.conv1\.weight'"),
        ({"num_blocks": (3, 2, 2, 2)}, {}, KeyError, r"it lacks \['layer1\.2\.conv1\.weight'"),
        ({}, {"classifier.weight": torch.ones(1)}, KeyError, "classifier"),
    ],
)
def test_other_encoders_are_refused(encoder: dict[str, Any], change: State, error: Any, message: str) -> None:
    net = AnisotropicResNet(**{"base_channels": 8, **encoder})
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(error, match=message):
        inflate_resnet18({**resnet18(8), **change}, net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
