# SPDX-License-Identifier: Apache-2.0
"""Where the patches of a grid begin, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from monai.config import NdarrayOrTensor

from ._one_draw import OneDraw, with_meta_of
from .voco_crops import _plain_tensor

__all__ = ["PatchGrid", "RandPatches", "Shares", "Sizes", "extract_patches", "patch_grid", "per_axis"]

Sizes: TypeAlias = Sequence[int] | int
Shares: TypeAlias = Sequence[float] | float  # an int is voxels, a float a share of the pitch


def patch_grid(
    image_size: Sequence[int],
    grid_size: Sizes,
    patch_size: Sizes | None = None,
    jitter: Shares = 0,
    gap: Shares = 0,
    overlap: Sizes = 0,
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Lowest start of each patch of a grid, the patch size and the range of the jitter.

    Source: the grids of 3D-CPC, 3D-RPL and 3D-Jigsaw (arXiv 2006.03829), made one. Along an axis of length L in n cells
    the pitch is g = (L - overlap) // n and cell i is [i g, i g + g + overlap). Jitter J and gap G leave room for a
    patch of g + overlap - J - G voxels; one of s starts at i g + (g + overlap - s - J) // 2, plus 0..J.

    Args:
        image_size: spatial shape of the image.
        grid_size: cells along each axis; this and the following are one value for all axes or one per axis.
        patch_size: patch size in voxels; None takes all the room.
        jitter: range of the starts, in voxels if an int, as a share of the pitch, rounded down, if a float in [0, 1).
        gap: space between neighbours that is always free, as `jitter`.
        overlap: voxels that neighbouring cells share; not together with a gap.

    Returns:
        Starts (P, n) int64, first axis slowest; patch size in voxels and jitter in voxels, per axis.

    Raises:
        ValueError: when an argument is out of range or has another number of axes, or a patch does not fit.
    """
    grid, patch, jitters, gaps, overlaps = _arguments(len(image_size), grid_size, patch_size, jitter, gap, overlap)
    starts, sizes, ranges = [], [], []
    for axis, (length, n) in enumerate(zip(image_size, grid)):
        pitch = (length - overlaps[axis]) // n
        j, g = (int(v * pitch) if isinstance(v, float) else v for v in (jitters[axis], gaps[axis]))
        room = pitch + overlaps[axis] - j - g
        size = room if patch[axis] is None else patch[axis]
        if pitch < 1 or not 1 <= size <= room:
            raise ValueError(
                f"axis {axis} of length {length} in {n} cells leaves room for {room} voxels (pitch {pitch}, overlap "
                f"{overlaps[axis]}, jitter {j}, gap {g}), where a patch of size {size} does not fit"
            )
        starts.append(torch.arange(n) * pitch + (pitch + overlaps[axis] - size - j) // 2)
        sizes.append(size)
        ranges.append(j)
    return torch.cartesian_prod(*starts).reshape(-1, len(grid)), tuple(sizes), tuple(ranges)


def extract_patches(img: NdarrayOrTensor, starts: torch.Tensor, size: Sizes) -> torch.Tensor:
    """Copy patches of one size out of an image.

    Args:
        img: image, (C, *spatial).
        starts: first voxel of each patch, (P, n).
        size: patch size in voxels, an int or one per axis.

    Returns:
        A plain tensor (P, C, *size), contiguous, of the image's dtype.

    Raises:
        ValueError: when a patch does not lie inside the image.
    """
    image = _plain_tensor(img)
    spatial, starts = tuple(image.shape[1:]), torch.as_tensor(starts)
    sizes = per_axis("size", size, len(spatial))
    if starts.ndim != 2 or len(starts) < 1 or starts.shape[1] != len(spatial):
        raise ValueError(f"starts of shape {tuple(starts.shape)} must be (P, {len(spatial)}) in an image of {spatial}")
    if ((starts < 0) | (starts + torch.tensor(sizes) > torch.tensor(spatial))).any():
        raise ValueError(f"patches of size {sizes} at {starts.tolist()} leave the image of spatial shape {spatial}")
    windows = [(slice(None), *(slice(a, a + s) for a, s in zip(start, sizes))) for start in starts.tolist()]
    return torch.stack([image[window] for window in windows]).contiguous()


class PatchGrid:
    """The arguments of `patch_grid` besides the image size, validated as far as that goes without one."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self._last: tuple[Any, Any] = (None, None)  # image size and result
        ndim = next((len(value) for value in arguments if np.ndim(value)), 1)
        _arguments(ndim, *arguments)

    def __call__(self, image_size: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
        if self._last[0] != tuple(image_size):
            self._last = (tuple(image_size), patch_grid(image_size, *self.arguments))
        return self._last[1]

    def cut(self, img: NdarrayOrTensor, starts: torch.Tensor) -> torch.Tensor:
        """Patches of this grid's size, with the meta data of the image."""
        return with_meta_of(img, extract_patches(img, starts, self(img.shape[1:])[1]))


class RandPatches(OneDraw):
    """Draws `starts`, the first voxel of every patch of `grid`, (P, n) int64."""

    grid: PatchGrid
    starts: torch.Tensor | None = None
    drawn: tuple[str, ...] = ("starts",)

    def randomize(self, image_size: Sequence[int]) -> None:
        """Draw the jitter of all patches in one call, patch by patch and axis by axis."""
        lowest, _, jitter = self.grid(image_size)
        offsets = self.R.randint(0, np.array(jitter) + 1, size=tuple(lowest.shape))
        self.starts = lowest + torch.as_tensor(offsets, dtype=torch.int64)

    def origins(self, starts: torch.Tensor, *others: Any) -> torch.Tensor:
        """First voxel of every patch in the order of the output, (patches, n)."""
        return starts


def per_axis(name: str, value: Any, ndim: int) -> tuple[int, ...]:
    """One whole number of at least 1 per axis, or a ValueError."""
    values = _repeat(name, value, ndim)
    if any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in values):
        raise ValueError(f"{name} must be whole numbers of at least 1, got {value}")
    return tuple(int(v) for v in values)


