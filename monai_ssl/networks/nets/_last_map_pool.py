# SPDX-License-Identifier: Apache-2.0
"""From the maps of an encoder to one feature vector per patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers import Pool
from torch import nn


class LastMapPool(nn.Module):
    """Features of the coarsest map: ``(N, channels, *spatial)`` to ``(N, F)``; holds no tensor.

    Args:
        pool: "avg", the mean over space (F = channels); an int g, averages over g cells per axis in C order
            (F = channels * g^d); "flatten", the whole map in C order.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: on any other ``pool`` or ``spatial_dims``.
        TypeError: the encoder returned something else than a list of maps.
    """

    def __init__(self, pool: str | int, spatial_dims: int) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        cells = 1 if pool == "avg" else pool
        if pool != "flatten" and (not isinstance(cells, int) or isinstance(cells, bool) or cells < 1):
            raise ValueError(f"pool must be 'avg', 'flatten' or the number of cells per axis, got {pool!r}")
        self.reduce = nn.Identity() if pool == "flatten" else Pool[Pool.ADAPTIVEAVG, spatial_dims](cells)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        if not isinstance(maps, (list, tuple)):  # a tensor would silently give one item of the batch
            raise TypeError(f"the encoder returned {type(maps).__name__}, expected a list of maps, finest first")
        return self.reduce(maps[-1]).flatten(1)
