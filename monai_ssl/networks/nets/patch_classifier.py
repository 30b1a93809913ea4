# SPDX-License-Identifier: Apache-2.0
"""The network of the pretexts that classify or embed patches: relative location, jigsaw, rotation, exemplar."""

from __future__ import annotations

import torch
from torch import nn

from ._last_map_pool import LastMapPool

__all__ = ["PatchClassifier"]


class PatchClassifier(nn.Module):
    """One encoder and one head for all patches of an item: 3D-RPL, 3D-Jigsaw, 3D-Rotation, 3D-Exemplar.

    Source: section 3 of arXiv 2006.03829. Differs from the released code (`HealthML/self-supervised-3d-tasks`): its
    Exemplar has a head of its own for each view, which solves the task on noise, its RPL asks for one neighbour a
    volume, and its features are always flattened. ``pool="flatten"`` with the published head gives its other networks.

    Args:
        encoder: returns a list of maps, finest first, of which the last is used; kept as ``encoder``.
        head: maps features to logits or to an embedding.
        combine: "concat", all patches of an item side by side (Jigsaw; Rotation, with one patch); "pairs", the first
            patch with each other one (RPL); "each", every patch by itself (Exemplar, where a patch is a view).
        pool: "avg" (F = channels), cells per axis g (F = channels * g^d), or "flatten"; see :class:`LastMapPool`.
        spatial_dims: 2 or 3.

    Shapes:
        ``(B, P, C, *s)``, or ``(B, C, *s)`` for P = 1, to: "concat" ``(B, P * F)`` -> head -> ``(B, classes)``;
        "pairs" ``(B * Q, 2 F)`` -> head -> ``(B, classes, Q)`` with Q = P - 1, as ``CrossEntropyLoss`` takes it with
        labels ``(B, Q)``; "each" ``(B * P, F)`` -> head -> ``(B, P, D)``.

    Raises:
        ValueError: unknown ``combine`` or ``pool``, an input of neither shape, or "pairs" with fewer than two patches.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        combine: str = "concat",
        pool: str | int = "avg",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if combine not in ("concat", "pairs", "each"):
            raise ValueError(f"combine must be 'concat', 'pairs' or 'each', got {combine!r}")
        self.combine, self.spatial_dims = combine, spatial_dims
        self.encoder = encoder
        self.pool = LastMapPool(pool, spatial_dims)
        self.head = head

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features ``(N, F)`` of patches ``(N, C, *s)``."""
        return self.pool(self.encoder(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == self.spatial_dims + 2:
            x = x[:, None]
        least = 2 if self.combine == "pairs" else 1
        if x.ndim != self.spatial_dims + 3 or x.shape[1] < least:
            raise ValueError(
                f"input {tuple(x.shape)} must be (B, P, C, *s) or (B, C, *s) with {self.spatial_dims} spatial axes, "
                f"and at least {least} patches for combine={self.combine!r}"
            )
        patches = x.shape[1]
        features = self.embed(x.flatten(0, 1)).unflatten(0, (-1, patches))  # (B * P, F) -> (B, P, F)
        if self.combine == "concat":
            return self.head(features.flatten(1))  # (B, P * F)
        if self.combine == "each":
            return self.head(features.flatten(0, 1)).unflatten(0, (-1, patches))  # (B * P, D) -> (B, P, D)
        others = features[:, 1:]
        pairs = torch.cat([features[:, :1].expand_as(others), others], dim=2).flatten(0, 1)  # (B * Q, 2 F)
        return self.head(pairs).unflatten(0, (-1, patches - 1)).transpose(1, 2)  # (B * Q, classes) -> (B, classes, Q)
