# SPDX-License-Identifier: Apache-2.0
"""Which cells of two views attract and which repel each other in SAM (arXiv 2012.02383): indices, without gradient.

B volumes with two views each, N cells in a map; rows of a batch are v * B + b. The pool of a pair is [0, N) for view 1
and [N, 2N) for view 2. All shapes depend on shapes alone, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms.view_geometry import transform_points, voxel_index
from ._pair_mining import HardNegatives, choose, choose_negatives
from ._pair_rows import Pairing, make_rows, pair_views, single_scores, summed_scores, within
from ._precision import full_precision, no_autocast

__all__ = ["GlobalPairSampler", "LocalPairSampler", "PairSamples", "choose", "choose_negatives", "valid_cells"]

MARGIN = 0.5  # mm beyond the least distance, where the grids of a pair miss each other
GLOBAL_CHUNK = 1024  # anchors; a global map has few cells


class PairSamples(NamedTuple):
    """Anchors, their positives and negatives: A anchors per view of a volume and K negatives each.

    Source: the terms of SAM's loss (arXiv 2012.02383). Masks are True where an entry counts; the others hold indices
    within range, of no meaning.
    """

    anchors: Tensor  # cell in its own view, (B, 2, A)
    positives: Tensor  # index in the pool, (B, 2, A)
    negatives: Tensor  # index in the pool, (B, 2, A, K); 2N is the zero vector
    anchor_mask: Tensor  # (B, 2, A) bool
    negative_mask: Tensor  # (B, 2, A, K) bool
    positive_index: Tensor | None = None  # continuous index in the other view, (B, 2, A, n)
    diverse: Tensor | None = None  # row * N + cell in the joined batch, (B, 2, R), for all anchors of a view


def valid_cells(valid: Tensor, size: Sequence[int]) -> Tensor:
    """Cells of a map of which at least half of the voxels count.

    Args:
        valid: above 0.5 where a voxel counts, (2B, 1, *roi), rows v * B + b.
        size: cells of the map along each axis.

    Returns:
        (B, 2, N) bool.

    Raises:
        ValueError: another shape, or a view that is not a whole number of cells along an axis.
    """
    roi = tuple(valid.shape[2:])
    if valid.ndim != len(size) + 2 or valid.shape[1] != 1 or len(valid) % 2:
        raise ValueError(f"valid {tuple(valid.shape)} must be (2B, 1, *roi) for a map of {tuple(size)} cells")
    if any(f < 1 or v % f for v, f in zip(roi, size)):
        raise ValueError(f"valid of {roi} voxels does not divide into a map of {tuple(size)} cells")
    stride = [v // f for v, f in zip(roi, size)]
    blocks = (valid > 0.5).reshape(len(valid), *chain(*zip(size, stride)))  # (2B, f1, s1, f2, s2, ..)
    counts = blocks.sum([2 * axis + 2 for axis in range(len(size))])  # (2B, *size)
    total = blocks[0].numel() // counts[0].numel()
    return (2 * counts >= total).flatten(1).unflatten(0, (2, -1)).transpose(0, 1)


class LocalPairSampler(HardNegatives):
    """Anchors where two views overlap, with the nearest cell of the other view as positive, and hard negatives.

    Source: SAM (arXiv 2012.02383) with the numbers of its released configs. The released sampler scores excluded
    cells 0 and may so draw them; here they are never drawn, unless ``exclude="zero"``. Where the views of a volume do
    not overlap, anchors and negatives come from view 1, each anchor its own positive.

    Args:
        num_anchors: anchors per view, drawn among all cells that qualify.
        positive_radius: mm; a cell qualifies when the nearest one of the other view is nearer. Where none is, those
            do that are less than 0.5 mm farther than the nearest of all.
        exclusion_radius: mm around the anchor, in both views, from which no negatives come.
        negatives: candidates by summed local and global similarity, and how many are drawn of them.
        positives: "nearest", or "interpolated": the other view's map at the anchor's very place, whatever the radius.
        exclude: "inf", or "zero" as released; then the positive and invalid cells may be drawn, too.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_anchors: int = 100,
        positive_radius: float = 2.0,
        exclusion_radius: float = 20.0,
        negatives: Sequence[int] = (2000, 500),
        positives: str = "nearest",
        exclude: str = "inf",
    ) -> None:
        if not positive_radius > 0:
            raise ValueError(f"positive_radius must be above 0 mm, got {positive_radius}")
        if num_anchors < 1:
            raise ValueError(f"num_anchors must be at least 1, got {num_anchors}")
        if positives not in ("nearest", "interpolated"):
            raise ValueError(f"positives must be 'nearest' or 'interpolated', got {positives!r}")
        self.num_anchors, self.positive_radius, self.positives = num_anchors, positive_radius, positives
        super().__init__(exclusion_radius, negatives, exclude)

    @torch.no_grad()
    def __call__(
        self,
        maps: Sequence[Tensor],
        affines: Tensor,
        valid: Tensor | None = None,
        chunk_size: int = 128,
        anchor_keys: Tensor | None = None,
        negative_keys: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PairSamples:
        """Draw anchors and negatives.

        Args:
            maps: local and global embeddings, (2B, C, *s) and (2B, D, *t); further ones are not looked at.
            affines: index in the local map -> world in mm, (B, 2, n + 1, n + 1).
            valid: cells of the local map that may be anchor, positive or negative, (B, 2, N) bool; None for all.
            chunk_size: anchors whose similarities are in memory at a time.
            anchor_keys: in [0, 1), (B, 2, N); the largest are chosen. None draws them.
            negative_keys: in [0, 1), (B, 2, A, candidates), by rank; more of either are left out. None draws them.
            generator: for what is drawn.

        Raises:
            ValueError: shapes that do not fit.
        """
        with no_autocast(maps[0]):
            fine, coarse = _pairs(maps[0], affines), _pairs(maps[1], affines)
            size, device = fine.shape[3:], fine.device
            pairing = pair_views(affines, size, valid)
            inside = pairing.both_valid & within(pairing, size)
            alone, first = ~inside.flatten(1).any(1), torch.arange(2, device=device)[:, None] == 0
            eligible = torch.where(alone[:, None, None], pairing.valid & first, self._eligible(pairing, inside))
            if anchor_keys is None:
                anchor_keys = torch.rand(eligible.shape, generator=generator, device=device)
            anchors, anchor_mask = choose(eligible, self.num_anchors, anchor_keys)
            rows = make_rows(pairing, affines, size, anchors, alone)
            pool = self._pool(pairing.valid) & (first | ~alone[:, None, None])
            keys = self._keys(negative_keys, anchors, pool.shape[2], generator)
            scores = (summed_scores(*parts) for parts in zip(fine, coarse, anchors))
            negatives, negative_mask, _ = self._hard_negatives(scores, rows, size, pool, keys, chunk_size)
            positive_index = None
            if self.positives == "interpolated":
                pick = anchors[..., None].expand(-1, -1, -1, len(size))
                positive_index = pairing.index.gather(2, pick)
        positives = rows.positives.unflatten(1, (2, -1))
        return PairSamples(anchors, positives, negatives, anchor_mask, negative_mask, positive_index)

    def _eligible(self, pairing: Pairing, inside: Tensor) -> Tensor:
        if self.positives == "interpolated":
            return inside
        least = torch.where(inside, pairing.distance, float("inf")).amin(2, keepdim=True)
        radius = torch.where(least < self.positive_radius, self.positive_radius, least + MARGIN)
        return inside & (pairing.distance < radius)


class GlobalPairSampler(HardNegatives):
    """All cells of a coarse map that have a near one in the other view, with hard and with random negatives.

    Source: SAM (arXiv 2012.02383) with the numbers of its released configs. Released: the gate is 8 mm from view 1 to
    view 2 and 6 mm back (``axial_gate=(8.0, 6.0)``), and most positives are among their own negatives, which
    ``exclude="zero"`` replays. A pair without any such cell takes all its cells, each its own positive.

    Args:
        positive_radius: mm; the nearest cell of the other view, which need not reach the place, must be nearer.
        axial_gate: mm; it must also be nearer along the last axis of the world. One number, one for each direction,
            or None; 2D images have no such axis and no gate.
        exclusion_radius: mm around the anchor, in both views, from which no negatives come.
        negatives: candidates by similarity, and how many are drawn of them.
        num_diverse: further negatives per view, drawn among all cells of the other volumes, valid or not.
        exclude: "inf", or "zero" as released; then a drawn cell within the radius is the zero vector.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        positive_radius: float = 25.0,
        axial_gate: Sequence[float] | float | None = 6.0,
        exclusion_radius: float = 5.0,
        negatives: Sequence[int] = (250, 200),
        num_diverse: int = 1000,
        exclude: str = "inf",
    ) -> None:
        if not positive_radius > 0:
            raise ValueError(f"positive_radius must be above 0 mm, got {positive_radius}")
        gates = (axial_gate, axial_gate) if axial_gate is None or isinstance(axial_gate, (int, float)) else axial_gate
        if len(gates) != 2:
            raise ValueError(f"axial_gate must be a number, one for each direction or None, got {axial_gate}")
        if num_diverse < 0:
            raise ValueError(f"num_diverse must not be negative, got {num_diverse}")
        self.positive_radius, self.axial_gate, self.num_diverse = positive_radius, tuple(gates), num_diverse
        super().__init__(exclusion_radius, negatives, exclude)

    @torch.no_grad()
    def __call__(
        self,
        map: Tensor,
        affines: Tensor,
        valid: Tensor | None = None,
        num_rows: int | None = None,
        rank: int = 0,
        negative_keys: Tensor | None = None,
        diverse_keys: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PairSamples:
        """Draw negatives.

        Args:
            map: global embedding, (2B, C, *s).
            affines: index in the map -> world in mm, (B, 2, n + 1, n + 1).
            valid: cells that may be anchor, positive or hard negative, (B, 2, N) bool; None for all.
            num_rows: rows of the joined batch of all processes, a multiple of 2B; None for 2B.
            rank: of this process.
            negative_keys: in [0, 1), (B, 2, N, candidates), by rank. None draws them.
            diverse_keys: in [0, 1), (B, 2, num_rows * N). None draws them.
            generator: for what is drawn.

        Raises:
            ValueError: shapes that do not fit.
        """
        with no_autocast(map):
            views = _pairs(map, affines)
            size = views.shape[3:]
            pairing = pair_views(affines, size, valid)
            qualified = self._qualified(pairing, affines, size)
            alone = ~qualified.flatten(1).any(1)
            anchor_mask = torch.where(alone[:, None, None], pairing.valid, qualified)
            anchors = torch.arange(qualified.shape[2], device=map.device).expand_as(qualified)
            rows = make_rows(pairing, affines, size, anchors, alone)
            pool = self._pool(pairing.valid)
            keys = self._keys(negative_keys, anchors, pool.shape[2], generator)
            scores = (single_scores(pair) for pair in views)
            negatives, negative_mask, near = self._hard_negatives(scores, rows, size, pool, keys, GLOBAL_CHUNK)
            if self.exclude == "zero":
                negatives = negatives.masked_fill(near, 2 * pool.shape[2])
            diverse = self._diverse(anchors, num_rows, rank, diverse_keys, generator)
        positives = rows.positives.unflatten(1, (2, -1))
        return PairSamples(anchors, positives, negatives, anchor_mask, negative_mask, None, diverse)

    def _qualified(self, pairing: Pairing, affines: Tensor, size: Sequence[int]) -> Tensor:
        qualified = pairing.both_valid & (pairing.distance < self.positive_radius)
        if len(size) < 3:
            return qualified
        cells = voxel_index(size, affines.device).double()
        there = transform_points(affines.double().flip(1), cells[pairing.nearest])[..., -1]
        offset = (transform_points(affines.double(), cells)[..., -1] - there).abs()  # (B, 2, N)
        near = [
            torch.ones_like(o, dtype=torch.bool) if g is None else o < g
            for o, g in zip(offset.unbind(1), self.axial_gate)
        ]
        return qualified & torch.stack(near, 1)

    def _diverse(
        self, anchors: Tensor, num_rows: int | None, rank: int, keys: Tensor | None, generator: torch.Generator | None
    ) -> Tensor | None:
        volumes, _, cells = anchors.shape
        rows = 2 * volumes if num_rows is None else num_rows
        if rows % (2 * volumes) or not 0 <= rank < rows // (2 * volumes):
            raise ValueError(f"{rows} rows of {2 * volumes} on each process, and rank {rank}")
        num = min(self.num_diverse, (rows - 2) * cells)
        if num < 1:
            return None
        row = torch.arange(rows, device=anchors.device)
        volume = row % (2 * volumes) % volumes + volumes * (row // (2 * volumes))
        own = torch.arange(volumes, device=anchors.device) + volumes * rank
        others = volume != own[:, None]  # (B, rows)
        eligible = others[:, None, :, None].expand(-1, 2, -1, cells).flatten(2)
        if keys is None:
            keys = torch.rand(eligible.shape, generator=generator, device=anchors.device)
        elif keys.shape != eligible.shape:
            raise ValueError(f"diverse_keys {tuple(keys.shape)} must be {tuple(eligible.shape)}")
        return choose(eligible, num, keys)[0]


def _pairs(embedding: Tensor, affines: Tensor) -> Tensor:
    """Both views of every volume, (2B, C, *s) -> (B, 2, C, *s), a view of the same memory where it is in float32."""
    axes = embedding.ndim - 2
    if affines.shape != (len(embedding) // 2, 2, axes + 1, axes + 1) or len(embedding) % 2:
        raise ValueError(
            f"affines {tuple(affines.shape)} must be (B, 2, n + 1, n + 1) for maps {tuple(embedding.shape)} of 2B rows"
        )
    return full_precision(embedding).unflatten(0, (2, -1)).transpose(0, 1)
