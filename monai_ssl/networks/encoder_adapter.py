# SPDX-License-Identifier: Apache-2.0
"""What the adapters of ``encoders.py`` share, and the channels of any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

__all__ = ["EncoderAdapter", "encoder_channels"]


class EncoderAdapter(nn.Module):
    """Class check, ``channels`` and size check; a subclass names its network, describes its maps and computes them."""

    adapts = nn.Module
    multiple_only = False  # sizes must be multiples of the stride, as the network itself demands

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, self.adapts):
            got = f"{type(net).__module__}.{type(net).__qualname__}"
            raise TypeError(f"{type(self).__name__} adapts monai.networks.nets.{self.adapts.__name__}, got {got}")

    def _describe(self, channels: Sequence[int], stride: Sequence[int]) -> None:
        """Called last by each constructor; ``stride`` is that of the coarsest map, one per axis."""
        self.channels = [int(c) for c in channels]
        self._stride = [int(s) for s in stride]
        self._instance_norm = any("InstanceNorm" in type(m).__name__ for m in self.modules())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``(B, C, *spatial)`` -> one map ``(B, channels[i], *spatial / stride_i)`` per level, finest first."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check_size(tuple(x.shape))
        return self._maps(x)

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError

    @torch.jit.unused
    def _check_size(self, shape: tuple[int, ...]) -> None:
        size, stride = shape[2:], self._stride
        text = f"input {shape} of {type(self).__name__} (stride {stride})"
        if len(size) != len(stride):
            raise ValueError(f"{text}: expected batch, channel and {len(stride)} spatial axes")
        if self.multiple_only and any(n % s for n, s in zip(size, stride)):
            raise ValueError(f"{text}: every spatial size must be a multiple of the stride")
        coarsest = self._coarsest(size)
        if min(coarsest) < 1 or (self._instance_norm and prod(coarsest) == 1):
            raise ValueError(
                f"{text}: too small, the coarsest map would have size {coarsest}; instance norm needs two voxels"
            )

    def _coarsest(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-n // s) for n, s in zip(size, self._stride))  # padded strided convolutions round up


def encoder_channels(encoder: nn.Module, in_channels: int, spatial_size: Sequence[int]) -> list[int]:
    """Channels of every map of any encoder, by one pass over zeros in eval mode: no statistics or gradients change.

    Args:
        encoder: returns a list of maps.
        in_channels: channels of the image.
        spatial_size: a size that the encoder accepts.

    Returns:
        one number per map, in the encoder's order.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    like = next(encoder.parameters())
    encoder.eval()
    try:
        with torch.no_grad():
            maps = encoder(torch.zeros(1, in_channels, *spatial_size, dtype=like.dtype, device=like.device))
    finally:
        for module, training in modes:
            module.training = training
    return [m.shape[1] for m in maps]
