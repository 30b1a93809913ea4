# SPDX-License-Identifier: Apache-2.0
"""An encoder as a network with one output, as MONAI's bundle checks and exports demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["EncoderFeatures"]


class EncoderFeatures(nn.Module):
    """One map of a contract encoder: the ``network_def`` of every pretraining bundle; holds no tensor of its own.

    Args:
        encoder: returns a list of maps, finest first; kept as the attribute ``encoder``, not copied.
        level: index of the map; -1 is the coarsest.

    Shapes:
        ``(B, C, *spatial)`` -> ``(B, channels[level], *spatial / stride[level])``.

    Raises:
        TypeError: the encoder returned something else than a list of maps.
        ValueError: there is no map ``level``.
    """

    def __init__(self, encoder: nn.Module, level: int = -1) -> None:
        super().__init__()
        self.encoder = encoder
        self.level = level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.encoder(x)
        if not torch.jit.is_scripting():
            self._check(maps)
        return maps[self.level]

    @torch.jit.unused
    def _check(self, maps: Any) -> None:
        encoder = type(self.encoder).__name__
        if not isinstance(maps, (list, tuple)):  # a tensor would silently give one item of the batch
            raise TypeError(f"{encoder} returned {type(maps).__name__}, expected a list of maps, finest first")
        if not -len(maps) <= self.level < len(maps):
            raise ValueError(f"level {self.level} of {len(maps)} maps of {encoder}")
