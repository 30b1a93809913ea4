# SPDX-License-Identifier: Apache-2.0
"""Images read between their voxels, in double precision and piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["compose_displacement", "fill_voxels", "invert_displacement", "sample_voxels"]

_CHUNK = 2**18  # voxels at a time: some 50 MB of places


def sample_voxels(values: Tensor, index: Tensor, mode: str = "bilinear", padding_mode: str = "border") -> Tensor:
    """Values at places between voxels, by the rule of ITK.

    Within the outer half of the border voxels the border value counts, unlike `grid_sample` with "zeros", which fades
    there. Axes of one voxel are allowed.

    Args:
        values: (C, *size), floating for "bilinear".
        index: continuous voxel index, (P, n).
        mode: "bilinear" (linear along each axis) or "nearest", of two as near the one of higher index.
        padding_mode: beyond the voxels, "border": the border value, "zeros": 0.

    Returns:
        (C, P), of the dtype of `values`.
    """
    size = torch.tensor(values.shape[1:], device=index.device)
    if mode == "nearest":
        cells = torch.minimum((index + 0.5).floor().clamp_min(0), size - 1).long()
        sampled = _at(values, cells)
    else:
        places = ((2 * index + 1) / size - 1).flip(-1)  # of `align_corners=False`; x, y, z last
        grid = places.to(values.dtype).view(1, *[1] * (values.ndim - 2), *places.shape)  # (1, 1.., P, n)
        sampled = F.grid_sample(values[None], grid, padding_mode="border", align_corners=False).flatten(1)
        sampled = sampled.view(len(values), -1)
    if padding_mode == "zeros":
        sampled = sampled * ((index >= -0.5) & (index < size - 0.5)).all(-1)
    return sampled


def fill_voxels(out: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute an image from the index of its voxels, so many at a time that memory does not matter.

    Args:
        out: to be filled, (C, *size), contiguous.
        function: voxel index (P, n) float64, on the device of `out` -> (C, P).

    Returns:
        `out`.
    """
    size, flat = tuple(out.shape[1:]), out.flatten(1)
    for start in range(0, prod(size), _CHUNK):
        numbers = torch.arange(start, min(start + _CHUNK, prod(size)), device=out.device)
        index = torch.stack(torch.unravel_index(numbers, size), -1).double()
        flat[:, start : start + len(numbers)] = function(index).to(out.dtype)
    return out


def compose_displacement(d: Tensor, v: Tensor, affine: Tensor) -> Tensor:
    """The displacement of (id + d) after (id + v): d(x + v(x)) + v(x).

    Args:
        d: mm at the nodes of a grid, (n, *size); its border value continues beyond it.
        v: mm on the same grid, (n, *size); it is applied first.
        affine: index in the grid -> mm, (n + 1, n + 1).

    Returns:
        (n, *size), of the dtype of `d`, on the device of `v`.
    """
    field, voxels = d.to(v.device).double(), torch.linalg.inv(affine[:-1, :-1]).to(v.device)

    def composed(index: Tensor) -> Tensor:
        inner = _at(v, index.long()).double()
        return sample_voxels(field, index + (voxels @ inner).T) + inner

    return fill_voxels(torch.empty(v.shape, dtype=d.dtype, device=v.device), composed)


def invert_displacement(d: Tensor, affine: Tensor, tolerance: float = 1e-4, num_steps: int = 100) -> Tensor:
    """The displacement w of the inverse of (id + d), by the fixed-point iteration w(x) = -d(x + w(x)).

    Args:
        d: mm at the nodes of a grid, (n, *size); its border value continues beyond it.
        affine: index in the grid -> mm, (n + 1, n + 1).
        tolerance: mm by which no component changes any more.
        num_steps: at most.

    Returns:
        (n, *size) float64.

    Raises:
        ValueError: it does not settle.
    """
    field, voxels = d.double(), torch.linalg.inv(affine[:-1, :-1]).to(d.device)
    found, change = torch.zeros_like(field), float("inf")
    for _ in range(num_steps):

        def improved(index: Tensor, w: Tensor = found) -> Tensor:
            return -sample_voxels(field, index + (voxels @ _at(w, index.long())).T)

        before, found = found, fill_voxels(torch.empty_like(field), improved)
        change = float((found - before).abs().max())
        if change < tolerance:
            return found
    raise ValueError(
        f"the displacement has no inverse that is found: it still changes by {change:.3g} mm after {num_steps} steps, "
        "since it folds, or nearly so"
    )


def _at(values: Tensor, cells: Tensor) -> Tensor:
    """Values (C, *size) of the voxels with indices (P, n), (C, P)."""
    place = (slice(None), *cells.unbind(-1))
    return values[place]
