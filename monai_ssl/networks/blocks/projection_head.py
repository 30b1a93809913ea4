# SPDX-License-Identifier: Apache-2.0
"""The MLP that projectors, predictors and contrastive heads are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from monai.networks.layers import Conv, get_norm_layer
from torch import nn

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Sequential):
    """Linear layers (or 1x1 convolutions) with norm and ReLU between them; nothing follows the last layer.

    Used by VoCo (arXiv 2402.17300), PGL and BYOL (arXiv 2011.12640, 2006.07733) and contrastive methods.

    Args:
        channels: width of the input, of each hidden layer and of the output; at least two.
        norm: a MONAI norm name, a pair of name and arguments, or None for no norm.
        spatial_dims: 0 for vectors ``(N, C)``; 1, 2 or 3 for maps ``(N, C, *spatial)``, every voxel by itself.
        bias: whether the linear layers have a bias.

    Shapes:
        input ``(N, channels[0])`` or ``(N, channels[0], *spatial)``; output the same with ``channels[-1]``.

    Raises:
        ValueError: fewer than two widths, a width below 1, unknown ``spatial_dims``, or instance norm on vectors.
    """

    def __init__(
        self,
        channels: Sequence[int],
        norm: str | tuple | None = "batch",
        spatial_dims: int = 0,
        bias: bool = True,
    ) -> None:
        channels = tuple(channels)
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"channels needs at least an input and an output width, all positive, got {channels}")
        if spatial_dims not in (0, 1, 2, 3):
            raise ValueError(f"spatial_dims must be 0 (vectors), 1, 2 or 3, got {spatial_dims}")
        name = norm if isinstance(norm, str) or norm is None else norm[0]
        if spatial_dims == 0 and name is not None and name.lower().startswith("instance"):
            # torch reads (N, C) as one unbatched item with N channels and would normalise over the features
            raise ValueError(f"norm {norm!r} has no meaning for vectors (spatial_dims=0); use 'batch' or None")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            if layers:
                if norm is not None:
                    layers.append(get_norm_layer(norm, max(spatial_dims, 1), inputs))
                layers.append(nn.ReLU())
            if spatial_dims == 0:
                layers.append(nn.Linear(inputs, outputs, bias=bias))
            else:
                layers.append(Conv[Conv.CONV, spatial_dims](inputs, outputs, kernel_size=1, bias=bias))
        super().__init__(*layers)
