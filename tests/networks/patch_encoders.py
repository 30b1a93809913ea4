# SPDX-License-Identifier: Apache-2.0
"""Encoders for the tests of the patch pretexts' networks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn


class Identity(nn.Module):
    """A fine map of zeros and the input itself as the coarsest; counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        self.batch = len(x)
        return [torch.zeros_like(x).repeat(1, 2, *(2,) * (x.ndim - 2)), x]


def encoder(spatial_dims: int = 3, **kwargs: Any) -> SegResEncoder:
    args = {"init_filters": 16, "norm": "instance", "blocks_down": (1, 2, 2, 4)}
    return SegResEncoder(spatial_dims, **{**args, **kwargs})


def small(spatial_dims: int = 3) -> SegResEncoder:
    return encoder(spatial_dims, init_filters=8, blocks_down=(1, 1))


def numbers(module: nn.Module) -> int:
    """Parameters and running statistics."""
    return sum(t.numel() for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked"))


class Published(nn.Module):
    """The encoder of the released code, from MONAI's blocks; its last step is a max-pooling too."""

    def __init__(self, spatial_dims: int = 3) -> None:
        super().__init__()
        norm = ("batch", {"eps": 1e-3, "momentum": 0.01})
        block = lambda i, o, dropout: Convolution(
            spatial_dims, i, o, kernel_size=3, adn_ordering="AND", act="relu", norm=norm, dropout=dropout
        )
        widths = (1, 16, 32, 64, 128, 256)
        self.levels = nn.ModuleList(nn.Sequential(block(i, o, 0.5), block(o, o, None)) for i, o in pairwise(widths))
        self.pool = (nn.MaxPool2d if spatial_dims == 2 else nn.MaxPool3d)(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            maps.append(level(x))
            x = self.pool(maps[-1])
        return [*maps, x]
