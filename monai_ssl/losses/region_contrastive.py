# SPDX-License-Identifier: Apache-2.0
"""Local contrast of regions: a place of a map is like itself in another view and unlike the other places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._precision import full_precision, no_autocast, unit_rows
from ._slice_pairs import slice_pairs
from .gather import gather_ids, gather_with_grad
from .partition_contrastive import check_length, masked_logsumexp, mean_of_pairs, pair_terms
from .region_places import (
    LATTICE_SIZES,
    check_regions,
    published_regions,
    region_negatives,
    region_places,
    region_starts,
    region_vectors,
)

__all__ = [
    "RegionContrastiveLoss",
    "published_regions",
    "region_info_nce",
    "region_negatives",
    "region_starts",
    "region_vectors",
]

MODES = {"LR": "GR", "LD": "GD"}  # local -> the global mode with the same positive pairs


def region_info_nce(
    regions: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.1, matched: Tensor | None = None
) -> Tensor:
    """Mean over pairs of maps (a, b) and regions r of the contrast of a_r with b_r against other regions of both maps.

    Source: the local loss of arXiv 2006.10511. Each term is -log[e^p / (e^p + sum of e^n)] with p the cosine / t of a_r
    and b_r and n those of a_r and a_q, and of a_r and b_q, for the negatives q of r. `matched` is not in the paper:
    these negatives cannot be told by their place, which with zero padding is all that the others ask for.

    Args:
        regions: vector of each region of each map, (N, R, D).
        positives: (N, N), bool or weights that are not negative; True at [a, b] where b is a positive of a.
        negatives: (R, R) bool, on the CPU. A region without any is no anchor.
        temperature: divides the cosines.
        matched: (N, N) bool; where True at [a, m], m_r is a negative of a_r for each region r. None: nowhere.

    Returns:
        0-dim tensor; 0 with zero gradient without any positive.

    Raises:
        ValueError: shapes that do not fit, or no region has negatives.
    """
    num, places = regions.shape[0], regions.shape[1] if regions.ndim == 3 else 0
    pairs = [tuple(positives.shape)] + ([] if matched is None else [tuple(matched.shape)])
    if any(shape != (num, num) for shape in pairs) or not places or negatives.shape != (places, places):
        raise ValueError(
            f"regions {tuple(regions.shape)} must be (N, R, D), positives and matched {pairs} (N, N) and negatives "
            f"{tuple(negatives.shape)} (R, R)"
        )
    anchors = [r for r, some in enumerate(negatives.any(1).tolist()) if some]
    if not anchors:
        raise ValueError(f"no row of negatives {tuple(negatives.shape)} has any")
    with no_autocast(regions):
        z = unit_rows(regions, 1e-12)
        number = torch.tensor(anchors).to(z.device, non_blocking=True)
        anchor = z if len(anchors) == places else z.index_select(1, number)
        scores = anchor.flatten(0, 1) @ z.flatten(0, 1).T / temperature  # (N A, N R)
        scores = scores.view(num, len(anchors), num, places)
        same = scores.gather(3, number[:, None, None].expand(num, -1, num, 1)).squeeze(3)  # (N, A, N): a_r and b_r
        mask = negatives[anchors].to(z.device, non_blocking=True)
        others = masked_logsumexp(scores, mask[:, None])  # (N, A, N): a_r and b_q
        own = others.diagonal(dim1=0, dim2=2).T[..., None]  # (N, A, 1): a_r and a_q
        against = torch.logaddexp(own, others)
        if matched is not None:
            against = torch.logaddexp(against, masked_logsumexp(same, matched[:, None])[..., None])
        return mean_of_pairs(pair_terms(against, same).mean(1), positives)


class RegionContrastiveLoss(nn.Module):
    """Regions of a map are like the same regions of another view, and unlike the other regions of both: L^R and L^D.

    Source: arXiv 2006.10511; value see :func:`region_info_nce`. L^D adds the same view of other volumes' slices of the
    partition to the positives. The released code (`krishnabits001/domain_specific_cl`) contrasts a few picked places
    (``regions="published"``) and in L^D anchors of the first view only; here all others, and both directions. The items
    are those of all processes, each of which computes the loss of the joined batch. Chance level of 2D lattice regions:
    ln 25, with matched negatives ln(25 + number of them).

    Args:
        mode: "LR" or "LD".
        temperature: divides the cosines.
        region_size: cells K of a region along each axis; not used for region vectors.
        matched_negatives: whether the same region of slices of other partitions is a negative too. Without it, place
            alone solves the task: zero padding gives every place a signature of its own.
        regions: "lattice", see :func:`region_starts`, or "published", see :func:`published_regions`.

    Shapes:
        features: maps (N, C, *size) with 2 or 3 spatial axes of at least 5 K cells (published: 16), or region vectors
        (N, R, D) with R = 13 in 2D, 35 in 3D (published: 17); ids (N,) integers on the same device; 0-dim result in
        float32, also under autocast, or float64.

    Raises:
        ValueError: unknown mode or regions, a temperature that is not positive, maps that are too small, another number
            of region vectors, ids that are missing or do not fit, or different N on the processes.
    """

    def __init__(
        self,
        mode: str = "LR",
        temperature: float = 0.1,
        region_size: int = 3,
        matched_negatives: bool = False,
        regions: str = "lattice",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        check_regions(regions, region_size)
        self.mode, self.temperature, self.region_size = mode, temperature, region_size
        self.matched_negatives, self.regions = matched_negatives, regions

    def forward(
        self,
        features: Tensor,
        source: Tensor,
        partition: Tensor | None = None,
        volume: Tensor | None = None,
        view: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch.

        Args:
            features: maps (N, C, *size) or region vectors (N, R, D).
            source: identity of the slice, (N,), see :func:`slice_pairs`.
            partition: number of its partition; for "LD", and for matched negatives, which are else those of any other
                slice.
            volume: identity of its scan; for "LD".
            view: number of the view; None: "LD" pairs all views of different volumes.
        """
        check_length(features, source, "features (N, ...)")
        if self.mode == "LD" and (partition is None or volume is None):
            raise ValueError("mode 'LD' needs partition and volume")
        with no_autocast(features):
            vectors, negatives = self._vectors(full_precision(features))
            vectors = gather_with_grad(vectors)
            source, *others = gather_ids([source, partition, volume, view])  # type: ignore[assignment]
            positives, _ = slice_pairs(MODES[self.mode], source, *others)
            matched = None
            if self.matched_negatives:
                _, matched = slice_pairs("GR" if others[0] is None else "GD-", source, others[0])
            return region_info_nce(vectors, positives, negatives, self.temperature, matched)

    def _vectors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Region vectors (N, R, D), and the negatives of each region."""
        picked = 5 if self.mode == "LR" else 4
        if features.ndim != 3:
            starts, negatives = region_places(self.regions, tuple(features.shape[2:]), self.region_size, picked)
            return region_vectors(features, starts, self.region_size), negatives
        wanted = [17] if self.regions == "published" else list(LATTICE_SIZES)
        if features.shape[1] not in wanted:
            raise ValueError(
                f"features {tuple(features.shape)} have {features.shape[1]} region vectors, {self.regions} regions are "
                f"{' or '.join(map(str, wanted))}"
            )
        if self.regions == "published":
            return features, published_regions((16, 16), picked)[1]
        return features, ~torch.eye(features.shape[1], dtype=torch.bool)
