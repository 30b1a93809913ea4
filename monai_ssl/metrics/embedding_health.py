# SPDX-License-Identifier: Apache-2.0
"""Numbers that show whether embeddings of different images still differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.metrics import compute_embedding_collapse

__all__ = ["effective_rank", "embedding_std", "uniformity"]


def embedding_std(embeddings: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the rows of L2-normalised embeddings, averaged over the D dimensions.

    Source: SimSiam, section 4.1 (arXiv 2011.10566). 0 when all rows point the same way, about ``1 / sqrt(D)`` when they
    point everywhere. It is lower for healthy encoders whose features share a large mean.

    Args:
        embeddings: (N, D), N >= 2.

    Returns:
        0-dim float32 tensor (float64 for float64 embeddings).

    Raises:
        ValueError: when ``embeddings`` is not (N, D) with N >= 2.
    """
    return F.normalize(_checked(embeddings), dim=1).std(dim=0).mean()


def effective_rank(embeddings: torch.Tensor) -> torch.Tensor:
    """Number of directions that the embeddings fill: exp of the entropy of their normalised singular values.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, on the centred embeddings, by way of MONAI's
    ``compute_embedding_collapse`` (whose score is ``1 - effective_rank / min(N - 1, D)``). That score has no scale:
    rows which are equal up to rounding would seem to fill the whole space. Here such rows give 0.

    Args:
        embeddings: (N, D), N >= 2.

    Returns:
        0-dim tensor between 0 (all rows equal) and ``min(N - 1, D)``.

    Raises:
        ValueError: when ``embeddings`` is not (N, D) with N >= 2.
    """
    embeddings = _checked(embeddings)
    num, dim = embeddings.shape
    scores = compute_embedding_collapse(embeddings, reduction="none", include_indicators=["effective_rank"])
    rank = (1 - scores["effective_rank_score"]) * min(num - 1, dim)
    spread = (embeddings - embeddings.mean(dim=0)).norm()
    rounding = torch.finfo(torch.float32).eps * max(num, dim) * embeddings.norm()
    return torch.where(spread > rounding, rank, torch.zeros_like(rank))


def uniformity(embeddings: torch.Tensor, t: float = 2.0) -> torch.Tensor:
    """Logarithm of the mean Gaussian potential over all pairs of L2-normalised embeddings.

    Source: Wang and Isola, section 4.1.2 (arXiv 2005.10242). 0 when all rows are equal, falling to about ``-2 t`` for
    rows spread evenly over a sphere of many dimensions.

    Args:
        embeddings: (N, D), N >= 2.
        t: sharpness of the Gaussian.

    Returns:
        0-dim tensor, at most 0.

    Raises:
        ValueError: when ``embeddings`` is not (N, D) with N >= 2.
    """
    squared = torch.pdist(F.normalize(_checked(embeddings), dim=1)).square()
    return squared.mul(-t).exp().mean().log()


def _checked(embeddings: torch.Tensor) -> torch.Tensor:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must be (N, D) with at least 2 rows, got shape {tuple(embeddings.shape)}.")
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()
