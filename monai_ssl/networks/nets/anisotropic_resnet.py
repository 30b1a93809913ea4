# SPDX-License-Identifier: Apache-2.0
"""A ResNet for views that are short along their first axis: there it strides less and has smaller kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Conv, Norm, Pool
from torch import nn

__all__ = ["AnisotropicResNet"]

LAYERS = 4
# of the first axis in 3D, by layer: kernel of the convolutions, stride of the first block
FIRST_KERNELS, FIRST_STRIDES = (1, 1, 3, 3), (1, 1, 1, 2)


class AnisotropicResNet(nn.Module):
    """Four maps, finest first; along the first axis of a 3D view with smaller strides, and kernels of depth 1 at first.

    Source: the backbone of SAM (arXiv 2012.02383) in its released code, a ResNet-18 without pooling after the stem. In
    2D it is the same without the first axis. MONAI's ``ResNet`` has one kernel and one stride for all axes.
    ``channels`` has the channels of the maps, ``strides`` their strides along each axis. Kaiming initialisation.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        base_channels: b; the maps have b, 2 b, 4 b and 8 b channels.
        num_blocks: basic blocks of the four layers.

    Shapes:
        ``(B, in_channels, *spatial)`` -> ``(B, channels[i], *spatial / strides[i])``, strides (2, 2, 2), (2, 4, 4),
        (2, 8, 8) and (4, 16, 16), in 2D 2, 4, 8 and 16. Sizes that are no multiples are rounded up, except along the
        first axis in 3D, whose pooling rounds down.

    Raises:
        ValueError: ``spatial_dims`` other than 2 or 3, or not four positive numbers of blocks.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        base_channels: int = 64,
        num_blocks: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if len(num_blocks) != LAYERS or min(num_blocks) < 1:
            raise ValueError(f"num_blocks must be four positive numbers, got {tuple(num_blocks)}")
        per_axis = lambda first, others: (first, others, others)[-spatial_dims:]
        self.spatial_dims = spatial_dims
        self.channels = [base_channels * 2**i for i in range(LAYERS)]
        self.conv1 = _conv(in_channels, base_channels, per_axis(3, 7), per_axis(1, 1))
        self.bn1 = Norm[Norm.BATCH, spatial_dims](base_channels)
        self.act = nn.ReLU(inplace=True)
        layers = []
        inputs = base_channels
        for width, blocks, kernel, stride in zip(self.channels, num_blocks, FIRST_KERNELS, FIRST_STRIDES):
            first = _Block(inputs, width, per_axis(kernel, 3), per_axis(stride, 2))
            others = [_Block(width, width, per_axis(kernel, 3), per_axis(1, 1)) for _ in range(blocks - 1)]
            layers.append(nn.Sequential(first, *others))
            inputs = width
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        pool = (2, 1, 1)
        self.pool = Pool[Pool.MAX, 3](pool, pool) if spatial_dims == 3 else nn.Identity()
        self.strides = [per_axis(2 if i < LAYERS - 1 else 4, 2 ** (i + 1)) for i in range(LAYERS)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The four maps of an image."""
        stem = self.act(self.bn1(self.conv1(x)))
        x1 = self.pool(self.layer1(stem))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return [x1, x2, x3, self.layer4(x3)]


class _Block(nn.Module):
    """Two convolutions, the first with the stride, and a shortcut."""

    def __init__(self, inputs: int, width: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        norm = Norm[Norm.BATCH, len(kernel)]
        self.conv1, self.bn1 = _conv(inputs, width, kernel, stride), norm(width)
        self.conv2, self.bn2 = _conv(width, width, kernel, (1,) * len(kernel)), norm(width)
        self.act = nn.ReLU(inplace=True)
        if inputs != width or max(stride) > 1:
            self.downsample: nn.Module = nn.Sequential(_conv(inputs, width, (1,) * len(kernel), stride), norm(width))
        else:
            self.downsample = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.downsample(x))


def _conv(inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> nn.Module:
    padding = tuple(k // 2 for k in kernel)
    conv = Conv[Conv.CONV, len(kernel)](inputs, outputs, tuple(kernel), tuple(stride), padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
