# SPDX-License-Identifier: Apache-2.0
"""The stages of a U-Net, and its map after some of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from monai.networks.blocks.activation_checkpointing import ActivationCheckpointWrapper
from monai.networks.nets import BasicUNet, UNet
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from .provenance import read_provenance

__all__ = ["UNetFeatures", "UNetStages", "decode", "encode", "total_stride", "trained_blocks", "trained_prefixes",
           "unet_features", "unet_stages"]  # fmt: skip


class UNetStages(NamedTuple):
    """Dotted names of the submodules of a U-Net, which together hold every tensor of it once."""

    encoder: tuple[str, ...]  # finest first, the bottleneck last
    decoder: tuple[str, ...]  # deepest block first
    head: tuple[str, ...]  # what remains


def unet_stages(network: nn.Module) -> UNetStages:
    """Where the encoder, the decoder and the head of a ``UNet`` of any depth or a ``BasicUNet`` are.

    Source: the stages that are pretrained one after the other in arXiv 2006.10511. The last decoder block of ``UNet``
    yields the logits, it has no head; ``BasicUNet`` has ``final_conv``.

    Args:
        network: ``monai.networks.nets.UNet`` or ``BasicUNet``.

    Raises:
        TypeError: another network, which is named.
    """
    checkpointed = any(isinstance(m, ActivationCheckpointWrapper) for m in network.modules())
    if isinstance(network, BasicUNet):
        encoder = ("conv_0", "down_1", "down_2", "down_3", "down_4")
        return UNetStages(encoder, ("upcat_4", "upcat_3", "upcat_2", "upcat_1"), ("final_conv",))
    if not isinstance(network, UNet) or checkpointed:
        got = f"{type(network).__module__}.{type(network).__qualname__}"
        raise TypeError(f"expected monai.networks.nets.UNet or monai.networks.nets.BasicUNet, got {got}")
    down, up, level = [], [], "model"
    # a level is a Sequential(down, SkipConnection(submodule), up), the bottom a block, which is a subclass of it
    while type(network.get_submodule(level)) is nn.Sequential:
        down.append(f"{level}.0")
        up.append(f"{level}.2")
        level = f"{level}.1.submodule"
    return UNetStages((*down, level), tuple(reversed(up)), ())


def total_stride(network: UNet | BasicUNet) -> tuple[int, ...]:
    """Voxels of the image per cell of the bottleneck, along each axis."""
    if isinstance(network, BasicUNet):
        return (16,) * (network.final_conv.weight.ndim - 2)
    strides = [ensure_tuple_rep(s, network.dimensions) for s in network.strides[: len(network.channels) - 1]]
    return tuple(int(prod(s)) for s in zip(*strides))


def check_plane_size(network: UNet | BasicUNet, plane_size: int | Sequence[int]) -> None:
    """Raise a ValueError unless images of this size fit the network.

    Args:
        network: see :func:`unet_stages`.
        plane_size: voxels of the image, one number or one per axis.
    """
    stride = total_stride(network)
    size = ensure_tuple_rep(plane_size, len(stride))
    if any(n < s or n % s for n, s in zip(size, stride)):
        raise ValueError(f"plane_size {size} must be a multiple of the network's total stride {stride}")


def unet_features(network: nn.Module, x: Tensor, num_decoder_blocks: int = 0) -> Tensor:
    """The map after a number of decoder blocks of a U-Net, as the network itself computes it.

    Source: arXiv 2006.10511, whose local loss is taken on the map after l blocks.

    Args:
        network: see :func:`unet_stages`.
        x: image, (N, C, *spatial).
        num_decoder_blocks: l; 0 gives the bottleneck, all of them the logits of a ``UNet``, and of a ``BasicUNet`` what
            its ``final_conv`` takes.

    Returns:
        (N, channels, *spatial / stride).

    Raises:
        TypeError: see :func:`unet_stages`.
        ValueError: there are not so many blocks.
    """
    check_blocks(network, num_decoder_blocks)
    return decode(network, encode(network, x), num_decoder_blocks)


def encode(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The map of every encoder stage, finest first."""
    maps = []
    for name in unet_stages(network).encoder:
        x = network.get_submodule(name)(x)
        maps.append(x)
    return maps


def decode(network: nn.Module, maps: Sequence[Tensor], num_decoder_blocks: int) -> Tensor:
    """The map after the first decoder blocks, from the maps of the encoder."""
    x = maps[-1]
    for name, skip in zip(unet_stages(network).decoder[:num_decoder_blocks], maps[-2::-1]):
        block = network.get_submodule(name)
        # the channels of the skip come first in both networks
        x = block(x, skip) if isinstance(network, BasicUNet) else block(torch.cat([skip, x], 1))
    return x


def trained_prefixes(network: nn.Module, num_decoder_blocks: int) -> list[str]:
    """What the names of the tensors begin with that the map after some decoder blocks depends on.

    Args:
        network: see :func:`unet_stages`.
        num_decoder_blocks: see :func:`unet_features`.

    Returns:
        one name per encoder stage and block, each with a dot at its end.

    Raises:
        TypeError: see :func:`unet_stages`.
        ValueError: there are not so many blocks.
    """
    check_blocks(network, num_decoder_blocks)
    stages = unet_stages(network)
    return [f"{name}." for name in stages.encoder + stages.decoder[:num_decoder_blocks]]


def trained_blocks(file: str | Path) -> int:
    """How many decoder blocks a file of stage 1 (none) or 2 of the bundle ``global_local_unet_mr`` holds.

    Args:
        file: written by ``save_pretrained`` with "num_decoder_blocks" among the "settings" of its provenance.

    Raises:
        OSError: no such file.
        ValueError: the file says nothing about its stage, or cannot be read.
    """
    blocks = ((read_provenance(file) or {}).get("settings") or {}).get("num_decoder_blocks")
    if not isinstance(blocks, int):
        raise ValueError(
            f"{file} does not say how many decoder blocks were trained: give unet_encoder.pt or unet_decoder.pt of "
            "stage 1 or 2, or fill the network with load_pretrained"
        )
    return blocks


def check_blocks(network: nn.Module, num_decoder_blocks: int, most: int | None = None) -> None:
    """Raise unless the number is between 0 and ``most``, by default that of all decoder blocks."""
    most = len(unet_stages(network).decoder) if most is None else most
    if not 0 <= num_decoder_blocks <= most:
        raise ValueError(
            f"num_decoder_blocks must be between 0 and {most} for this {type(network).__name__}, got "
            f"{num_decoder_blocks}"
        )


class UNetFeatures(nn.Module):
    """One map of a U-Net as a network: the ``network_def`` of the bundles that pretrain a U-Net in stages.

    Source: arXiv 2006.10511. Can be traced, not scripted.

    Args:
        network: ``UNet`` or ``BasicUNet``; kept whole as the attribute ``network``, not copied, so that the state dict
            is that of the complete network.
        num_decoder_blocks: see :func:`unet_features`.

    Shapes:
        ``(N, C, *spatial)`` -> ``(N, channels, *spatial / stride)``.

    Raises:
        TypeError: another network.
        ValueError: there are not so many blocks.
    """

    def __init__(self, network: nn.Module, num_decoder_blocks: int = 0) -> None:
        super().__init__()
        check_blocks(network, num_decoder_blocks)
        self.network = network
        self.num_decoder_blocks = num_decoder_blocks

    def forward(self, x: Tensor) -> Tensor:
        return unet_features(self.network, x, self.num_decoder_blocks)
