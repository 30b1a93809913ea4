# SPDX-License-Identifier: Apache-2.0
"""Rows of all processes, for losses whose candidates are those of the joined batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["gather_ids", "gather_rows", "gather_with_grad"]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of every process in the order of ranks; one process keeps its own.

    The backward pass sums over processes: a row gets the gradient of the *sum* of their losses, and the average that
    DistributedDataParallel takes of weight gradients turns this into the gradient of the mean. So a loss trains as on
    the joined batch if it is a mean over own rows (arXiv 2012.02383), and equally if every process computes that of all
    rows (arXiv 2006.10511). Every process must call forward and backward.

    Args:
        x: (M, ...), the same shape on every process.

    Returns:
        (M * processes, ...).

    Raises:
        ValueError: on the CPU, when processes have different numbers of rows; on other devices the same is a
            device-side assertion, since reading the numbers back would wait for the device.
    """
    if _alone():
        return x
    _check_equal_rows(x)
    return _GatherRows.apply(x)


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """:func:`gather_with_grad`, and the place of the own first row."""
    return gather_with_grad(x), 0 if _alone() else dist.get_rank() * len(x)


def gather_ids(ids: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Integers of every process in the order of ranks, by one exchange for all of them; None stays None.

    Args:
        ids: each (M,) of integers, M as on every other process, or None, and that on every process.

    Returns:
        each (M * processes,) int64; one process keeps its own.
    """
    given = [x for x in ids if x is not None]
    if _alone() or not given:
        return list(ids)
    columns = iter(_all_gather(torch.stack([x.long() for x in given], 1)).unbind(1))
    return [None if x is None else next(columns) for x in ids]


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def _check_equal_rows(x: Tensor) -> None:
    rows = _all_gather(torch.full((1,), len(x), device=x.device))
    problem = "processes have different numbers of rows; set drop_last on the loader"
    if x.device.type != "cpu":
        torch._assert_async((rows == len(x)).all(), problem)
    elif (rows != len(x)).any():
        raise ValueError(f"{problem}: {rows.tolist()}")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _all_gather(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)
