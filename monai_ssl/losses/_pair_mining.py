# SPDX-License-Identifier: Apache-2.0
"""Random choices among cells, and hard negatives in blocks of anchors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..transforms.view_geometry import squared_distance
from ._pair_rows import Rows, Scores

__all__ = ["HardNegatives", "choose", "choose_negatives"]

NOTHING = float("-inf")


def choose(eligible: Tensor, num: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The eligible places with the largest keys: with random keys a draw without replacement.

    Source: the draws of SAM (arXiv 2012.02383), of fixed shape however many places are eligible.

    Args:
        eligible: (..., V) bool.
        num: how many; at most V are returned.
        keys: in [0, 1), (..., V).

    Returns:
        Places (..., min(num, V)), and a mask that is False where there were no more eligible ones.
    """
    index = torch.where(eligible, keys, -1.0).topk(min(num, eligible.shape[-1])).indices
    return index, eligible.gather(-1, index)


def choose_negatives(
    score: Tensor,
    negatives: Sequence[int],
    keys: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Some of the candidates with the highest scores, drawn at random.

    Source: SAM (arXiv 2012.02383), e.g. 500 of the top 2000. The draw is by rank; by position it would take the first
    cells of the map.

    Args:
        score: (..., P); -inf for what must not be drawn.
        negatives: number of candidates, and of those drawn from them.
        keys: in [0, 1), (..., candidates), by rank: keys[..., 0] is that of the best score; None draws them.
        generator: for the draw.

    Returns:
        Places (..., min(drawn, candidates, P)), and a mask that is False where there were no more.

    Raises:
        ValueError: fewer keys than candidates.
    """
    candidates = min(negatives[0], score.shape[-1])
    best = score.topk(candidates)
    if keys is None:
        keys = torch.rand(best.values.shape, generator=generator, device=score.device)
    elif keys.shape[-1] < candidates:
        raise ValueError(f"keys {tuple(keys.shape)} for {candidates} candidates")
    rank, mask = choose(best.values > NOTHING, negatives[1], keys[..., :candidates])
    return best.indices.gather(-1, rank), mask


class HardNegatives:
    """What the samplers of both levels have in common: what is excluded, and how negatives are drawn.

    Args:
        exclusion_radius: mm around the anchor, in both views, that are excluded.
        negatives: candidates by score, and how many are drawn of them.
        exclude: "inf": excluded cells, the positive and invalid cells are never drawn; "zero": excluded cells are
            scored 0, the others are as any cell.

    Raises:
        ValueError: an unknown ``exclude``, or numbers below 1.
    """

    def __init__(self, exclusion_radius: float, negatives: Sequence[int], exclude: str) -> None:
        if exclude not in ("inf", "zero"):
            raise ValueError(f"exclude must be 'inf' or 'zero', got {exclude!r}")
        if not exclusion_radius >= 0:
            raise ValueError(f"exclusion_radius must not be negative, got {exclusion_radius} mm")
        if len(negatives) != 2 or min(negatives) < 1:
            raise ValueError(f"negatives must be numbers of candidates and of those drawn, got {tuple(negatives)}")
        self.exclusion_radius, self.negatives, self.exclude = exclusion_radius, tuple(negatives), exclude

    def _keys(self, keys: Tensor | None, like: Tensor, cells: int, generator: torch.Generator | None) -> Tensor:
        """Keys (B, 2, A, candidates) for anchors `like` (B, 2, A) in maps of so many cells, drawn where None."""
        candidates = min(self.negatives[0], 2 * cells)
        if keys is None:
            return torch.rand(*like.shape, candidates, generator=generator, device=like.device)
        anchors = like.shape[2]
        if keys.ndim != 4 or keys.shape[:2] != like.shape[:2] or keys.shape[2] < anchors or keys.shape[3] < candidates:
            raise ValueError(
                f"negative_keys {tuple(keys.shape)} must be (B, 2, A, candidates) = {(*like.shape, candidates)}"
            )
        return keys[:, :, :anchors]  # small maps have fewer cells than anchors are asked for

    def _pool(self, valid: Tensor) -> Tensor:
        """Cells (B, 2, N) that may be drawn, of those that are valid."""
        return valid if self.exclude == "inf" else torch.ones_like(valid)

    def _hard_negatives(
        self, scores: Iterable[Scores], rows: Rows, size: Sequence[int], pool: Tensor, keys: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Negatives of every anchor.

        Args:
            scores: of each volume.
            rows: the anchors.
            size: cells along each axis.
            pool: cells that may be drawn, (B, 2, N) bool.
            keys: (B, 2, A, candidates).
            chunk_size: anchors whose similarities are in memory at a time.

        Returns:
            Cells of the pool (B, 2, A, K), whether they count, and whether they are excluded by the radius.
        """
        found = []
        for b, score_of in enumerate(scores):
            forbidden, own_keys = ~pool[b].flatten(), keys[b].flatten(0, 1)
            for start in range(0, len(own_keys), chunk_size):
                part = slice(start, start + chunk_size)
                score, near = score_of(part), self._near(rows, b, part, size)
                if self.exclude == "zero":
                    score.masked_fill_(near, 0.0)
                else:
                    score.masked_fill_(near, NOTHING).scatter_(1, rows.positives[b, part, None], NOTHING)
                index, mask = choose_negatives(score.masked_fill_(forbidden, NOTHING), self.negatives, own_keys[part])
                found.append((index, mask, near.gather(1, index)))
        index, mask, near = (torch.cat(parts).view(*keys.shape[:3], -1) for parts in zip(*found))
        return index, mask, near

    def _near(self, rows: Rows, volume: int, part: slice, size: Sequence[int]) -> Tensor:
        """Cells of both views within the radius of anchors, (rows, 2N) bool."""
        squares = squared_distance(rows.place[volume, part], size, rows.spacing[volume])  # mm², (rows, 2, N)
        return (squares < self.exclusion_radius**2).flatten(1)