def _arguments(
    ndim: int, grid_size: Any, patch_size: Any, jitter: Any, gap: Any, overlap: Any
) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """All arguments per axis, ints as int and floats as float."""
    grid = per_axis("grid_size", grid_size, ndim)
    patch = (None,) * ndim if patch_size is None else per_axis("patch_size", patch_size, ndim)
    jitters, gaps = (tuple(_share(n, v) for v in _repeat(n, x, ndim)) for n, x in (("jitter", jitter), ("gap", gap)))
    overlaps = _repeat("overlap", overlap, ndim)
    if any(isinstance(v, bool) or not isinstance(v, Integral) or v < 0 for v in overlaps):
        raise ValueError(f"overlap must be whole numbers of at least 0, got {overlap}")
    if any(o > 0 and g > 0 for o, g in zip(overlaps, gaps)):
        raise ValueError(f"overlap {overlap} and gap {gap} exclude each other")
    return grid, patch, jitters, gaps, tuple(int(v) for v in overlaps)


def _share(name: str, value: Any) -> float:
    """An int in voxels or a float in [0, 1), or a ValueError."""
    number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    if number and isinstance(value, Integral) and int(value) >= 0:
        return int(value)
    if number and not isinstance(value, Integral) and 0 <= float(value) < 1:
        return float(value)
    raise ValueError(f"{name} must be an int >= 0 (voxels) or a float in [0, 1) (share of the pitch), got {value}")


def _repeat(name: str, value: Any, ndim: int) -> tuple[Any, ...]:
    values = tuple(value) if np.ndim(value) else (value,) * ndim
    if len(values) != ndim:
        raise ValueError(f"{name} {value} has {len(values)} entries for {ndim} spatial axes")
    return values
