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

__all__ = ["is_native", "transform_each", "untracked"]

# threads that build no MetaTensor, beside the queue feeder of a DataLoader worker, which only pickles finished items:
# tqdm's monitor, and TensorBoard's writer
_BLIND = ("TMonitor", "_AsyncWriterThread")


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
    it is left alone while other threads run that could read it.
    """
    me = threading.current_thread()
    alone = all(t is me or t.name == "QueueFeederThread" or type(t).__name__ in _BLIND for t in threading.enumerate())
    if not (alone and get_track_meta()):
        yield
        return
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(True)


def transform_each(transform: Callable[..., Any], views: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy every crop, call `transform` on the copy while it is in the processor's cache, and stack the results.

    Args:
        transform: called with a plain tensor (C, *spatial), which it may change; returns a tensor or array.
        views: plain tensors (C, *spatial) of one shape; they are only read.

    Returns:
        A plain tensor (crops, C, *new spatial).

    Raises:
        ValueError: when the results differ in shape, or a lazy transform left its work undone.
    """
    native = is_native(transform)
    steps = _steps(transform) if native else [transform]
    stack = views[0].new_empty((len(views), *views[0].shape))
    results, crops = [], stack.unbind()
    with untracked() if native else nullcontext():
        for crop, view in zip(crops, views):
            results.append(_call(steps, crop.copy_(view), native))
    if native and all(result is crop for result, crop in zip(results, crops)):
        return stack
    shapes = sorted({tuple(result.shape) for result in results})
    if len(shapes) > 1:
        raise ValueError(f"crop_transform turned crops of shape {tuple(views[0].shape)} into unequal {shapes}")
    return torch.stack(results)


def _steps(transform: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The transforms that a native one consists of: Compose's own bookkeeping takes a third of its time on a crop."""
    if not isinstance(transform, Compose) or type(transform) is not Compose:  # OneOf and the like choose
        return [transform]
    return [step for t in transform.transforms for step in _steps(t)]


def _call(steps: Sequence[Callable[..., Any]], crop: torch.Tensor, native: bool) -> torch.Tensor:
    result: Any = crop
    for step in steps:
        try:
            result = step(result)
        except Exception as error:
            if not native:
                raise
            raise RuntimeError(f"applying transform {step}") from error
    if native and result is crop:
        return crop
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
