# SPDX-License-Identifier: Apache-2.0
"""How a transform that is held by another is called on many small crops without wasting time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose
from monai.utils import convert_to_tensor

__all__ = ["is_native", "transform_stacks", "untracked"]


def is_native(transform: Callable[..., Any]) -> bool:
    """Whether `transform` is made of MONAI's own eager array transforms only.

    These give the same voxels with and without meta tracking, and keep no reference to their input. Lazy ones need the
    meta data; a function of the user (``Lambda``) may do anything.
    """
    if not type(transform).__module__.startswith("monai.transforms.") or getattr(transform, "lazy", False):
        return False
    if isinstance(transform, Compose):
        return all(is_native(t) for t in transform.transforms)
    return not hasattr(transform, "func")


@contextmanager
def untracked() -> Iterator[None]:
    """Switch MONAI's meta tracking off inside the block, if no other thread can see that, and restore it afterwards.

    On small crops tracking takes longer than the transforms themselves. The switch is one variable of the process, so
    it is left alone while other threads run. The queue feeder of a DataLoader worker does not count: it only pickles
    finished items, and pickling does not read the switch.
    """
    me = threading.current_thread()
    alone = all(t is me or t.name == "QueueFeederThread" for t in threading.enumerate())
    if not (alone and get_track_meta()):
        yield
        return
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(True)


def transform_stacks(transform: Callable[..., Any], stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Call `transform` on one crop after the other of all stacks in order, and stack the results again.

    Args:
        transform: called with a plain tensor (C, *spatial), part of a stack; returns a tensor or array.
        stacks: plain tensors (crops, C, *spatial), which may be overwritten.

    Returns:
        As many plain tensors (crops, C, *new spatial).

    Raises:
        ValueError: when the results differ in shape, or a lazy transform left its work undone.
    """
    native = is_native(transform)
    with untracked() if native else nullcontext():
        results = [[_call(transform, crop, native) for crop in stack] for stack in stacks]
    shapes = sorted({tuple(result.shape) for row in results for result in row})
    if len(shapes) > 1:
        raise ValueError(f"crop_transform turned crops of shape {tuple(stacks[0].shape[1:])} into unequal {shapes}")
    if native and all(r.is_set_to(crop) for row, stack in zip(results, stacks) for r, crop in zip(row, stack)):
        return list(stacks)
    return [torch.stack(row) for row in results]


def _call(transform: Callable[..., Any], crop: torch.Tensor, native: bool) -> torch.Tensor:
    result = transform(crop)
    if isinstance(result, MetaTensor) and result.pending_operations:
        raise ValueError("crop_transform left lazy operations pending; put it into Compose(..., lazy=True)")
    result = convert_to_tensor(result, track_meta=False)
    if not native or result.shape != crop.shape or result.dtype != crop.dtype:
        return result
    # nobody else holds the crop, so its memory takes the result, which saves a second stack
    if not result.is_set_to(crop):
        shared = result.untyped_storage().data_ptr() == crop.untyped_storage().data_ptr()
        crop.copy_(result.clone() if shared else result)
    return crop
