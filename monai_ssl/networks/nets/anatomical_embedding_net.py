# SPDX-License-Identifier: Apache-2.0
"""The networks of SAM: one vector per cell of a fine and of a coarse map, and both as one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from monai.utils import ensure_tuple_rep
from torch import nn

__all__ = ["AnatomicalEmbeddingNet", "MergedEmbeddingNet"]

Net = TypeVar("Net", bound="_EmbeddingNet")


class _EmbeddingNet(nn.Module):
    """Encoder and heads, without a forward pass of its own; arguments of :class:`AnatomicalEmbeddingNet`."""

    def __init__(
        self,
        encoder: nn.Module,
        channels: Sequence[int],
        spatial_dims: int = 3,
        embed_dim: int = 128,
        local_levels: Sequence[int] = (0, 1, 2),
        global_level: int = -1,
        semantic: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        levels = [level % len(channels) for level in local_levels if -len(channels) <= level < len(channels)]
        if len(levels) != len(local_levels) or not levels or levels != sorted(set(levels)):
            raise ValueError(
                f"local_levels {tuple(local_levels)} must be levels of the {len(channels)} maps, finest first"
            )
        if not -len(channels) <= global_level < len(channels):
            raise ValueError(f"global_level {global_level} of {len(channels)} maps")
        self.spatial_dims, self.embed_dim, self.semantic = spatial_dims, embed_dim, semantic
        self.channels, self.local_levels, self.global_level = [int(c) for c in channels], levels, int(global_level)
        self.linear = "bilinear" if spatial_dims == 2 else "trilinear"
        self.encoder = encoder
        local = [self.channels[level] for level in levels]
        self.local_head = _PyramidHead(local, embed_dim, spatial_dims)
        self.global_head = _PyramidHead([self.channels[global_level]], embed_dim, spatial_dims)
        self.semantic_head = _PyramidHead(local, embed_dim, spatial_dims) if semantic else None

    @classmethod
    def sharing(cls: type[Net], net: _EmbeddingNet) -> Net:
        """A network of this class around the very encoder and heads of another; no tensor is copied.

        Args:
            net: :class:`AnatomicalEmbeddingNet` or :class:`MergedEmbeddingNet`.

        Raises:
            TypeError: ``net`` is something else, as DistributedDataParallel around one of them.
        """
        if not isinstance(net, _EmbeddingNet):
            raise TypeError(f"{cls.__name__} can share with an AnatomicalEmbeddingNet, got {type(net).__name__}")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        settings = ("spatial_dims", "embed_dim", "semantic", "channels", "local_levels", "global_level", "linear")
        for name in (*settings, "encoder", "local_head", "global_head", "semantic_head"):
            setattr(new, name, getattr(net, name))
        return new

    def embeddings(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Local, global and, where there is that head, semantic map; ``(B, embed_dim, *map)`` of unit vectors."""
        if not torch.jit.is_scripting():
            self._check_image(tuple(image.shape))
        maps = self.encoder(image)
        if not torch.jit.is_scripting():
            self._check_maps(tuple(image.shape), maps)
        local = [maps[level] for level in self.local_levels]
        outputs = [_unit(self.local_head(local)), _unit(self.global_head([maps[self.global_level]]))]
        if self.semantic_head is not None:
            outputs.append(_unit(self.semantic_head(local)))
        return outputs

    @torch.jit.unused
    def _check_image(self, shape: tuple[int, ...]) -> None:
        if len(shape) != self.spatial_dims + 2:
            raise ValueError(f"image {shape} must be (B, C, *spatial) with {self.spatial_dims} spatial axes")
        for stride in getattr(self.encoder, "strides", ()):
            if any(n % s for n, s in zip(shape[2:], ensure_tuple_rep(stride, self.spatial_dims))):
                raise ValueError(f"image {shape}: every spatial size must be a multiple of the strides {stride}")

    @torch.jit.unused
    def _check_maps(self, shape: tuple[int, ...], maps: Any) -> None:
        name = type(self.encoder).__name__
        if not isinstance(maps, (list, tuple)):  # a tensor would silently give one item of the batch
            raise TypeError(f"{name} returned {type(maps).__name__}, expected a list of maps, finest first")
        found = [m.shape[1] for m in maps]
        if found != self.channels:
            raise ValueError(f"maps of {name} have {found} channels, channels={self.channels}")
        for level in {*self.local_levels, self.global_level}:
            size = tuple(maps[level].shape[2:])
            if any(n % m for n, m in zip(shape[2:], size)):  # then cells would not lie where the loss thinks
                raise ValueError(f"image {shape} is no multiple of the map {size} of level {level} of {name}")


