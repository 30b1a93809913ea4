# SPDX-License-Identifier: Apache-2.0
"""Global contrast of slices: find the slices that show the same anatomy among those of other partitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._precision import full_precision, no_autocast, unit_rows
from ._slice_pairs import MODES, slice_pairs
from .gather import gather_ids, gather_with_grad

__all__ = ["PartitionContrastiveLoss", "masked_info_nce"]


def masked_info_nce(embeddings: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over pairs (a, b) of -log[e^s_ab / (e^s_ab + sum of e^s_an over the negatives n of a)], s the cosine / t.

    Source: the global loss of arXiv 2006.10511, whose printed sum of both directions over the number of pairs is twice
    the mean over directed pairs; the released code divides by other numbers (G^D: 4 times the mean). The positive is
    not among the negatives, and other positives of the anchor are in no denominator.

    Args:
        embeddings: (N, D).
        positives: (N, N), bool or weights that are not negative; True at [a, b] where b is a positive of anchor a.
        negatives: (N, N) bool, likewise.
        temperature: divides the cosines.

    Returns:
        0-dim tensor; 0 with zero gradient without any positive. An anchor without negatives counts 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    wanted = (len(embeddings), len(embeddings))
    if embeddings.ndim != 2 or positives.shape != wanted or negatives.shape != wanted:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} must be (N, D), positives {tuple(positives.shape)} and negatives "
            f"{tuple(negatives.shape)} (N, N)"
        )
    with no_autocast(embeddings):
        z = unit_rows(embeddings, 1e-12)
        scores = z @ z.T / temperature
        against = masked_logsumexp(scores, negatives)[:, None]  # (N, 1)
        return mean_of_pairs(pair_terms(against, scores), positives)


class PartitionContrastiveLoss(nn.Module):
    """Slices of one partition are alike across volumes: G^R, G^D- and G^D of the global contrast.

    Source: arXiv 2006.10511; pairs see :func:`slice_pairs`, value see :func:`masked_info_nce`. The items are those of
    all processes, each of which computes the loss of the joined batch. Chance level: ln(1 + number of negatives).

    Args:
        mode: "GR", "GD-" or "GD".
        temperature: divides the cosines.
        gather: whether items of all processes are contrasted, or each process has its own batch.

    Shapes:
        embeddings (N, D), ids (N,) integers on the same device; 0-dim result in float32, also under autocast, or
        float64.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, ids that are missing or do not fit, or different N
            on the processes.
    """

    def __init__(self, mode: str = "GD", temperature: float = 0.1, gather: bool = True) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.mode, self.temperature, self.gather = mode, temperature, gather

    def forward(
        self,
        embeddings: Tensor,
        source: Tensor,
        partition: Tensor | None = None,
        volume: Tensor | None = None,
        view: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch.

        Args:
            embeddings: (N, D).
            source: identity of the slice, see :func:`slice_pairs`.
            partition: likewise; for "GD-" and "GD".
            volume: likewise; for "GD".
            view: likewise; may be None.
        """
        check_length(embeddings, source, "embeddings (N, D)")
        ids: list[Tensor | None] = [source, partition, volume, view]
        with no_autocast(embeddings):
            z = full_precision(embeddings)
            if self.gather:
                z, ids = gather_with_grad(z), gather_ids(ids)
            positives, negatives = slice_pairs(self.mode, *ids)  # type: ignore[arg-type]
            return masked_info_nce(z, positives, negatives, self.temperature)


def check_length(features: Tensor, source: Tensor, meant: str) -> None:
    """Raise unless there is one source for each row."""
    if tuple(source.shape) != (len(features),):
        raise ValueError(f"source {tuple(source.shape)} must be (N,), one for each row of {meant}, which has "
                         f"{tuple(features.shape)}")  # fmt: skip


def pair_terms(against: Tensor, positive: Tensor) -> Tensor:
    """-log[e^p / (e^p + e^n)] of scores p and logsumexps n of negatives."""
    # torch's threshold of 20 would cut 2e-9 off, which float64 can tell
    return F.softplus(against - positive, threshold=40)


def masked_logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis, of the scores where the mask is True; hardly above -max/2 where it is nowhere."""
    # finite, since sums and differences of infinities are no numbers
    floor = -torch.finfo(scores.dtype).max / 2
    return torch.where(mask, scores, floor).logsumexp(-1)


def mean_of_pairs(terms: Tensor, weights: Tensor) -> Tensor:
    """Mean of the terms (N, N) weighted by `weights`, or 0 with zero gradient where these are all 0."""
    weights = weights.to(terms.dtype)
    return (terms * weights).sum() / weights.sum().clamp_min(torch.finfo(terms.dtype).tiny)
