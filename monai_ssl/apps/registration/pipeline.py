# SPDX-License-Identifier: Apache-2.0
"""All steps of a registration in one call (SAMReg)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..point_matcher import PointMatcher
from ..preprocessing import affine_of, embedding_transform, load_image
from .affine import register_affine
from .coarse import register_coarse
from .deform import register_deform
from .inner_step import on_grid
from .instance import register_instance
from .result import Registration

__all__ = ["STEPS", "register"]

STEPS = ("affine", "coarse", "deform", "instance")
_QUALITY = ("residual_mean_mm", "residual_median_mm", "folding_share")


def register(
    moving: Any,
    fixed: Any,
    steps: Sequence[str] = ("affine", "coarse", "deform"),
    matcher: PointMatcher | None = None,
    network: nn.Module | None = None,
    initial: Registration | None = None,
    *,
    moving_mask: Any = None,
    fixed_mask: Any = None,
    method: str = "huber",
    stride: int = 8,
    matching: str = "cycle",
    min_score: float = 0.7,
    generator: torch.Generator | None = None,
    node_spacing: int = 16,
    coarse_steps: int = 100,
    coarse_smoothness: float = 0.04,
    max_residual: float | None = None,
    instance_steps: int = 50,
    instance_smoothness: float = 1000.0,
    transform: Callable[..., Any] | None = None,
) -> Registration:
    """Register two images, each step from the result of the one before, each image embedded once for the matches.

    Source: SAME and SAME++ (arXiv 2109.11572, 2311.14986).

    Args:
        moving: a file, a folder with a DICOM series, or a MetaTensor (C, *size) as MONAI loads it.
        fixed: likewise.
        steps: some of "affine", "coarse", "deform" and "instance", in this order; "coarse" makes its affine itself
            where none came before. None of them: the images are taken to lie in one world.
        matcher: embeds the images, for all steps but "deform".
        network: of :func:`register_deform`.
        initial: to start from, for steps after "affine".
        moving_mask: see :func:`register_affine`; likewise the arguments up to `generator`.
        fixed_mask: see there.
        method: see there.
        stride: see there.
        matching: see there.
        min_score: see there.
        generator: see there.
        node_spacing: see :func:`register_coarse`.
        coarse_steps: see there.
        coarse_smoothness: see there.
        max_residual: see there.
        instance_steps: see :func:`register_instance`.
        instance_smoothness: see there.
        transform: see :func:`register_deform`; None: that of the matcher, if there is one.

    Returns:
        Its `report` has the entries of the steps, and under `steps` for each its `seconds` in all and the residuals and
        folding share after it.

    Raises:
        FileNotFoundError: an image or a mask that is not there.
        ValueError: steps that are unknown, double or out of order, a step without its matcher or network, an `initial`
            before "affine", and as the steps.
    """
    _check(steps, matcher, network, initial)
    if transform is None and matcher is not None:
        transform = matcher.transform
    steps_report: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    images: dict[str, Any] = {"matcher": matcher, "moving": moving, "fixed": fixed}
    if matcher is not None and {"affine", "coarse"} & set(steps):
        images |= {"moving": matcher.embed(moving), "fixed": matcher.embed(fixed)}
        steps_report["embed"] = {"seconds": time.perf_counter() - start}
    matches: dict[str, Any] = {
        "moving_mask": moving_mask,
        "fixed_mask": fixed_mask,
        "method": method,
        "stride": stride,
        "matching": matching,
        "min_score": min_score,
        "generator": generator,
    }
    coarse: dict[str, Any] = {
        "node_spacing": node_spacing,
        "steps": coarse_steps,
        "smoothness": coarse_smoothness,
        "max_residual": max_residual,
    }
    instance: dict[str, Any] = {"steps": instance_steps, "smoothness": instance_smoothness}
    calls: dict[str, Callable[[Registration | None], Registration]] = {
        "affine": lambda _: register_affine(**images, **matches),
        "coarse": lambda before: register_coarse(**images, initial=before, **coarse, **matches),
        "deform": lambda before: register_deform(network, moving, fixed, before, transform=transform),
        "instance": lambda before: register_instance(**{**images, "moving": moving}, initial=before, **instance),
    }
    result = initial
    for step in steps:
        start = time.perf_counter()
        result = calls[step](result)
        quality = {key: result.report[key] for key in _QUALITY if key in result.report}
        steps_report[step] = {"seconds": time.perf_counter() - start, **quality}
    if result is None:
        result = _unmoved(fixed, transform)
    return dataclasses.replace(result, report={**result.report, "steps": steps_report})


def _check(steps: Sequence[str], matcher: Any, network: Any, initial: Any) -> None:
    order = [STEPS.index(step) if step in STEPS else -1 for step in steps]
    if -1 in order or order != sorted(set(order)):
        raise ValueError(f"steps must be some of {', '.join(STEPS)}, each once and in this order, got {steps!r}")
    if matcher is None and set(steps) - {"deform"}:
        raise ValueError(f"steps {tuple(steps)} need matcher, a PointMatcher")
    if network is None and "deform" in steps:
        raise ValueError('step "deform" needs network, an EmbeddingRegistrationNet')
    if initial is not None and "affine" in steps:
        raise ValueError('initial is given, which step "affine" would not use: leave that step out')


def _unmoved(fixed: Any, transform: Callable[..., Any] | None) -> Registration:
    image = load_image(fixed)
    n = image.ndim - 1
    prepared = (embedding_transform(None, n) if transform is None else transform)(image)
    return on_grid(None, affine_of(prepared), prepared.shape[1:])
