# SPDX-License-Identifier: Apache-2.0
"""MONAI networks as encoders: ``encoder(x) -> list[Tensor]``, finest map first.

Every adapter takes over the modules of the network that it is given, under the names they have there, and leaves the
decoder out. Training the adapter trains the network, and its state dict is the encoder part of the network's own.
``SwinUNETR.swinViT``, ``SegResNetDS.encoder``, ``ResNetFeatures`` and ``FlexibleUNet.encoder`` need no adapter.

All adapters share: the argument ``net`` (a ``TypeError`` names any other class), the attribute ``channels`` (of each
map, finest first), and a ``ValueError`` for an input that is too small or that the network would crop.
"""

from __future__ import annotations

from math import prod

import torch
from monai.networks.blocks.activation_checkpointing import ActivationCheckpointWrapper
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet, ViT
from monai.networks.nets.resnet import ResNet
from monai.utils import ensure_tuple_rep
from torch import nn

from .encoder_adapter import EncoderAdapter

__all__ = [
    "BasicUNetEncoder",
    "DynUNetEncoder",
    "ResNetPyramid",
    "SegResNetEncoder",
    "SwinUNETREncoder",
    "UNetEncoder",
    "ViTEncoder",
]


class _UNetLevel(nn.Module):
    """``Sequential(down, SkipConnection(submodule), up)`` of a UNet without ``up``; children keep the names 0 and 1."""

    def __init__(self, level: nn.Sequential) -> None:
        super().__init__()
        below = level[1].submodule
        self.add_module("0", level[0])
        # MONAI's blocks are subclasses of Sequential, a level is one itself
        self.add_module("1", _UNetBelow(_UNetLevel(below)) if type(below) is nn.Sequential else _UNetBottom(below))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = getattr(self, "0")(x)
        return [y] + getattr(self, "1")(y)


class _UNetBelow(nn.Module):
    """The place of a SkipConnection around the next level."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.submodule(x)


class _UNetBottom(_UNetBelow):
    """The place of the SkipConnection around the bottom block."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.submodule(x)]


class UNetEncoder(EncoderAdapter):
    """Down path and bottom block of ``UNet``: ``net.channels``; strides accumulate, the bottom adds none."""

    adapts = UNet

    def __init__(self, net: UNet) -> None:
        super().__init__(net)
        if any(isinstance(m, ActivationCheckpointWrapper) for m in net.modules()):
            raise TypeError("UNetEncoder adapts monai.networks.nets.UNet, got CheckpointUNet, which has other keys")
        self.model = _UNetLevel(net.model)
        strides = [ensure_tuple_rep(s, net.dimensions) for s in net.strides[: len(net.channels) - 1]]
        self._describe(net.channels, [prod(s) for s in zip(*strides)])

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.model(x)


