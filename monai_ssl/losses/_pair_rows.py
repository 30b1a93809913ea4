# SPDX-License-Identifier: Apache-2.0
"""Where the cells of two views lie in each other, and how similar they are; N cells a view, n axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms.linear_resize import resize_linear
from ..transforms.view_geometry import nearest_correspondence, spacing_of, voxel_index

__all__ = ["Pairing", "Rows", "Scores", "make_rows", "pair_views", "single_scores", "summed_scores", "within"]

CHANNELS = 16  # of a coarse map that are interpolated at a time
TOLERANCE = 1e-4  # cells
EPS = 1e-12
Scores = Callable[[slice], Tensor]  # rows of one volume -> similarities to all cells of its views, (rows, 2N)


class Pairing(NamedTuple):
    """For each cell of either view of a pair what it is in the other one."""

    index: Tensor  # continuous index of its place in the other view, (B, 2, N, n) float64
    nearest: Tensor  # cell there, (B, 2, N)
    distance: Tensor  # to the centre of that cell in mm, (B, 2, N) float64
    valid: Tensor  # (B, 2, N) bool
    both_valid: Tensor  # the cell and that cell, (B, 2, N) bool


class Rows(NamedTuple):
    """The anchors of all volumes, those of view 1 before those of view 2."""

    place: Tensor  # continuous index in view 1 and in view 2, (B, 2A, 2, n) float64
    spacing: Tensor  # of either view in mm, (B, 2, n) float64
    positives: Tensor  # cell of the pool [view 1, view 2], (B, 2A)


def pair_views(affines: Tensor, size: Sequence[int], valid: Tensor | None) -> Pairing:
    """See :class:`Pairing`.

    Args:
        affines: index in the map -> world in mm, (B, 2, n + 1, n + 1).
        size: cells along each axis.
        valid: (B, 2, N) bool, or None for all.
    """
    index, nearest, distance = nearest_correspondence(affines, size)
    if valid is None:
        valid = torch.ones_like(nearest, dtype=torch.bool)
    elif valid.shape != nearest.shape:
        raise ValueError(f"valid {tuple(valid.shape)} must be (B, 2, N) = {tuple(nearest.shape)}")
    valid = valid.bool()
    return Pairing(index, nearest, distance, valid, valid & valid.flip(1).gather(2, nearest))


def within(pairing: Pairing, size: Sequence[int]) -> Tensor:
    """Cells whose place lies in the box spanned by the centres of the other view's valid cells, (B, 2, N) bool."""
    cells = voxel_index(size, pairing.index.device).to(pairing.index)
    other = pairing.valid.flip(1)[..., None]
    low = torch.where(other, cells, float("inf")).amin(2, keepdim=True)  # (B, 2, 1, n)
    high = torch.where(other, cells, float("-inf")).amax(2, keepdim=True)
    return ((pairing.index >= low - TOLERANCE) & (pairing.index <= high + TOLERANCE)).all(-1)


def make_rows(pairing: Pairing, affines: Tensor, size: Sequence[int], anchors: Tensor, alone: Tensor) -> Rows:
    """See :class:`Rows`; anchors (B, 2, A) are their own positives in volumes, (B,) bool, that stand `alone`."""
    pick = anchors[..., None].expand(-1, -1, -1, len(size))
    own, other = voxel_index(size, anchors.device).double()[anchors], pairing.index.gather(2, pick)
    first, second = torch.stack([own, other], 3).unbind(1)  # (B, A, 2, n) each, in the order own view, other view
    view, cells = torch.arange(2, device=anchors.device)[:, None], pairing.nearest.shape[2]
    there = pairing.nearest.gather(2, anchors) + (1 - view) * cells
    positives = torch.where(alone[:, None, None], anchors + view * cells, there)
    return Rows(torch.cat([first, second.flip(2)], 1), spacing_of(affines.double()), positives.flatten(1))


def single_scores(views: Tensor) -> Scores:
    """Inner products of all cells of a pair (2, C, *s) with each other; every cell is a row."""
    cells = views.flatten(2).transpose(0, 1).flatten(1)  # (C, 2N)
    return lambda part: cells[:, part].T @ cells


def summed_scores(fine: Tensor, coarse: Tensor, anchors: Tensor) -> Scores:
    """Inner products in the fine map, plus those in the coarse map brought to its size (linear) and renormalised.

    The coarse map is not kept at that size: products with its cells are, since interpolation commutes with them, and
    the lengths of the interpolated vectors.

    Args:
        fine: (2, C, *s).
        coarse: (2, D, *t).
        anchors: cells of the own view, (2, A).
    """
    size = tuple(fine.shape[2:])
    views = [(fine[v].flatten(1), coarse[v], *_lengths_and_vectors(coarse[v], size, anchors[v])) for v in range(2)]
    query = torch.cat([own[:, cells] for (own, *_), cells in zip(views, anchors)], 1).T  # (2A, C)
    coarse_query = torch.cat([vectors for *_, vectors in views], 1).T  # (2A, D)

    def score(part: slice) -> Tensor:
        total = query.new_empty(len(query[part]), len(views) * views[0][0].shape[1])
        for (own, values, length, _), columns in zip(views, total.chunk(2, 1)):
            torch.mm(query[part], own, out=columns)
            product = (coarse_query[part] @ values.flatten(1)).unflatten(1, values.shape[1:])  # (rows, *t)
            columns.addcdiv_(resize_linear(product, size).flatten(1), length)
        return total

    return score


def _lengths_and_vectors(values: Tensor, size: Sequence[int], cells: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors (D, *t) brought to a size: lengths (N,), and at some cells the unit vectors (D, A)."""
    squares, picked = values.new_zeros(()), []
    for channels in values.split(CHANNELS):
        large = resize_linear(channels, size).flatten(1)
        squares = squares + large.square().sum(0)
        picked.append(large[:, cells])
    length = squares.sqrt().clamp_min(EPS)
    return length, torch.cat(picked) / length[cells]