class AnatomicalEmbeddingNet(_EmbeddingNet):
    """A vector for each cell such that the same anatomical place has the same vector in every image.

    Source: SAM (arXiv 2012.02383) as in its released code: the fine map is a feature pyramid, without link from the
    coarse map; UAE-S (arXiv 2311.15111) adds a twin of the fine head. A secondary account of the paper has no
    convolutions before the pyramid; the released code and this network do. Heads have Xavier initialisation.

    Args:
        encoder: returns a list of maps, finest first; kept as ``encoder``.
        channels: of all maps of the encoder.
        spatial_dims: 2 or 3.
        embed_dim: width of the vectors.
        local_levels: indices of the maps of the pyramid, finest first.
        global_level: index of the map of the coarse head.
        semantic: add the twin, ``semantic_head``.

    Raises:
        ValueError: ``spatial_dims`` other than 2 or 3, levels that do not exist or are not in order.
    """

    def forward(self, image: torch.Tensor, image_2: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Embeds images, or pairs of views.

        Args:
            image: ``(B, C, *spatial)``, first views.
            image_2: second views, the same shape; then rows 0 to B - 1 are view 1 and the others view 2.

        Returns:
            local, global and perhaps semantic map, ``(B or 2 B, embed_dim, *map)``, unit vectors over channels in
            float32, or float64 for such images.

        Raises:
            ValueError: shapes of the views differ, or a size is no multiple of the encoder's stride.
            TypeError: the encoder returned something else than a list of maps.
        """
        if image_2 is not None:
            if image.shape != image_2.shape:
                raise ValueError(f"image {image.shape} and image_2 {image_2.shape} must be equal")
            image = torch.cat([image, image_2])
        return self.embeddings(image)


class MergedEmbeddingNet(_EmbeddingNet):
    """The maps of :class:`AnatomicalEmbeddingNet` as one, in which an inner product is the mean of their cosines.

    Source: the sum of similarities by which SAM (arXiv 2012.02383) finds a point. Same arguments and same state dict;
    :meth:`sharing` builds it around the network that is trained.

    Shapes:
        ``(B, C, *spatial)`` -> ``(B, maps * embed_dim, *local)``: maps brought to the size of the local one (linear),
        renormalised, concatenated and divided by the square root of their number.

    Raises:
        ValueError: as :class:`AnatomicalEmbeddingNet`.
        TypeError: as :class:`AnatomicalEmbeddingNet`.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(B, maps * embed_dim, *local)`` of unit vectors."""
        maps = self.embeddings(image)
        size = maps[0].shape[2:]
        merged = [maps[0]]
        for coarse in maps[1:]:
            merged.append(_unit(F.interpolate(coarse, size=size, mode=self.linear, align_corners=False)))
        return torch.cat(merged, dim=1) / len(merged) ** 0.5


class _PyramidHead(nn.Module):
    """Maps of several levels, brought to the same width, added from deep to fine, and smoothed."""

    def __init__(self, channels: Sequence[int], embed_dim: int, spatial_dims: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.lateral = nn.ModuleList(conv(c, embed_dim, 1) for c in channels)
        self.smooth = conv(embed_dim, embed_dim, 3, padding=1)
        for layer in [*self.lateral, self.smooth]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """``(B, channels[i], *map_i)``, finest first -> ``(B, embed_dim, *map_0)``."""
        levels: list[torch.Tensor] = []
        for i, lateral in enumerate(self.lateral):
            levels.append(lateral(maps[i]))
        total = levels[-1]
        for i in range(len(levels) - 2, -1, -1):
            total = levels[i] + F.interpolate(total, size=levels[i].shape[2:], mode="nearest")
        return self.smooth(total)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Unit vectors over channels, also under autocast."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)
