# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from monai.networks.nets import (
    UNETR,
    BasicUNet,
    DynUNet,
    FlexibleUNet,
    SegResNet,
    SegResNetDS,
    SwinUNETR,
    UNet,
    ViT,
    resnet10,
    resnet18,
    resnet50,
)
from monai.networks.nets.resnet import ResNetFeatures
from monai.networks.nets.unet import CheckpointUNet
from torch import nn

from monai_ssl.networks import (
    BasicUNetEncoder,
    DynUNetEncoder,
    ResNetPyramid,
    SegResNetEncoder,
    SwinUNETREncoder,
    UNetEncoder,
    ViTEncoder,
    encoder_channels,
    encoders,
    load_pretrained,
    save_pretrained,
)


@dataclass
class Case:
    """One adapter: how to build its network, and what is known of its maps without running it."""

    adapter: type[nn.Module]
    build: Callable[[int, int], nn.Module]  # spatial_dims, in_channels
    size: tuple[int, int, int]  # in 2D the last two
    strides: list[int | tuple[int, int, int]]
    channels: list[int]
    maps: list[str]  # modules of the network whose output is the map
    rest: list[str]  # what the encoder leaves out
    export: str = "script"


def unet(units: int) -> Callable[[int, int], nn.Module]:
    def build(n: int, c: int) -> nn.Module:
        strides = [2, (1, 2, 2)[-n:]]
        return UNet(n, c, 2, channels=(4, 8, 12), strides=strides, num_res_units=units)

    return build


def dynunet(n: int, c: int) -> nn.Module:
    return DynUNet(n, c, 2, [3, 3, 3], [1, 2, (1, 2, 2)[-n:]], [2, (1, 2, 2)[-n:]], filters=[4, 6, 8])


def segresnet(n: int, c: int) -> nn.Module:
    return SegResNet(n, 8, c, 2, blocks_down=(1, 1, 2), blocks_up=(1, 1), dropout_prob=0.2)


def vit(classification: bool) -> Callable[[int, int], nn.Module]:
    def build(n: int, c: int) -> nn.Module:
        proj = "perceptron" if classification else "conv"
        args = {"proj_type": proj, "classification": classification, "spatial_dims": n}
        return ViT(c, (8, 24, 16)[-n:], (4, 8, 4)[-n:], 24, 32, 2, 3, **args)

    return build


