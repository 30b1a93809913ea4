# SPDX-License-Identifier: Apache-2.0
"""Inner products of queries with rows that each of them names, without keeping these rows for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._precision import no_autocast

__all__ = ["gathered_products"]

DENSE = 8  # a product with all rows costs as much as fetching 1 / DENSE as many
BLOCK = 2**20  # numbers fetched at a time, which then stay in the cache


def gathered_products(query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """query[m] . rows[index[m, k]].

    Args:
        query: (M, C).
        rows: (P, C).
        index: (M, K) int64.

    Returns:
        (M, K), differentiable once.
    """
    if len(rows) <= DENSE * index.shape[1]:
        return (query @ rows.T).gather(1, index)
    return _Products.apply(query, rows, index)


def _blocks(query: Tensor, index: Tensor, *others: Tensor) -> Any:
    size = max(1, BLOCK // max(1, index.shape[1] * query.shape[1]))
    return zip(*(x.split(size) for x in (query, index, *others)))


def _fetched(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)  # (m, K, C)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(query, rows, index)
        return torch.cat([(_fetched(rows, i) @ q[..., None])[..., 0] for q, i in _blocks(query, index)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, rows, index = ctx.saved_tensors
        of_query, of_rows = [], torch.zeros_like(rows)
        with no_autocast(query):
            for q, i, g in _blocks(query, index, gradient):
                of_query.append((g[:, None] @ _fetched(rows, i))[:, 0])
                of_rows.index_add_(0, i.flatten(), (g[..., None] * q[:, None]).flatten(0, 1))
        return torch.cat(of_query), of_rows, None
