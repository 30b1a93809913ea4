# SPDX-License-Identifier: Apache-2.0
"""Where in the image a feature is centred, measured: what the anchor of `overlap_theta` says of each encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, SegResNetDS, SwinUNETR, UNet, resnet10, resnet50
from torch import Tensor, nn

from monai_ssl.networks import (
    BasicUNetEncoder,
    DynUNetEncoder,
    ResNetPyramid,
    SegResNetEncoder,
    SwinUNETREncoder,
    UNetEncoder,
)


def swin() -> SwinUNETR:
    return SwinUNETR(1, 2, depths=(2, 2, 2, 2), feature_size=12, use_v2=True, spatial_dims=2)


def segresnet(spatial_dims: int) -> nn.Module:
    return SegResNetDS(spatial_dims, init_filters=16, norm="instance", blocks_down=(1, 2, 2, 4)).encoder


Case = tuple[str, Callable[[], nn.Module], tuple[int, ...], int]  # anchor, encoder, image, map
CASES: dict[str, Case] = {
    "SegResNetDS": ("rf", lambda: segresnet(2), (96, 128), -1),
    "SegResNetDS 3D": ("rf", lambda: segresnet(3), (64, 72, 80), -1),
    "SegResNet": ("rf", lambda: SegResNetEncoder(SegResNet(2, 16, 1, 2, blocks_down=(1, 2, 2, 4))), (96, 128), -1),
    "UNet": ("rf", lambda: UNetEncoder(UNet(2, 1, 2, (16, 32, 64, 64), (2, 2, 2))), (96, 128), -1),
    "UNet residual": (
        "rf", lambda: UNetEncoder(UNet(2, 1, 2, (16, 32, 64, 64), (2, 2, 2), num_res_units=2)), (96, 128), -1,
    ),
    "DynUNet": (
        "rf",
        lambda: DynUNetEncoder(DynUNet(2, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[16, 32, 64, 64])),
        (96, 128),
        -1,
    ),
    "ResNet": ("rf", lambda: ResNetPyramid(resnet10(spatial_dims=2, n_input_channels=1)), (192, 256), -1),
    "ResNet of PGL": (
        "rf",
        lambda: ResNetPyramid(
            resnet50(
                spatial_dims=2, n_input_channels=1, conv1_t_stride=2, no_max_pool=True, bias_downsample=False,
                feed_forward=False, widen_factor=0.25,
            )
        ),
        (192, 256),
        -1,
    ),
    "BasicUNet": ("cell", lambda: BasicUNetEncoder(BasicUNet(2, 1, 2, features=(16,) * 6)), (192, 256), -1),
    "swinViT": ("cell", lambda: swin().swinViT, (192, 256), -1),
    "swinViT, fourth map": ("cell", lambda: swin().swinViT, (192, 256), -2),
    "SwinUNETR": ("cell", lambda: SwinUNETREncoder(swin()), (192, 256), -1),
}  # fmt: skip


def measured_centre(encoder: nn.Module, size: tuple[int, ...], level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the middle feature, its output stride, and the centroid of its squared input gradient, in voxels."""
    centroids = []
    for seed in range(8 if len(size) == 2 else 3):
        torch.manual_seed(seed)
        image = torch.randn(1, 1, *size, requires_grad=True)
        features = encoder(image)[level][0]
        middle = [f // 2 for f in features.shape[1:]]
        mix = torch.randn(len(features)) @ features[(slice(None), *middle)]
        weight = torch.autograd.grad(mix, image)[0][0, 0].square()
        places = torch.stack(torch.meshgrid(*(torch.arange(float(s)) for s in size), indexing="ij"))
        centroids.append((places * weight).flatten(1).sum(1) / weight.sum())
    stride = torch.tensor([s / f for s, f in zip(size, features.shape[1:])])
    return torch.tensor(middle), stride, torch.stack(centroids).mean(0)


@pytest.mark.parametrize("anchor, build, size, level", CASES.values(), ids=CASES)
def test_centre_of_the_middle_feature(
    anchor: str, build: Callable[[], nn.Module], size: tuple[int, ...], level: int
) -> None:
    torch.manual_seed(1)
    index, stride, centre = measured_centre(build().eval(), size, level)
    places = {"rf": stride * index, "cell": stride * index + (stride - 1) / 2}
    assert ((centre - places.pop(anchor)).abs() < stride / 8).all(), centre
    assert ((centre - places.popitem()[1]).abs() > stride / 3).all()  # and not the other one
