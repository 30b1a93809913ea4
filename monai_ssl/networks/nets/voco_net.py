# SPDX-License-Identifier: Apache-2.0
"""The network that VoCo trains: an encoder, a projector and their teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..blocks.projection_head import ProjectionHead
from ..momentum_teacher import MomentumTeacher

__all__ = ["VoCoNet"]


class VoCoNet(nn.Module):
    """Embeds random and base crops for VoCo, volume contrast (arXiv 2402.17300; arXiv 2410.09890 for the teachers).

    Differs from the released code: dropout zeroes single features and only in training (released: whole crops, in
    evaluation too); ``forward`` does not move the teacher, :meth:`update_teacher` does; the teacher starts as a copy
    unless ``teacher_init`` says otherwise. BatchNorm of the projector uses batch statistics in train and eval.

    Args:
        encoder: returns a list of maps, finest first; kept as ``encoder``, the product of the training.
        embed_dim: channels of all pooled maps together.
        hidden_dim: width of the projector's two hidden layers.
        out_dim: width D of the embedding.
        teacher: "projector" (v2), "full" for encoder and projector (v1), "none" (cvpr: the student, detached).
        teacher_init: "copy" or "random", see :class:`MomentumTeacher`.
        feature_dropout: probability for the pooled features that the student's projector gets.
        stages: indices of the maps that are pooled; None for all.

    Raises:
        ValueError: unknown ``teacher``, ``feature_dropout`` outside [0, 1), ``stages`` empty.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embed_dim: int,
        hidden_dim: int = 1024,
        out_dim: int = 1024,
        teacher: str = "projector",
        teacher_init: str = "copy",
        feature_dropout: float = 0.0,
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if teacher not in ("projector", "full", "none"):
            raise ValueError(f"teacher must be 'projector', 'full' or 'none', got {teacher!r}")
        if not 0.0 <= feature_dropout < 1.0:
            raise ValueError(f"feature_dropout must be in [0, 1), got {feature_dropout}")
        if stages is not None and len(stages) == 0:
            raise ValueError("stages is empty: name the maps to pool, or None for all")
        self.embed_dim, self.feature_dropout = embed_dim, feature_dropout
        self.stages = None if stages is None else tuple(stages)
        self.encoder = encoder
        self.projector = ProjectionHead(
            (embed_dim, hidden_dim, hidden_dim, out_dim),
            norm=("batch", {"affine": False, "track_running_stats": False}),
        )
        self.teacher_encoder = MomentumTeacher(encoder, teacher_init) if teacher == "full" else None
        self.teacher_projector = MomentumTeacher(self.projector, teacher_init) if teacher != "none" else None

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features ``(N, embed_dim)`` of crops ``(N, C, *roi)``."""
        return self._pool(self.encoder(x))

    def forward(self, image: torch.Tensor, image_base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Student and teacher embeddings, each ``(B, R + K, out_dim)``: random crops first, then base crops.

        Args:
            image: random crops ``(B, R, C, *roi)``.
            image_base: base crops ``(B, K, C, *roi)``.

        Raises:
            ValueError: B, C or roi of the two differ, or the pooled features are not ``embed_dim`` wide.
        """
        a, b = tuple(image.shape), tuple(image_base.shape)
        if len(a) < 4 or a[:1] + a[2:] != b[:1] + b[2:]:
            raise ValueError(f"image (B, R, C, *roi) {a} and image_base (B, K, C, *roi) {b} differ in B, C or roi")
        x = torch.cat([image, image_base], dim=1).flatten(0, 1)  # (B * (R + K), C, *roi)
        # the teacher's encoder first: its feature maps are gone before the student's are kept for the backward pass
        seen = None if self.teacher_encoder is None else self._pool(self.teacher_encoder(x))
        z = self.embed(x)
        student = self.projector(F.dropout(z, self.feature_dropout, self.training))
        if self.teacher_projector is None:
            teacher = student.detach()
        else:
            teacher = self.teacher_projector(z.detach() if seen is None else seen)
        rows = (a[0], a[1] + b[1])
        return student.unflatten(0, rows), teacher.unflatten(0, rows)  # (B * (R + K), D) -> (B, R + K, D)

    def update_teacher(self, momentum: float = 0.9) -> None:
        """Move whatever teacher there is; ``momentum`` is the share of it that is kept."""
        if self.teacher_encoder is not None:
            self.teacher_encoder.update(self.encoder, momentum)
        if self.teacher_projector is not None:
            self.teacher_projector.update(self.projector, momentum)

    def _pool(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        if isinstance(maps, torch.Tensor):
            raise TypeError(f"{type(self.encoder).__name__} returned a tensor, expected a list of maps, finest first")
        stages = range(len(maps)) if self.stages is None else self.stages
        if not all(-len(maps) <= i < len(maps) for i in stages):
            raise ValueError(f"stages {self.stages} of {len(maps)} maps of {type(self.encoder).__name__}")
        chosen = [maps[i] for i in stages]
        channels = [m.shape[1] for m in chosen]
        if sum(channels) != self.embed_dim:
            raise ValueError(
                f"pooled maps have {channels} channels, {sum(channels)} together, embed_dim={self.embed_dim}"
            )
        return torch.cat([m.flatten(2).mean(-1) for m in chosen], dim=1)
