# SPDX-License-Identifier: Apache-2.0
"""The U-Net that is pretrained in stages: its encoder by slices, its decoder by regions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from ...losses.region_places import check_regions, region_places, region_vectors
from .._unet_stages import (
    UNetFeatures,
    check_blocks,
    check_plane_size,
    decode,
    encode,
    total_stride,
    unet_features,
    unet_stages,
)
from ..blocks.projection_head import ProjectionHead

__all__ = ["ContrastiveUNet"]


class ContrastiveUNet(UNetFeatures):
    """A U-Net with the head of the stage that is trained: embeddings of slices, or of regions of a decoder map.

    Source: arXiv 2006.10511. Stage 1 (no decoder block): the bottleneck, flattened, through g1. Stage 2: the map after
    l blocks through g2, then the region vectors of a few places through one dense layer shared by all, which equals a
    K x K convolution read at these places. Differs from the released code (`krishnabits001/domain_specific_cl`) in that
    stage 2 leaves the encoder as it is, running statistics of its norms included: it is always in eval mode, so that
    the decoder is trained on the features that will be loaded later.

    Only the parameters of the trained part have ``requires_grad``; the network is the caller's own, not a copy.

    Args:
        network: ``UNet`` or ``BasicUNet``; kept as ``network``, the product of the training.
        plane_size: of the images, along each axis.
        num_decoder_blocks: l; 0 for stage 1.
        hidden_channels: width of the hidden layer of g1; those of g2 are as wide as the map.
        out_channels: width D of the embeddings.
        region_size: cells K of a region along each axis.
        regions: "lattice" or "published", see :class:`RegionContrastiveLoss`.
        pool: whether g1 takes the mean over the bottleneck, and planes of other sizes than ``plane_size`` too.

    Shapes:
        ``(N, C, *plane)`` -> embeddings ``(N, D)`` in stage 1, region vectors ``(N, R, D)`` in stage 2.

    Raises:
        TypeError: another network.
        ValueError: not so many blocks below the logits, a plane that is no multiple of the total stride, a map of less
            than 5 K cells along an axis (regions would overlap), unknown regions; an input of another plane.
    """

    def __init__(
        self,
        network: nn.Module,
        plane_size: int | Sequence[int],
        num_decoder_blocks: int = 0,
        hidden_channels: int = 1024,
        out_channels: int = 128,
        region_size: int = 3,
        regions: str = "lattice",
        pool: bool = False,
    ) -> None:
        stages = unet_stages(network)
        check_blocks(network, num_decoder_blocks, len(stages.decoder) - (not stages.head))
        super().__init__(network, num_decoder_blocks)
        check_plane_size(network, plane_size)  # type: ignore[arg-type]
        axes = len(total_stride(network))  # type: ignore[arg-type]
        self.plane_size = ensure_tuple_rep(plane_size, axes)
        check_regions(regions, region_size, axes)
        self.region_size, self.regions, self.pool = region_size, regions, pool
        self._frozen = stages.encoder if num_decoder_blocks else ()
        _, channels, *size = _map_shape(network, self.plane_size, num_decoder_blocks)
        if num_decoder_blocks:
            self._starts(tuple(size))
            self.g2 = ProjectionHead([channels] * 3, norm="batch", bias=False, spatial_dims=axes)
            self.dense = nn.Linear(channels * region_size**axes, out_channels, bias=False)
        else:
            features = channels if pool else channels * prod(size)
            self.g1 = ProjectionHead([features, hidden_channels, out_channels], norm=None, bias=False)
        trained = stages.decoder[:num_decoder_blocks] if num_decoder_blocks else stages.encoder
        # what takes no part would make DistributedDataParallel wait for its gradient
        network.requires_grad_(False)
        for name in trained:
            network.get_submodule(name).requires_grad_(True)
        self._freeze()

    def forward(self, x: Tensor) -> Tensor:
        if not self.pool and x.shape[2:] != self.plane_size:
            raise ValueError(f"input {tuple(x.shape)} must be (N, C, *plane) with a plane of {self.plane_size}")
        if not self.num_decoder_blocks:
            features = unet_features(self.network, x)
            return self.g1(features.flatten(2).mean(2) if self.pool else features.flatten(1))
        with torch.no_grad():
            maps = encode(self.network, x)
        return self._embed_regions(decode(self.network, maps, self.num_decoder_blocks))

    def _embed_regions(self, features: Tensor) -> Tensor:
        """Region vectors (N, R, D) of a decoder map (N, C, *size)."""
        convolution, norm, *rest = self.g2
        features = norm(convolution(features))
        starts, axes = self._starts(tuple(features.shape[2:])), features.ndim - 2
        vectors = region_vectors(features, starts, self.region_size)  # (N, R, C * K^n)
        # what follows the norm treats cells one by one, so that it is needed at these places only
        patches = vectors.reshape(-1, features.shape[1], *[self.region_size] * axes)  # (N * R, C, K, ..)
        for layer in rest:
            patches = layer(patches)
        return self.dense(patches.flatten(1)).unflatten(0, vectors.shape[:2])

    def train(self, mode: bool = True) -> ContrastiveUNet:
        """Training mode for all but a frozen encoder, whose statistics must not move (engines call this at every
        iteration)."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        for name in self._frozen:
            self.network.get_submodule(name).eval()

    def _starts(self, size: tuple[int, ...]) -> Tensor:
        if min(size) < 5 * self.region_size:
            raise ValueError(
                f"the map after {self.num_decoder_blocks} decoder blocks has {size} cells, regions of "
                f"{self.region_size} need {5 * self.region_size} along each axis, or they would overlap"
            )
        return region_places(self.regions, size, self.region_size)[0]


def _map_shape(network: nn.Module, plane: Sequence[int], num_decoder_blocks: int) -> torch.Size:
    """Shape of the map of one image, by a pass over zeros in eval mode, in which no statistics change."""
    first = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    image = torch.zeros(1, first.in_channels, *plane, dtype=first.weight.dtype, device=first.weight.device)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return unet_features(network, image, num_decoder_blocks).shape
    finally:
        for module, training in modes:
            module.training = training
