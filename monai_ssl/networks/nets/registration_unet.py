# SPDX-License-Identifier: Apache-2.0
"""The U-Net that moves one image onto another, and the one that is shown where an embedding finds the neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from ..blocks.correlation_volume import correlation_volume
from ..blocks.velocity_field import integrate_velocity

__all__ = ["EmbeddingRegistrationNet", "RegistrationUNet"]


class RegistrationUNet(nn.Module):
    """The displacement of a pair of images, from the images and features of the pair on a coarser grid.

    Source: VoxelMorph (arXiv 1809.05231) with the embeddings' correlation as further input, SAM-VoxelMorph of SAME
    (arXiv 2109.11572). Without features it is VoxelMorph, the baseline. Sizes are those of the released code: each
    level is a convolution, a skip and a pooling; what is left of `up_channels` works on the images' own grid. MONAI's
    `VoxelMorph` refuses odd numbers of channels, has no input on a coarser grid, and its field starts far from 0.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the pair, stacked: moving, then fixed.
        feature_channels: of the features; 0: none are taken.
        feature_level: poolings before the features join, 1 for features at half the images' size.
        channels: of the levels, from the images' size down; each halves it.
        up_channels: of the convolutions on the way back, first one per level, at least so many.
        integration_steps: squarings from the velocity to the displacement; 0: the velocity itself, for
            :class:`RegistrationLoss`. The state dict does not depend on it.

    Shapes:
        image ``(B, in_channels, *size)``, features ``(B, feature_channels, *size / 2^feature_level)`` ->
        ``(B, spatial_dims, *size)``: in voxels, components in array order, float32 also under autocast: the fixed
        image's voxel x shows what the moving image has at x + displacement, as `monai.networks.blocks.Warp` takes it.

    Raises:
        ValueError: arguments that do not fit each other; an image whose size is no multiple of ``multiple``, 2 to the
            number of levels; features missing, superfluous or of another shape.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        feature_channels: int = 0,
        feature_level: int = 1,
        channels: Sequence[int] = (16, 32, 32, 32),
        up_channels: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        integration_steps: int = 7,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        levels = len(channels)
        if not levels or len(up_channels) < levels:
            raise ValueError(
                f"up_channels {tuple(up_channels)} must be at least as many as channels {tuple(channels)}, one or more"
            )
        if not 0 <= feature_level < levels:
            raise ValueError(f"feature_level {feature_level} must be one of the {levels} levels, from 0")
        if feature_channels < 0 or integration_steps < 0:
            raise ValueError(
                f"feature_channels {feature_channels} and integration_steps {integration_steps} must not be negative"
            )
        self.spatial_dims, self.in_channels, self.multiple = spatial_dims, in_channels, 2**levels
        self.feature_channels, self.feature_level = feature_channels, feature_level
        self.integration_steps = integration_steps
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.down, self.up, self.full = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for level, out in enumerate(channels):
            width += feature_channels if level == feature_level else 0
            self.down.append(_conv(spatial_dims, width, out))
            width = out
        for out, skip in zip(up_channels, reversed(channels)):
            self.up.append(_conv(spatial_dims, width, out))
            width = out + skip
        for out in up_channels[levels:]:
            self.full.append(_conv(spatial_dims, width, out))
            width = out
        self.flow = Conv[Conv.CONV, spatial_dims](width, spatial_dims, 3, padding=1)
        nn.init.normal_(self.flow.weight, std=1e-5)
        nn.init.zeros_(self.flow.bias)

    def forward(self, image: Tensor, features: Tensor | None = None) -> Tensor:
        self._check(image, features)
        x, skips = image, []
        for level, conv in enumerate(self.down):
            if features is not None and level == self.feature_level:
                x = torch.cat([x, features.to(x.dtype)], 1)
            skips.append(conv(x))
            x = self.pool(skips[-1])
        for conv in self.up:
            x = torch.cat([F.interpolate(conv(x), scale_factor=2.0, mode="nearest"), skips.pop()], 1)
        for conv in self.full:
            x = conv(x)
        with torch.autocast(x.device.type, enabled=False):  # the field starts at 1e-5, where half precision is coarse
            flow = self.flow(x.to(self.flow.weight.dtype))  # in half image extents
        velocity = torch.stack([v * ((size - 1) / 2) for v, size in zip(flow.unbind(1), flow.shape[2:])], 1)
        return integrate_velocity(velocity, self.integration_steps)

    def _check(self, image: Tensor, features: Tensor | None) -> None:
        shape, n = tuple(image.shape), self.spatial_dims
        if len(shape) != n + 2 or shape[1] != self.in_channels:
            raise ValueError(f"image {shape} must be (B, {self.in_channels}, *size) with {n} spatial axes")
        if any(size % self.multiple for size in shape[2:]):
            raise ValueError(f"image {shape}: every spatial size must be a multiple of {self.multiple}, pad it")
        expected = (shape[0], self.feature_channels, *(size // 2**self.feature_level for size in shape[2:]))
        found = None if features is None else tuple(features.shape)
        if found != (expected if self.feature_channels else None):
            wanted = expected if self.feature_channels else "None, the network was built with feature_channels=0"
            raise ValueError(f"features {found} of an image {shape} must be {wanted}")


class EmbeddingRegistrationNet(nn.Module):
    """A U-Net on two images and the local correlation of their embeddings.

    Source: SAM-VoxelMorph of SAME (arXiv 2109.11572) with the sizes of its released code. The correlations of the local
    maps and of the global maps, brought to the local size, are added. The embedder is frozen: always in eval mode,
    without gradient; it is part of the state dict, so that a file is complete.

    Args:
        embedder: ``(B, 1, *size)`` -> ``[local, global, ..]`` or one map, as :class:`AnatomicalEmbeddingNet`; further
            maps are not used. Kept as ``embedder``.
        unet: kept as ``unet``, the part that is trained; its ``integration_steps`` decide on what comes out.
        window: the range of the images that becomes [-1, 1] for the U-Net, beyond which values are cut off; the default
            is [-800, 400] HU on the scale of SAM, where [-1024, 3071] HU become [-50, 205].
        radius: cells of the correlation on either side of the centre.

    Shapes:
        ``(B, 2, *size)``, moving (pre-aligned) and fixed image on the embedder's scale -> ``(B, n, *size)`` in voxels,
        see :class:`RegistrationUNet`.

    Raises:
        ValueError: a ``unet`` that takes other features or images, an empty window; images of another shape, or of a
            size that one of the networks does not take.
    """

    def __init__(
        self,
        embedder: nn.Module,
        unet: RegistrationUNet,
        window: Sequence[float] = (-36.05, 38.67),
        radius: int = 1,
    ) -> None:
        super().__init__()
        features = (2 * radius + 1) ** unet.spatial_dims
        if (unet.feature_channels, unet.in_channels) != (features, 2):
            raise ValueError(
                f"unet has feature_channels={unet.feature_channels}, in_channels={unet.in_channels}; "
                f"with radius={radius} it needs {features} and 2"
            )
        low, high = (float(v) for v in window)
        if not low < high:
            raise ValueError(f"window must be (low, high), got {tuple(window)}")
        self.spatial_dims, self.window, self.radius = unet.spatial_dims, (low, high), radius
        self.embedder = embedder.requires_grad_(False)
        self.unet = unet
        self.embedder.eval()

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != 2:
            raise ValueError(
                f"image {tuple(image.shape)} must be (B, 2, *size), moving and fixed, with {self.spatial_dims} axes"
            )
        low, high = self.window
        windowed = ((image - low) * (2 / (high - low)) - 1).clamp(-1, 1)
        return self.unet(windowed, self.features(image))

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Sum over the maps of the correlation, ``(B, (2 radius + 1)^n, *local)``."""
        pairs = list(zip(self._maps(image[:, :1]), self._maps(image[:, 1:])))
        size, mode = pairs[0][0].shape[2:], "bilinear" if self.spatial_dims == 2 else "trilinear"
        total = correlation_volume(*pairs[0], radius=self.radius)
        for pair in pairs[1:]:  # up-sampling shortens the vectors, which does not matter to cosines
            moving, fixed = (F.interpolate(values, size=size, mode=mode, align_corners=False) for values in pair)
            total += correlation_volume(moving, fixed, self.radius)
        return total

    def train(self, mode: bool = True) -> EmbeddingRegistrationNet:
        """Training mode for the U-Net alone: the embedder's statistics must not move."""
        super().train(mode)
        self.embedder.eval()
        return self

    def _maps(self, image: Tensor) -> list[Tensor]:
        maps = self.embedder(image)
        return [maps] if isinstance(maps, Tensor) else list(maps[:2])  # the third is the semantic one


def _conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    act = ("leakyrelu", {"negative_slope": 0.2})
    return Convolution(spatial_dims, in_channels, out_channels, adn_ordering="A", act=act)
