# SPDX-License-Identifier: Apache-2.0
"""The network of contrastive predictive coding, and the patches that it predicts from and to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from monai.utils import ensure_tuple_rep
from torch import nn

from ._last_map_pool import LastMapPool

__all__ = ["CPCNet", "cpc_indices"]


def cpc_indices(grid_size: int | Sequence[int], skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches behind each column of the grid and the patches ahead that they predict, along axis 0.

    Source: the pyramid of 3D-CPC, section 3 of arXiv 2006.03829. With n = grid_size and the apex in row
    e = n[0] // 2 - 1, a column's context is, for each row r < e, the window of half width e - r around the column, and
    the apex last. Window places outside the grid are mirrored (released code: zero codes). Targets are the column's
    rows from e + 1 + skip on.

    Args:
        grid_size: patches per axis, two or three axes; an int means three equal ones.
        skip: rows left out after the apex, for grids whose neighbours overlap.

    Returns:
        context (Q, T) and target (Q, K): int64 patch numbers in C order, columns (places on the other axes) in C order.

    Raises:
        ValueError: fewer than four rows, which would put the row to predict into the context by mirroring; another
            axis shorter than the widest window needs; no row left to predict; another number of axes; negative skip.
    """
    grid = ensure_tuple_rep(grid_size, 3) if isinstance(grid_size, int) else tuple(grid_size)
    if len(grid) not in (2, 3):
        raise ValueError(f"grid_size must have two or three axes, got {grid}")
    rows, lateral = grid[0], grid[1:]
    apex = rows // 2 - 1
    if rows < 4:
        raise ValueError(f"prediction needs at least 4 patches along axis 0, got grid_size {grid}")
    if min(lateral) < apex + 1:
        raise ValueError(f"grid_size {grid}: a context of {apex + 1} rows needs {apex + 1} patches on the other axes")
    if skip < 0 or rows - apex - 1 - skip < 1:
        raise ValueError(f"skip {skip} of the {rows - apex - 1} rows ahead in grid_size {grid}: one must remain")

    def patch(row: int, place: Sequence[int]) -> int:
        mirrored = [min(abs(v), 2 * (n - 1) - abs(v)) for v, n in zip(place, lateral)]
        return int(np.ravel_multi_index((row, *mirrored), grid))

    context, target = [], []
    for column in product(*map(range, lateral)):
        windows = [product(*(range(c - apex + r, c + apex - r + 1) for c in column)) for r in range(apex + 1)]
        context.append([patch(r, place) for r, window in enumerate(windows) for place in window])
        target.append([patch(r, column) for r in range(apex + 1 + skip, rows)])
    return torch.tensor(context), torch.tensor(target)


class CPCNet(nn.Module):
    """Predicts the codes of the rows of patches ahead from a pyramid of codes behind (3D-CPC).

    Source: section 3 of arXiv 2006.03829. Differs from the released code (`HealthML/self-supervised-3d-tasks`): each
    patch is encoded once and the context gathered from codes (released: 384 encodings for 64 patches), and places
    outside the grid are mirrored, not zero. ``code_size=1024, pool="flatten"`` gives the released network.

    Args:
        encoder: returns a list of maps, finest first, of which the last is used; kept as ``encoder``.
        in_features: width F of the pooled map.
        grid_size: patches per axis, as they lie in C order on the axis after the batch.
        code_size: width D of the codes.
        context_size: width of the GRU's state.
        skip: rows left out after the apex, see :func:`cpc_indices`.
        pool: "avg" (F = channels), cells per axis g (F = channels * g^d), or "flatten".
        spatial_dims: 2 or 3.

    Shapes:
        ``(B, P, C, *s)`` -> prediction and target, each ``(B, Q, K, D)``; both carry gradient.

    Raises:
        ValueError: a grid that :func:`cpc_indices` refuses or that has not ``spatial_dims`` axes, unknown ``pool``, an
            input of another shape or number of patches.
    """

    context_index: torch.Tensor
    target_index: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        in_features: int,
        grid_size: int | Sequence[int] = 4,
        code_size: int = 128,
        context_size: int = 256,
        skip: int = 0,
        pool: str | int = "avg",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.pool = LastMapPool(pool, spatial_dims)
        self.spatial_dims = spatial_dims
        self.grid_size = ensure_tuple_rep(grid_size, spatial_dims)
        context, target = cpc_indices(self.grid_size, skip)
        self.register_buffer("context_index", context, persistent=False)
        self.register_buffer("target_index", target, persistent=False)
        self.encoder = encoder
        self.code = nn.Linear(in_features, code_size)
        self.context = nn.GRU(code_size, context_size, batch_first=True)
        self.predictors = nn.Linear(context_size, target.shape[1] * code_size)  # one head for each of the K rows

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features ``(N, F)`` of patches ``(N, C, *s)``."""
        return self.pool(self.encoder(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes ``(B, P, D)`` of patches ``(B, P, C, *s)``, in one call of the encoder."""
        if x.ndim != self.spatial_dims + 3 or x.shape[1] < 1:
            raise ValueError(f"input {tuple(x.shape)} must be (B, P, C, *s) with {self.spatial_dims} spatial axes")
        return self.code(self.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (B * P, D) -> (B, P, D)

    def predict_from(self, terms: torch.Tensor) -> torch.Tensor:
        """Predicted codes ``(N, K, D)`` of the rows ahead, from context codes ``(N, T, D)`` in their order."""
        _, state = self.context(terms)  # (1, N, H)
        return self.predictors(state[0]).unflatten(1, (-1, terms.shape[2]))  # (N, K * D) -> (N, K, D)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = prod(self.grid_size)
        if x.ndim > 1 and x.shape[1] != patches:
            raise ValueError(f"input {tuple(x.shape)} has {x.shape[1]} patches, grid {self.grid_size} has {patches}")
        codes = self.encode(x)
        terms = codes[:, self.context_index]  # (B, Q, T, D)
        prediction = self.predict_from(terms.flatten(0, 1)).unflatten(0, terms.shape[:2])  # (B * Q, K, D)
        return prediction, codes[:, self.target_index]
