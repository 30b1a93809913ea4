# SPDX-License-Identifier: Apache-2.0
"""The network that PGL and BYOL train: encoder, projector, predictor and a teacher without predictor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.overlap_align import ANCHORS, align_overlap, overlap_theta
from ..blocks.projection_head import ProjectionHead
from ..momentum_teacher import MomentumTeacher

__all__ = ["PGLNet"]


class PGLNet(nn.Module):
    """Predicts from one view what a slowly moving teacher makes of the other, voxel by voxel in the box that both show.

    Source: PGL (arXiv 2011.12640), whose repository holds no code; ``mode="global"`` is its baseline BYOL
    (arXiv 2006.07733). The predictor comes before the alignment, so that BatchNorm sees whole maps.

    Args:
        encoder: returns a list of maps, finest first; kept as ``encoder``, the product of the training.
        in_features: channels of the map that is used.
        hidden_channels: width of the hidden layer of projector and predictor.
        out_channels: width D of what is predicted.
        spatial_dims: 2 or 3.
        mode: "local" or "global", the mean over space of each view.
        anchor: where features are centred, see :func:`overlap_theta`.
        output_stride: voxels of a view per cell of the map; None for the ratio of their sizes.
        border: cells beyond the outermost feature centres that count, see :func:`align_overlap`.
        level: index of the map; of an encoder with parts that only other maps depend on those would not be trained.
        teacher_statistics: "student": running statistics are copied from the student at every update. "own": the
            teacher keeps averages of its own, which fit its weights, so that its targets in evaluation are those of
            training. Training itself is the same.

    Raises:
        ValueError: unknown ``mode``, ``anchor`` or ``teacher_statistics``, ``spatial_dims`` other than 2 or 3, a
            negative ``border``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_features: int,
        hidden_channels: int = 1024,
        out_channels: int = 256,
        spatial_dims: int = 3,
        mode: str = "local",
        anchor: str = "rf",
        output_stride: float | Sequence[float] | None = None,
        border: float = 0.5,
        level: int = -1,
        *,
        teacher_statistics: str = "student",
    ) -> None:
        super().__init__()
        if mode not in ("local", "global"):
            raise ValueError(f"mode must be 'local' or 'global', got {mode!r}")
        if anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {anchor!r}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if teacher_statistics not in ("student", "own"):
            raise ValueError(f"teacher_statistics must be 'student' or 'own', got {teacher_statistics!r}")
        if not border >= 0:
            raise ValueError(f"border must not be negative, got {border}")
        self.in_features, self.spatial_dims, self.mode = in_features, spatial_dims, mode
        self.anchor, self.output_stride, self.border, self.level = anchor, output_stride, border, level
        self.teacher_statistics = teacher_statistics
        self.encoder = encoder
        head: dict[str, Any] = {"norm": "batch", "spatial_dims": spatial_dims if mode == "local" else 0}
        self.projector = ProjectionHead((in_features, hidden_channels, out_channels), **head)
        self.predictor = ProjectionHead((out_channels, hidden_channels, out_channels), **head)
        self.teacher_encoder = MomentumTeacher(encoder)
        self.teacher_projector = MomentumTeacher(self.projector)

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features ``(N, in_features)`` of views ``(N, C, *I)``."""
        return self._map(self.encoder(x)).flatten(2).mean(2)

    def forward(self, image: Tensor, image_2: Tensor, view_affine: Tensor | None = None) -> tuple[Tensor, ...]:
        """Predictions of both views, and what the teacher makes of the other view of each.

        Args:
            image: first views ``(B, C, *I)``.
            image_2: second views, the same shape.
            view_affine: ``(B, 2, n + 1, n + 1)``, view index to index of the volume, or to mm; unused in global mode.

        Returns:
            prediction and target, rows 0 to B - 1 for view 1 predicting view 2, the others for the reverse. Local:
            ``(2B, D, *F)`` on the shared box, and a mask ``(2B, *F)`` bool, True where both maps reach. Global:
            ``(2B, D)``, no mask.

        Raises:
            ValueError: shapes of the views differ, ``view_affine`` is missing or of another B, the map has not
                ``in_features`` channels, or for :func:`overlap_theta`'s reasons.
            TypeError: the encoder returned something else than a list of maps.
        """
        self._check(image, image_2, view_affine)
        views = torch.cat([image, image_2])  # (2B, C, *I)
        # the teacher first: its feature maps are gone before the student's are kept for the backward pass
        target = self._target(views)
        features = self._pooled(self._map(self.encoder(views)))
        prediction = self.predictor(self.projector(features))
        if view_affine is None or self.mode == "global":
            return prediction, _exchange(target)
        theta = overlap_theta(view_affine, image.shape[2:], prediction.shape[2:], self.anchor, self.output_stride)
        theta = theta.transpose(0, 1).flatten(0, 1)  # (B, 2, n, n + 1) -> (2B, n, n + 1), rows like those of views
        prediction, valid = align_overlap(prediction, theta, self.border)
        target, _ = align_overlap(target, theta, self.border)
        return prediction, _exchange(target), valid & _exchange(valid)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher; ``momentum`` is the share of it that is kept, of its own statistics too."""
        teachers = (self.teacher_encoder, self.teacher_projector) if self.teacher_statistics == "own" else ()
        statistics = [b for teacher in teachers for b in teacher.buffers() if b.is_floating_point()]
        own = [b.clone() for b in statistics]
        self.teacher_encoder.update(self.encoder, momentum)
        self.teacher_projector.update(self.projector, momentum)
        if statistics:  # the foreach kernel refuses empty lists
            torch._foreach_lerp_(statistics, own, momentum)

    def _target(self, views: Tensor) -> Tensor:
        return self.teacher_projector(self._pooled(self._map(self.teacher_encoder(views))))

    def _pooled(self, features: Tensor) -> Tensor:
        return features if self.mode == "local" else features.flatten(2).mean(2)

    def _map(self, maps: Sequence[Tensor]) -> Tensor:
        name = type(self.encoder).__name__
        if isinstance(maps, Tensor):  # would silently give one item of the batch
            raise TypeError(f"{name} returned a tensor, expected a list of maps, finest first")
        if not -len(maps) <= self.level < len(maps):
            raise ValueError(f"level {self.level} of {len(maps)} maps of {name}")
        features = maps[self.level]
        if features.shape[1] != self.in_features:
            raise ValueError(
                f"map {self.level} of {name} has {features.shape[1]} channels, in_features={self.in_features}"
            )
        return features

    def _check(self, image: Tensor, image_2: Tensor, view_affine: Tensor | None) -> None:
        if image.shape != image_2.shape or image.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"image {tuple(image.shape)} and image_2 {tuple(image_2.shape)} must be equal, (B, C, *I) with "
                f"{self.spatial_dims} spatial axes"
            )
        if self.mode == "local" and (view_affine is None or len(view_affine) != len(image)):
            got = "no view_affine" if view_affine is None else f"view_affine {tuple(view_affine.shape)}"
            raise ValueError(
                f"local mode needs a view_affine (B, 2, n + 1, n + 1) for image {tuple(image.shape)}, got {got}"
            )


def _exchange(x: Tensor) -> Tensor:
    """The rows of view 1 after those of view 2."""
    return torch.cat(x.chunk(2)[::-1])
