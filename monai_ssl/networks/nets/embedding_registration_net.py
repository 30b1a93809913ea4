# SPDX-License-Identifier: Apache-2.0
"""A registration network that is shown where a frozen embedding finds the neighbours of each place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.correlation_volume import correlation_volume
from .registration_unet import RegistrationUNet

__all__ = ["EmbeddingRegistrationNet"]


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
