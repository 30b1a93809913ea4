# SPDX-License-Identifier: Apache-2.0
"""Images read between their voxels, in double precision and piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fill_voxels", "resample", "sample_voxels", "voxels_at"]

_CHUNK = 2**20  # voxels at a time: some 200 MB of places


def sample_voxels(values: Tensor, index: Tensor, mode: str = "bilinear", beyond: Tensor | None = None) -> Tensor:
    """Values at places between voxels, by the rule of ITK.

    Within the outer half of the border voxels the border value counts, unlike `grid_sample` with "zeros", which fades
    there. Axes of one voxel are allowed.

    Args:
        values: (C, *size), floating for "bilinear".
        index: continuous voxel index, (P, n).
        mode: "bilinear" (linear along each axis) or "nearest", of two as near the one of higher index.
        beyond: what to find beyond the faces of the border voxels, (C,); None: the border value.

    Returns:
        (C, P), of the dtype of `values`.
    """
    size = torch.tensor(values.shape[1:], device=index.device)
    if mode == "nearest":
        cells = torch.minimum((index + 0.5).floor().clamp_min(0), size - 1).long()
        sampled = voxels_at(values, cells)
    else:
        places = ((2 * index + 1) / size - 1).flip(-1)  # of `align_corners=False`; x, y, z last
        grid = places.to(values.dtype).view(1, *[1] * (values.ndim - 2), *places.shape)  # (1, 1.., P, n)
        sampled = F.grid_sample(values[None], grid, padding_mode="border", align_corners=False)
        sampled = sampled.view(len(values), len(index))
    if beyond is None:
        return sampled
    return torch.where(((index >= -0.5) & (index < size - 0.5)).all(-1), sampled, beyond[:, None])


@torch.no_grad()
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


def resample(
    values: Tensor,
    size: Sequence[int],
    places: Callable[[Tensor], Tensor],
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """An image on another grid, computed in float64.

    Args:
        values: (C, *in).
        size: voxels of the result along each axis.
        places: index of voxels of the result -> index in `values`, (P, n) float64, on its device.
        mode: of :func:`sample_voxels`.
        padding_mode: beyond the faces of the border voxels "border": their value, "zeros": 0, "background": the lowest
            value of each channel.

    Returns:
        (C, *size), float32; for "nearest" of the dtype of `values`.
    """
    source = values if mode == "nearest" else values.double()
    beyond = None
    if padding_mode != "border":
        beyond = source.flatten(1).amin(1) if padding_mode == "background" else source.new_zeros(len(source))
    dtype = values.dtype if mode == "nearest" else torch.float32
    out = torch.empty(len(values), *size, dtype=dtype, device=values.device)
    return fill_voxels(out, lambda index: sample_voxels(source, places(index), mode, beyond))


def voxels_at(values: Tensor, cells: Tensor) -> Tensor:
    """Values (C, *size) of the voxels with indices (P, n), (C, P)."""
    place = (slice(None), *cells.unbind(-1))
    return values[place]