class BasicUNetEncoder(EncoderAdapter):
    """``conv_0`` and ``down_1`` to ``down_4`` of ``BasicUNet``: strides 1, 2, 4, 8, 16."""

    adapts = BasicUNet

    def __init__(self, net: BasicUNet) -> None:
        super().__init__(net)
        self.conv_0 = net.conv_0
        self.down_1, self.down_2, self.down_3, self.down_4 = net.down_1, net.down_2, net.down_3, net.down_4
        blocks = [net.conv_0, *(down.convs for down in (net.down_1, net.down_2, net.down_3, net.down_4))]
        self._describe([b.conv_1.conv.out_channels for b in blocks], (16,) * (net.final_conv.weight.ndim - 2))

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x0 = self.conv_0(x)
        x1 = self.down_1(x0)
        x2 = self.down_2(x1)
        x3 = self.down_3(x2)
        return [x0, x1, x2, x3, self.down_4(x3)]

    def _coarsest(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n // 16 for n in size)  # max pooling rounds down


class DynUNetEncoder(EncoderAdapter):
    """``input_block``, ``downsamples`` and ``bottleneck`` of ``DynUNet``, one map each, ``net.filters`` channels.

    ``DynUNet`` lists the same tensors once more under ``skip_layers``; the encoder has them under the first names only.
    """

    adapts = DynUNet

    def __init__(self, net: DynUNet) -> None:
        super().__init__(net)
        self.input_block, self.downsamples, self.bottleneck = net.input_block, net.downsamples, net.bottleneck
        self._describe(
            net.filters, [prod(s) for s in zip(*(ensure_tuple_rep(s, net.spatial_dims) for s in net.strides))]
        )

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.input_block(x)
        maps = [x]
        for down in self.downsamples:
            x = down(x)
            maps.append(x)
        return maps + [self.bottleneck(x)]


class SegResNetEncoder(EncoderAdapter):
    """``convInit`` and ``down_layers`` of ``SegResNet``: strides s = 1, 2, 4, .., channels s times ``init_filters``."""

    adapts = SegResNet

    def __init__(self, net: SegResNet) -> None:
        super().__init__(net)
        self.convInit, self.down_layers = net.convInit, net.down_layers
        self.dropout = net.dropout if net.dropout_prob is not None else nn.Identity()
        factors = [2**i for i in range(len(net.blocks_down))]
        self._describe([net.init_filters * f for f in factors], (factors[-1],) * net.spatial_dims)

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.dropout(self.convInit(x))
        maps: list[torch.Tensor] = []
        for down in self.down_layers:
            x = down(x)
            maps.append(x)
        return maps


class ResNetPyramid(EncoderAdapter):
    """``ResNet`` without pooling and ``fc``: the stem before its max pooling, then ``layer1`` to ``layer4``.

    The same five maps as MONAI's ``ResNetFeatures``, for a ResNet of any options; scriptable with shortcut type B.
    """

    adapts = ResNet

    def __init__(self, net: ResNet) -> None:
        super().__init__(net)
        self.conv1, self.bn1, self.act = net.conv1, net.bn1, net.act
        self.maxpool = nn.Identity() if net.no_max_pool else net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        last = [layer[-1] for layer in (net.layer1, net.layer2, net.layer3, net.layer4)]
        widths = [(block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels for block in last]
        self._describe(
            [net.conv1.out_channels, *widths], [s * (8 if net.no_max_pool else 16) for s in net.conv1.stride]
        )

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        stem = self.act(self.bn1(self.conv1(x)))
        x1 = self.layer1(self.maxpool(stem))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return [stem, x1, x2, x3, self.layer4(x3)]


class SwinUNETREncoder(EncoderAdapter):
    """``swinViT`` and the five convolutional encoder blocks of ``SwinUNETR`` (the encoder of VoCo, arXiv 2402.17300).

    Maps encoder1(x), encoder2(h[0]), encoder3(h[1]), encoder4(h[2]), encoder10(h[4]) with h = swinViT(x): strides
    1, 2, 4, 8, 32 and f, f, 2f, 4f, 16f channels. Can be traced, not scripted.
    """

    adapts = SwinUNETR
    multiple_only = True

    def __init__(self, net: SwinUNETR) -> None:
        super().__init__(net)
        self.swinViT, self.normalize = net.swinViT, net.normalize
        self.encoder1, self.encoder2, self.encoder3 = net.encoder1, net.encoder2, net.encoder3
        self.encoder4, self.encoder10 = net.encoder4, net.encoder10
        self._describe([net.swinViT.embed_dim * k for k in (1, 1, 2, 4, 16)], [p**5 for p in net.swinViT.patch_size])

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        h = self.swinViT(x, self.normalize)
        return [self.encoder1(x), self.encoder2(h[0]), self.encoder3(h[1]), self.encoder4(h[2]), self.encoder10(h[4])]


class ViTEncoder(EncoderAdapter):
    """``ViT`` without its classification head: one map, the normalised patch tokens ``(B, hidden_size, *grid)``."""

    adapts = ViT
    multiple_only = True

    def __init__(self, net: ViT) -> None:
        super().__init__(net)
        self.patch_embedding, self.blocks, self.norm = net.patch_embedding, net.blocks, net.norm
        self.cls_token = getattr(net, "cls_token", None)
        self._patches = int(net.patch_embedding.n_patches)
        for block in net.blocks:
            if not block.with_cross_attention:  # then MONAI's block never calls this norm, and DDP would wait for it
                block.norm_cross_attn.requires_grad_(False)
        embed = net.patch_embedding.patch_embeddings
        if isinstance(embed, nn.Sequential):  # "perceptron": einops' Rearrange, which knows the patch as p1, p2, ..
            lengths = embed[0].axes_lengths
            patch = [lengths[name] for name in sorted(lengths)]
        else:
            patch = list(embed.kernel_size)
        self._describe([net.norm.normalized_shape[0]], patch)

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        grid = [x.shape[axis + 2] // self._stride[axis] for axis in range(len(self._stride))]
        x = self.patch_embedding(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, -self._patches :]  # the class token comes first
        return [x.transpose(1, 2).reshape([x.shape[0], x.shape[2]] + grid)]

    @torch.jit.unused
    def _check_size(self, shape: tuple[int, ...]) -> None:
        super()._check_size(shape)
        patches, expected = prod(self._coarsest(shape[2:])), self._patches
        if patches != expected:
            raise ValueError(
                f"input {shape} makes {patches} patches of {self._stride}; this ViT has {expected} positions"
            )
