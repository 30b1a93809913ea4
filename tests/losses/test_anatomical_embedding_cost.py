# SPDX-License-Identifier: Apache-2.0
"""What SAM's loss may cost: memory at the published sizes, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl.losses import AnatomicalEmbeddingLoss, GlobalPairSampler, LocalPairSampler

from .test_pair_sampling import affines, unit_maps


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes in tensors at a time beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    live = highest = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        highest = max(highest, live)
    return highest


def test_peak_bytes_counts_what_is_alive() -> None:
    def call() -> None:
        first = torch.zeros(10**6)
        del first
        kept = [torch.zeros(2 * 10**6), torch.zeros(10**6)]
        assert len(kept) == 2

    assert peak_bytes(call) == 12 * 10**6


@pytest.mark.parametrize("chunk_size", [7, 10**6])
def test_memory(chunk_size: int) -> None:
    """Views of 32 x 96 x 96 voxels; the gradient of the maps is part of it."""
    draw = lambda *size: F.normalize(torch.randn(2, 128, *size, generator=torch.manual_seed(0)), dim=1)
    maps = [draw(16, 48, 48).requires_grad_(), draw(8, 6, 6).requires_grad_()]
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)).repeat(1, 2, 1, 1)
    affine[:, 1, :3, 3] = torch.tensor([6.0, 60.0, -50.0], dtype=torch.float64)
    loss = AnatomicalEmbeddingLoss((32, 96, 96), chunk_size=chunk_size)
    pool, anchors, negatives = 2 * 16 * 48 * 48, 2 * 100, 500
    rows = min(chunk_size, anchors)
    bound = rows * pool * 4 * 4 + 2 * anchors * negatives * 128 * 4
    assert peak_bytes(lambda: loss(maps, affine).backward()) <= bound


WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._linalg_check_errors.default,
)


class NoWaits(TorchDispatchMode):
    """Refuses operations that on a GPU hand a value to Python, look at one, or give a shape that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [i for i in args[1] if i is not None] if func is torch.ops.aten.index.Tensor else []
        assert func not in WAITING, func
        assert all(mask.dtype is not torch.bool for mask in masks), func
        return func(*args, **(kwargs or {}))


def copied(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("numbers of the host are copied to the device, which is waited for")


@contextmanager
def no_waits() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(mock.patch.object(torch, name, copied))
        stack.enter_context(mock.patch.object(Tensor, "new_tensor", copied))
        stack.enter_context(NoWaits())
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.max().item(),
        lambda x: bool(x.all()),
        lambda x: x[x > 0],
        lambda x: torch.linalg.inv(x),
        lambda x: torch.linalg.solve(x, x),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_a_wait_is_seen(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError), no_waits():
        wait(torch.eye(3))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(
    "local, coarse", [({}, {}), ({"positives": "interpolated", "exclude": "zero"}, {"exclude": "zero"})], ids=str
)
def test_nothing_waits_for_the_device(ndim: int, local: dict[str, Any], coarse: dict[str, Any]) -> None:
    maps = [unit_maps(2, (5, 6, 7)[:ndim]).requires_grad_(), unit_maps(2, (5, 2, 2)[:ndim], 6, 1).requires_grad_()]
    target = {"view_affine": affines(2, ndim, mm=2.0), "valid": torch.ones(4, 1, *(10, 12, 14)[:ndim])}
    for negatives in ((2, 1), (40, 20)):  # few are fetched, for many the products with all cells are taken
        samplers = LocalPairSampler(negatives=negatives, **local), GlobalPairSampler(negatives=negatives, **coarse)
        loss = AnatomicalEmbeddingLoss((10, 12, 14)[:ndim], *samplers)
        with no_waits():
            loss(maps, target).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    maps = [unit_maps(2, size, 6).float().cuda().requires_grad_() for size in ((5, 6, 7), (5, 2, 2))]
    target = {"view_affine": affines(2, 3, mm=2.0).cuda(), "valid": torch.ones(4, 1, 10, 12, 14, device="cuda")}
    loss = AnatomicalEmbeddingLoss((10, 12, 14))
    loss(maps, target).backward()  # libraries wait when they start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(maps, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