UNET_MAPS = ["model.0", "model.1.submodule.0", "model.1.submodule.1.submodule"]
UNET_REST = ["model.2", "model.1.submodule.2"]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
CASES = {
    "UNet": Case(UNetEncoder, unet(0), (8, 12, 16), [2, (2, 4, 4), (2, 4, 4)], [4, 8, 12], UNET_MAPS, UNET_REST),
    "UNet residual": Case(
        UNetEncoder, unet(2), (8, 12, 16), [2, (2, 4, 4), (2, 4, 4)], [4, 8, 12], UNET_MAPS, UNET_REST
    ),
    "BasicUNet": Case(
        BasicUNetEncoder,
        lambda n, c: BasicUNet(n, c, 2, features=(4, 5, 6, 7, 8, 4)),
        (16, 32, 48),
        [1, 2, 4, 8, 16],
        [4, 5, 6, 7, 8],
        ["conv_0", "down_1", "down_2", "down_3", "down_4"],
        ["upcat_4", "upcat_3", "upcat_2", "upcat_1", "final_conv"],
    ),
    "DynUNet": Case(
        DynUNetEncoder,
        dynunet,
        (8, 12, 16),
        [1, 2, (2, 4, 4)],
        [4, 6, 8],
        ["input_block", "downsamples.0", "bottleneck"],
        ["upsamples", "output_block", "skip_layers.upsample", "skip_layers.next_layer.upsample"],
    ),
    "SegResNet": Case(
        SegResNetEncoder,
        segresnet,
        (8, 12, 16),
        [1, 2, 4],
        [8, 16, 32],
        ["down_layers.0", "down_layers.1", "down_layers.2"],
        ["up_layers", "up_samples", "conv_final"],
    ),
    "ResNet": Case(
        ResNetPyramid,
        lambda n, c: resnet10(spatial_dims=n, n_input_channels=c, shortcut_type="B", widen_factor=0.125),
        (16, 32, 48),
        [1, 2, 4, 8, 16],
        [8, 8, 16, 32, 64],
        ["act", *LAYERS],
        ["fc"],
    ),
    "ResNet bottleneck": Case(
        ResNetPyramid,
        lambda n, c: resnet50(spatial_dims=n, n_input_channels=c, widen_factor=0.0625, no_max_pool=True),
        (8, 16, 24),
        [1, 1, 2, 4, 8],
        [4, 16, 32, 64, 128],
        ["act", *LAYERS],
        ["fc"],
    ),
    "ViT": Case(ViTEncoder, vit(False), (8, 24, 16), [(4, 8, 4)], [24], ["norm"], []),
    "ViT class token": Case(ViTEncoder, vit(True), (8, 24, 16), [(4, 8, 4)], [24], ["norm"], ["classification_head"]),
    "SwinUNETR": Case(
        SwinUNETREncoder,
        lambda n, c: SwinUNETR(c, 2, depths=(1, 1, 1, 1), feature_size=12, use_v2=True, spatial_dims=n),
        (32, 32, 64),
        [1, 2, 4, 8, 32],
        [12, 12, 24, 48, 192],
        ["encoder1", "encoder2", "encoder3", "encoder4", "encoder10"],
        ["decoder1", "decoder2", "decoder3", "decoder4", "decoder5", "out"],
        export="trace",
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dims = pytest.mark.parametrize("n", [2, 3], ids=["2D", "3D"])


def image(case: Case, n: int, channels: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, *case.size[-n:])


def expected_shapes(case: Case, n: int, batch: int = 2) -> list[tuple[int, ...]]:
    strides = [s if isinstance(s, tuple) else (s,) * 3 for s in case.strides]
    return [
        (batch, c, *(size // step for size, step in zip(case.size[-n:], stride[-n:])))
        for c, stride in zip(case.channels, strides)
    ]


def test_every_public_adapter_has_a_case() -> None:
    assert {case.adapter.__name__ for case in CASES.values()} == set(encoders.__all__)


@cases
@dims
@pytest.mark.parametrize("channels", [1, 3])
def test_list_of_maps_finest_first(case: Case, n: int, channels: int) -> None:
    encoder = case.adapter(case.build(n, channels)).eval()
    with torch.no_grad():
        maps = encoder(image(case, n, channels))
    assert isinstance(maps, list)
    assert [tuple(m.shape) for m in maps] == expected_shapes(case, n)
    assert encoder.channels == case.channels
    voxels = [m[0, 0].numel() for m in maps]
    assert voxels == sorted(voxels, reverse=True)


@cases
@dims
def test_keys_and_tensors_are_the_networks_own(case: Case, n: int, tmp_path) -> None:
    net = case.build(n, 1)
    encoder = case.adapter(net)
    own, part = net.state_dict(keep_vars=True), encoder.state_dict(keep_vars=True)
    assert part
    assert all(own[name] is tensor for name, tensor in part.items())

    other = case.build(n, 1)
    result = other.load_state_dict(encoder.state_dict(), strict=False)
    assert not result.unexpected_keys
    names = other.state_dict(keep_vars=True)
    loaded = {id(names[name]) for name in part}  # DynUNet has the same tensors once more as skip_layers
    left = [name for name in result.missing_keys if id(names[name]) not in loaded]
    assert {rest for rest in case.rest if any(name.startswith(rest + ".") for name in left)} == set(case.rest)
    assert [name for name in left if not name.startswith(tuple(rest + "." for rest in case.rest))] == []

    filled = case.build(n, 1)
    file = save_pretrained(encoder, tmp_path / "encoder.pt", {"method": "test"})
    report = load_pretrained(case.adapter(filled), file)
    assert len(report.loaded) == len(part)
    x = image(case, n)
    with torch.no_grad():
        for a, b in zip(encoder.eval()(x), case.adapter(filled).eval()(x)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@cases
@dims
def test_maps_are_those_inside_the_network(case: Case, n: int) -> None:
    """Hooks in the network's own forward see the maps, bit for bit; wrapping does not change the network."""
    net, x = case.build(n, 1).eval(), image(case, n)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        before = net(x)
        maps = case.adapter(net)(x)
        for name in case.maps:

            def keep(module: nn.Module, args: tuple, out: torch.Tensor, name: str = name) -> None:
                seen.setdefault(name, out.clone())  # at once, in case a later layer writes in place

            net.get_submodule(name).register_forward_hook(keep)
        after = net(x)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for name, m in zip(case.maps, maps):
        reference = seen[name]
        if case.adapter is ViTEncoder:  # tokens (B, [class +] patches, C) in C order of the grid
            tokens = reference[:, -m[0, 0].numel() :]
            reference = tokens.transpose(1, 2).unflatten(2, m.shape[2:])
        torch.testing.assert_close(m, reference, rtol=0, atol=0)


@cases
@dims
def test_every_parameter_gets_a_gradient(case: Case, n: int) -> None:
    encoder = case.adapter(case.build(n, 1)).train()
    sum(m.square().mean() for m in encoder(image(case, n))).backward()
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert [name for name in trained if encoder.get_parameter(name).grad is None] == []  # or DDP would wait for it
    assert len(trained) == len(list(encoder.parameters())) or case.adapter is ViTEncoder


@cases
def test_export_as_declared(case: Case) -> None:
    encoder, x = case.adapter(case.build(3, 1)).eval(), image(case, 3)
    if case.export == "script":
        exported = torch.jit.script(encoder)
    else:
        # after a first failure in the same process torch says RuntimeError, that the method is there already
        with pytest.raises((torch.jit.frontend.NotSupportedError, RuntimeError)):
            torch.jit.script(encoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's shape arithmetic, constant for one input size
            exported = torch.jit.trace(encoder, x, check_trace=False)
    with torch.no_grad():
        for a, b in zip(exported(x), encoder(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@cases
def test_wrong_network_is_named(case: Case) -> None:
    with pytest.raises(TypeError, match=rf"{case.adapter.__name__} adapts monai\S+, got torch\S*\.Linear"):
        case.adapter(nn.Linear(2, 2))


def test_checkpoint_unet_is_refused() -> None:
    with pytest.raises(TypeError, match="CheckpointUNet"):
        UNetEncoder(CheckpointUNet(2, 1, 2, (4, 8), (2,)))


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("UNet", (2, 4, 4), "too small"),
        ("BasicUNet", (8, 32, 32), "too small"),
        ("BasicUNet", (16, 16, 16), "too small"),
        ("DynUNet", (2, 3, 4), "too small"),
        ("SwinUNETR", (32, 32, 32), "too small"),
        ("SwinUNETR", (32, 48, 64), "multiple of the stride"),
        ("ViT", (8, 20, 16), "multiple of the stride"),
        ("ViT", (8, 24, 32), "48 patches .* has 24 positions"),
        ("SegResNet", (8, 12), "3 spatial axes"),
    ],
)
def test_sizes_that_fail_say_so(name: str, size: tuple[int, ...], message: str) -> None:
    case = CASES[name]
    encoder = case.adapter(case.build(3, 1)).eval()
    with pytest.raises(ValueError, match=message) as error:
        encoder(torch.rand(1, 1, *size))
    assert str((1, 1, *size)) in str(error.value)


@pytest.mark.parametrize("name, size", [("UNet", (3, 5, 7)), ("BasicUNet", (17, 37, 35)), ("SegResNet", (3, 5, 7))])
def test_odd_sizes_pass_where_the_encoder_has_a_map_for_them(name: str, size: tuple[int, ...]) -> None:
    encoder = CASES[name].adapter(CASES[name].build(3, 1)).eval()
    with torch.no_grad():
        assert len(encoder(torch.rand(1, 1, *size))) == len(CASES[name].channels)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def swin48() -> SwinUNETR:
    return SwinUNETR(in_channels=1, out_channels=2, feature_size=48, use_v2=True)


def test_swin_unetr_counts(swin48: SwinUNETR) -> None:
    encoder = SwinUNETREncoder(swin48)
    assert (len(encoder.state_dict()), len(swin48.state_dict())) == (145, 167)
    assert (count(encoder), count(swin48)) == (53_164_146, 72_762_068)
    assert sum(encoder.channels) == 1152
    missing = {name.split(".")[0] for name in swin48.state_dict() if name not in encoder.state_dict()}
    assert missing == {"decoder1", "decoder2", "decoder3", "decoder4", "decoder5", "out"}
    assert count(swin48.swinViT) == 18_637_362
    assert encoder_channels(swin48.swinViT, 1, (32, 32, 32)) == [48, 96, 192, 384, 768]  # 1488 together


@pytest.mark.parametrize("feature_size, total", [(12, 288), (24, 576)])
def test_swin_unetr_channels_grow_with_feature_size(feature_size: int, total: int) -> None:
    one = SwinUNETREncoder(SwinUNETR(1, 2, feature_size=feature_size, use_v2=True))
    two = SwinUNETREncoder(SwinUNETR(2, 2, feature_size=feature_size, use_v2=True))
    assert sum(one.channels) == sum(two.channels) == total
    assert count(two) - count(one) == 1_728 * feature_size // 48


def test_published_sizes() -> None:
    assert sum(UNetEncoder(UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2))).channels) == 496
    segresnet = SegResNetEncoder(SegResNet(3, 16, 1, 2, blocks_down=(1, 2, 2, 4)))
    assert (sum(segresnet.channels), count(segresnet)) == (240, 4_399_344)
    with torch.device("meta"):  # shapes without memory
        pgl = ResNetPyramid(
            resnet50(
                spatial_dims=3,
                n_input_channels=1,
                conv1_t_stride=(1, 2, 2),
                no_max_pool=True,
                feed_forward=False,
                bias_downsample=False,
            )
        )
        assert count(pgl) == 46_155_072
        assert pgl(torch.empty(1, 1, 16, 96, 96))[-1].shape == (1, 2048, 2, 6, 6)


def test_resnet_pyramid_equals_monais_features() -> None:
    """Shortcut type A, which the pretrained resnet18 has; its function attribute cannot be scripted by MONAI either."""
    reference = ResNetFeatures("resnet18", pretrained=False).eval()
    net = resnet18(n_input_channels=1, conv1_t_stride=2, feed_forward=False, shortcut_type="A").eval()
    net.load_state_dict(reference.state_dict())
    encoder, x = ResNetPyramid(net), torch.rand(1, 1, 32, 48, 33)
    assert encoder.channels == [64, 64, 128, 256, 512]
    assert list(encoder.state_dict()) == list(reference.state_dict())
    with torch.no_grad():
        for a, b in zip(encoder(x), reference(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_vit_encoder_fills_unetr() -> None:
    net = UNETR(1, 2, img_size=(16, 32, 48), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=3)
    encoder = ViTEncoder(net.vit)
    assert list(encoder.state_dict()) == list(net.vit.state_dict())
    assert encoder(torch.rand(1, 1, 16, 32, 48))[0].shape == (1, 24, 1, 2, 3)


@pytest.mark.parametrize(
    "encoder, expected",
    [
        (SegResNetDS(init_filters=8, blocks_down=(1, 1, 1)).encoder, [8, 16, 32]),
        (FlexibleUNet(1, 2, "resnet10", spatial_dims=3).encoder, [64, 64, 128, 256, 512]),
        (UNetEncoder(unet(2)(3, 1)), [4, 8, 12]),
    ],
    ids=["SegResNetDS", "FlexibleUNet", "UNetEncoder"],
)
def test_encoder_channels_leaves_the_encoder_as_it_was(encoder: nn.Module, expected: list[int]) -> None:
    encoder.train()
    frozen = next(encoder.children()).eval()  # a part in another mode
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    assert encoder_channels(encoder, 1, (32, 48, 64)) == expected
    assert encoder.training
    assert not frozen.training
    assert [m.training for m in list(encoder.children())[1:]] == [True] * (len(list(encoder.children())) - 1)
    for name, t in encoder.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)


def test_segresnet_keeps_its_dropout() -> None:
    encoder, x = SegResNetEncoder(segresnet(3, 1)), torch.rand(1, 1, 8, 12, 16)
    assert not torch.equal(encoder.train()(x)[0], encoder(x)[0])
    assert torch.equal(encoder.eval()(x)[0], encoder(x)[0])
