# SPDX-License-Identifier: Apache-2.0
"""Vectors of cells that samples name, and their inner products, without keeping the vectors for the backward pass.

B volumes with two views each; the pool of a volume has the N cells of view 1, those of view 2, and the zero vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._precision import no_autocast

__all__ = ["vectors_and_products"]

DENSE = 8  # a product with all rows costs as much as fetching 1 / DENSE as many
BLOCK = 2**20  # numbers fetched at a time, which then stay in the cache


def vectors_and_products(maps: Tensor, picks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors `picks`, and the products of the first M of them with the K that each one names in `index`.

    Args:
        maps: (2B, C, N), rows v * B + b.
        picks: of the pool, (B, P) int64.
        index: of the pool, (B, M, K) int64, M <= P.

    Returns:
        (B, P, C) and (B, M, K), differentiable once.
    """
    if 2 * maps.shape[2] > DENSE * index.shape[2]:
        return _Products.apply(maps, picks, index)
    pool = F.pad(maps.unflatten(0, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2), (0, 0, 0, 1))  # (B, 2N + 1, C)
    picked = pool.gather(1, picks[..., None].expand(-1, -1, pool.shape[2]))
    return picked, (picked[:, : index.shape[1]] @ pool.mT).gather(2, index)


class _Products(torch.autograd.Function):
    """One view at a time, whose cells are brought into rows; what lies in the other one is the zero row."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, picks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(maps, picks, index)
        rows = _no_rows(maps)
        picked, products = maps.new_zeros(*picks.shape, maps.shape[1]), maps.new_zeros(index.shape)
        for b in range(len(picks)):
            for view in (0, 1):
                picked[b] += _fill(rows, maps, b, view)[_in_view(picks[b], maps, view)]
            for view in (1, 0):  # the rows are those of view 2 as yet
                if view == 0:
                    _fill(rows, maps, b, view)
                for q, i, out in _blocks(picked[b], _in_view(index[b], maps, view), products[b]):
                    out += (_fetched(rows, i) @ q[..., None])[..., 0]
        return picked, products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_picked: Tensor, of_products: Tensor) -> tuple[Tensor, None, None]:
        maps, picks, index = ctx.saved_tensors
        of_maps, rows, of_picked = torch.empty_like(maps), _no_rows(maps), of_picked.clone()
        volumes, num = index.shape[:2]
        with no_autocast(maps):
            for b, (pick, of_pick) in enumerate(zip(picks, of_picked)):
                query = maps.new_zeros(num, maps.shape[1])
                for view in (0, 1):
                    query += _fill(rows, maps, b, view)[_in_view(pick[:num], maps, view)]
                    for of, i, g in _blocks(of_pick, _in_view(index[b], maps, view), of_products[b]):
                        of += (g[:, None] @ _fetched(rows, i))[:, 0]
                for view in (0, 1):
                    of_rows = rows.zero_().index_add_(0, _in_view(pick, maps, view), of_pick)
                    for q, i, g in _blocks(query, _in_view(index[b], maps, view), of_products[b]):
                        of_rows.index_add_(0, i.flatten(), (g[..., None] * q[:, None]).flatten(0, 1))
                    of_maps[view * volumes + b] = of_rows[:-1].T
        return of_maps, None, None


def _no_rows(maps: Tensor) -> Tensor:
    """Room for the cells of one view and the zero vector, (N + 1, C); a vector lies in one piece."""
    return maps.new_empty(maps.shape[2] + 1, maps.shape[1])


def _fill(rows: Tensor, maps: Tensor, volume: int, view: int) -> Tensor:
    """`rows` with the cells of a view and zero."""
    rows[:-1] = maps[view * (len(maps) // 2) + volume].T
    rows[-1] = 0.0
    return rows


def _in_view(index: Tensor, maps: Tensor, view: int) -> Tensor:
    """Places in the pool -> rows of a view, N for what is not in it."""
    cells = maps.shape[2]
    row = index - view * cells
    return torch.where((row >= 0) & (row < cells), row, cells)


def _blocks(query: Tensor, index: Tensor, other: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The three in parts of some rows, views of them."""
    size = max(1, BLOCK // max(1, index.shape[1] * query.shape[1]))
    return zip(query[: len(index)].split(size), index.split(size), other.split(size))


def _fetched(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)  # (m, K, C)
