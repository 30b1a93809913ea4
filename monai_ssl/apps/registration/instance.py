# SPDX-License-Identifier: Apache-2.0
"""A few steps of optimisation for the pair at hand, on its embeddings (SAMReg)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.transforms.linear_resize import resize_linear

from ..map_similarity import resized
from ..network_maps import network_maps
from ..point_matcher import PointMatcher
from .fields import identity_field, sample_field
from .inner_step import after_inner_step, on_grid
from .result import Registration

__all__ = ["optimise_instance", "register_instance"]

_MEAN = {2: F.avg_pool2d, 3: F.avg_pool3d}


def optimise_instance(
    source_map: Tensor,
    target_map: Tensor,
    size: Sequence[int],
    steps: int = 50,
    lr: float = 0.05,
    smoothness: float = 1000.0,
    eps: float = 1e-4,
) -> Tensor:
    """The smooth displacement by which one map resembles another most, by gradient descent from 0.

    Source: the instance optimisation of SAME++ (arXiv 2311.14986) in its released code. The displacement of the cells
    is a parameter after three mean filters of 3 cells, zero beyond the map.

    Args:
        source_map: moving, (C, *cells) or (1, C, *cells).
        target_map: fixed, likewise.
        size: of the result, along each axis.
        steps: of Adam.
        lr: its learning rate, in half extents of the map.
        smoothness: weight of the mean squared forward differences, against the mean cosine.
        eps: of Adam; it keeps steps small where there is nothing to gain.

    Returns:
        normalised displacement (1, n, *size), float32, or float64 as the maps: the parameter, up-sampled and
        filtered three times once more.

    Raises:
        ValueError: maps of another number of axes than `size`, of different channels, or a negative number of steps.
    """
    n = len(size)
    source, target = (m if m.ndim == n + 2 else m[None] for m in (source_map.detach(), target_map.detach()))
    if n not in _MEAN or source.ndim != n + 2 or target.ndim != n + 2 or source.shape[:2] != (1, target.shape[1]):
        raise ValueError(
            f"maps {tuple(source_map.shape)} and {tuple(target_map.shape)} must be (C, *cells), of as many channels, "
            f"with the {n} axes of size {tuple(size)}, 2 or 3"
        )
    if steps < 0 or smoothness < 0:
        raise ValueError(f"steps {steps} and smoothness {smoothness} must not be negative")
    double = source.dtype == target.dtype == torch.float64
    source, target = (m if double else m.float() for m in (source, target))
    with torch.enable_grad():
        parameter = target.new_zeros(1, n, *target.shape[2:]).requires_grad_()
        optimiser = torch.optim.Adam([parameter], lr=lr, eps=eps)
        identity = identity_field(target.shape[2:], target)
        for _ in range(steps):
            optimiser.zero_grad()
            d = _filtered(parameter)
            cosine = F.cosine_similarity(sample_field(source, identity + d), target, dim=1).mean()
            roughness = sum(d.diff(dim=axis).square().mean() for axis in range(2, n + 2))
            (smoothness * roughness - cosine).backward()
            optimiser.step()
    return _filtered(resize_linear(parameter.detach()[0], size, align_corners=True)[None])


def register_instance(
    matcher: PointMatcher,
    moving: Any,
    fixed: Any,
    initial: Registration | None = None,
    steps: int = 50,
    lr: float = 0.05,
    smoothness: float = 1000.0,
) -> Registration:
    """Refine a registration by :func:`optimise_instance` on the embeddings of the fixed and the moved image.

    The moving image is put where `initial` says and embedded there; the displacement is found between the maps of all
    levels, brought to the finest, and composed on the fixed side of `initial`.

    Args:
        matcher: embeds the images.
        moving: a file or a MetaTensor as `PointMatcher.embed` takes it.
        fixed: likewise, or its embedding.
        initial: of the steps before; None: both images lie in one world.
        steps: see :func:`optimise_instance`.
        lr: see there.
        smoothness: see there.

    Returns:
        Its `report` has the entries of `initial` with `folding_share`, residuals of the matches and `seconds` anew.

    Raises:
        FileNotFoundError: an image that is not there.
        ValueError: images that cannot be used.
    """
    start = time.perf_counter()
    target = matcher.embedding(fixed)
    placed = on_grid(initial, target.affine, target.size)
    shown = placed.warp(matcher.prepare(moving).to(matcher.device)).as_tensor()
    maps, covered = network_maps(matcher.network, shown, matcher.slab_size)
    disp = optimise_instance(_merged(maps), _merged(target.maps), covered, steps, lr, smoothness)[0]
    field = torch.stack([component * ((length - 1) / 2) for component, length in zip(disp, covered)])
    return after_inner_step(placed, field, "instance", start)


def _filtered(field: Tensor) -> Tensor:
    for _ in range(3):
        field = _MEAN[field.ndim - 2](field, 3, stride=1, padding=1)
    return field


def _merged(maps: Sequence[Tensor]) -> Tensor:
    """Maps as one at the size of the finest, in which the cosine is the mean of those of the levels."""
    size = tuple(maps[0].shape[1:])
    return torch.cat([F.normalize(resized(values, size), dim=0) for values in maps])
