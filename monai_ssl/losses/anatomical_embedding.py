# SPDX-License-Identifier: Apache-2.0
"""SAM: corresponding cells of two views attract each other, hard other cells repel each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from ..transforms.view_geometry import feature_affine, vector_like
from ._pair_products import vectors_and_products
from ._precision import full_precision, no_autocast
from .gather import gather_rows
from .pair_sampling import GlobalPairSampler, LocalPairSampler, PairSamples, valid_cells

__all__ = ["AnatomicalEmbeddingLoss", "info_nce", "pair_contrast_loss"]


def info_nce(positive: Tensor, negatives: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """logsumexp([p, n_1, ..] / t) - p / t, for every row.

    Source: the contrastive terms of SAM (arXiv 2012.02383). With all similarities equal ln(1 + number of negatives).

    Args:
        positive: similarities, (...).
        negatives: similarities, (..., K).
        temperature: t.
        mask: False for negatives that do not count, (..., K).

    Returns:
        (...) in float32, or float64 for such similarities; 0 for a row without negatives.
    """
    with no_autocast(positive):
        p, n = full_precision(positive) / temperature, full_precision(negatives) / temperature
        if mask is not None:
            n = n.masked_fill(~mask, float("-inf"))
        return torch.cat([p[..., None], n], -1).logsumexp(-1) - p


def pair_contrast_loss(
    embedding: Tensor, samples: PairSamples, temperature: float = 0.5, joined: Tensor | None = None
) -> Tensor:
    """Mean over volumes of the mean over a volume's anchors, of both directions together, of :func:`info_nce`.

    Source: SAM (arXiv 2012.02383); similarities are those of this map alone, also for negatives that were found with
    another one's help. Anchors, positives and negatives get gradients. A volume without anchors counts 0.

    Args:
        embedding: unit vectors, (2B, C, *s), rows v * B + b.
        samples: where it has a `positive_index`, the positive is the other view's map there, interpolated linearly and
            renormalised, unless `positives` names a cell of the anchor's own view.
        temperature: divides the similarities.
        joined: rows that ``samples.diverse`` counts, those of all processes; None for `embedding`.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: numbers of rows that do not fit.
    """
    volumes = len(samples.anchors)
    if len(embedding) != 2 * volumes:
        raise ValueError(f"embedding {tuple(embedding.shape)} must have two rows for each of {volumes} volumes")
    with no_autocast(embedding):
        maps = full_precision(embedding)
        view, cells = torch.arange(2, device=maps.device)[:, None], maps[0, 0].numel()
        ends = torch.cat([samples.anchors + view * cells, samples.positives], 1).flatten(1)  # (B, 4A)
        picked, negatives = vectors_and_products(maps.flatten(2), ends, samples.negatives.flatten(1, 2))
        query, key = picked.chunk(2, 1)  # (B, 2A, C)
        if samples.positive_index is not None:
            own = (samples.positives // cells == view).flatten(1)
            key = torch.where(own[..., None], key, _interpolated(maps, samples.positive_index))
        mask = samples.negative_mask.flatten(1, 2)
        if samples.diverse is not None:
            others = maps if joined is None else full_precision(joined)
            shared = others.flatten(2).transpose(1, 2).flatten(0, 1)[samples.diverse]  # (B, 2, R, C)
            more = (query.unflatten(1, (2, -1)) @ shared.mT).flatten(1, 2)  # (B, 2A, R)
            negatives, mask = torch.cat([negatives, more], 2), F.pad(mask, (0, more.shape[2]), value=True)
        rows = info_nce((query * key).sum(2), negatives, temperature, mask)  # (B, 2A)
        counts = samples.anchor_mask.flatten(1)
        return (torch.where(counts, rows, 0.0).sum(1) / counts.sum(1).clamp_min(1)).mean()


class AnatomicalEmbeddingLoss(nn.Module):
    """The loss of SAM (arXiv 2012.02383): the sum of its local and of its global term.

    Hyper-parameters are those of the released configs. The two differ from the released code in what is excluded, see
    :class:`LocalPairSampler` and :class:`GlobalPairSampler`, and the local term of views that do not overlap has the
    negatives of any other. Chance, with all similarities equal, is ln 501 + ln 1201. With ``gather`` the gradient is
    that of the joined batch of all processes, given the same samples. The terms of the last call stay in
    ``last_terms``, detached: (local, global).

    Padding tells a network where in the view a cell is, and a view that nearly fills the volume so tells the place in
    the body: volumes should be at least twice the view along each axis. Pairs that do not overlap are solved by any map
    that tells cells apart, so losses compare only at equal shares of such pairs.

    Args:
        roi_size: voxels of a view, one number or one per axis.
        local_sampler: None for ``LocalPairSampler()``.
        global_sampler: None for ``GlobalPairSampler()``.
        temperature: divides the similarities.
        gather: draw diverse negatives among the volumes of all processes; otherwise of the own.
        chunk_size: anchors whose similarities are in memory at a time.

    Shapes:
        input [local (2B, C, *s), global (2B, D, *t), ..], rows v * B + b, of which further ones are not looked at;
        target: index in the view -> world in mm, (B, 2, n + 1, n + 1), or {"view_affine": that, "valid": (2B, 1, *roi),
        above 0.5 where a voxel counts}. 0-dim result, float32 also under autocast, or float64.

    Raises:
        ValueError: an odd number of rows, matrices of another number of volumes, views that are not a whole number of
            cells.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        local_sampler: LocalPairSampler | None = None,
        global_sampler: GlobalPairSampler | None = None,
        temperature: float = 0.5,
        gather: bool = True,
        chunk_size: int = 128,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.roi_size, self.temperature, self.gather, self.chunk_size = roi_size, temperature, gather, chunk_size
        self.local_sampler = LocalPairSampler() if local_sampler is None else local_sampler
        self.global_sampler = GlobalPairSampler() if global_sampler is None else global_sampler
        self.last_terms: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        input: Sequence[Tensor],
        target: Tensor | Mapping[str, Tensor],
        samples: tuple[PairSamples, PairSamples] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Local and global term together.

        Args:
            input: see the class.
            target: see the class.
            samples: of the local and of the global map, in place of what would be drawn.
            generator: for what is drawn.
        """
        fine, coarse = self.terms(input, target, samples, generator)
        self.last_terms = (fine.detach(), coarse.detach())
        return fine + coarse

    def terms(
        self,
        input: Sequence[Tensor],
        target: Tensor | Mapping[str, Tensor],
        samples: tuple[PairSamples, PairSamples] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Local and global term, 0-dim each; arguments of :meth:`forward`."""
        fine, coarse = full_precision(input[0]), full_precision(input[1])
        affine, valid = self._checked(fine, coarse, target)
        joined, first = gather_rows(coarse) if self.gather else (coarse, 0)
        if samples is None:
            affines = [feature_affine(affine, self._roi(affine), x.shape[2:]) for x in (fine, coarse)]
            cells = [None if valid is None else valid_cells(valid, x.shape[2:]) for x in (fine, coarse)]
            local = self.local_sampler([fine, coarse], affines[0], cells[0], self.chunk_size, generator=generator)
            rows, rank = len(joined), first // len(coarse)
            samples = local, self.global_sampler(coarse, affines[1], cells[1], rows, rank, generator=generator)
        return (
            pair_contrast_loss(fine, samples[0], self.temperature),
            pair_contrast_loss(coarse, samples[1], self.temperature, joined),
        )

    def _roi(self, affine: Tensor) -> tuple[int, ...]:
        return ensure_tuple_rep(self.roi_size, affine.shape[-1] - 1)

    def _checked(
        self, fine: Tensor, coarse: Tensor, target: Tensor | Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Matrices in float64, and which voxels count."""
        given = target if isinstance(target, Mapping) else {"view_affine": target}
        affine, valid = given["view_affine"], given.get("valid")
        shapes = tuple(fine.shape), tuple(coarse.shape), tuple(affine.shape)
        n = fine.ndim - 2
        if len(fine) % 2 or len(coarse) != len(fine) or affine.shape != (len(fine) // 2, 2, n + 1, n + 1):
            raise ValueError(
                "local {} and global {} must have two rows for each matrix of view_affine {} = "
                "(B, 2, n + 1, n + 1)".format(*shapes)
            )
        if valid is not None and (len(valid) != len(fine) or tuple(valid.shape[2:]) != self._roi(affine)):
            raise ValueError(f"valid {tuple(valid.shape)} must be (2B, 1, *roi) = {(len(fine), 1, *self._roi(affine))}")
        return affine.double(), valid


def _interpolated(maps: Tensor, index: Tensor) -> Tensor:
    """Unit vectors (B, 2A, C) of the other view's map, of (2B, C, *s), at continuous indices (B, 2, A, n) in it.

    Beyond the border the map is repeated.
    """
    axes = maps.ndim - 2
    size = vector_like(index, maps.shape[2:])
    grids = ((2 * index + 1) / size - 1).flip(-1).to(maps.dtype)  # x, y, z, as grid_sample wants them
    vectors = []
    for others, grid in zip(maps.chunk(2)[::-1], grids.unbind(1)):
        grid = grid.view(len(others), -1, *[1] * (axes - 1), axes)
        sampled = F.grid_sample(others, grid, padding_mode="border", align_corners=False)  # (B, C, A, 1, ..)
        vectors.append(sampled.flatten(2).transpose(1, 2))
    return F.normalize(torch.cat(vectors, 1), dim=2)
