# SPDX-License-Identifier: Apache-2.0
"""A box of a volume as a view: its pixels, its matrix, and what it shares with another box."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from monai.config import NdarrayOrTensor

from ._patches import Sizes, per_axis
from .voco_crops import _plain_tensor

__all__ = ["extract_view", "view_iou", "view_matrix"]

LINEAR = {1: "linear", 2: "bilinear"}


def view_matrix(start: Sequence[int], extent: Sequence[int], roi_size: Sizes, flip: Sequence[bool]) -> torch.Tensor:
    """Map from the index of a voxel of a view to its index in the volume, with the centres of voxels at whole numbers.

    With s = extent / roi_size, view voxel i covers [start + s i, start + s (i + 1)), whose centre has the index
    start + s i + (s - 1) / 2; on a flipped axis i counts from the other end.

    Args:
        start: first voxel of the box in the volume, one per axis.
        extent: voxels of the box, one per axis.
        roi_size: voxels of the view, an int or one per axis.
        flip: whether the view runs against the volume, one per axis.

    Returns:
        (n + 1, n + 1) float64; the affine of the view is `affine @ matrix`.
    """
    ndim = len(start)
    matrix = [[0.0] * (ndim + 1) for _ in range(ndim + 1)]
    matrix[-1][-1] = 1.0
    axes = zip(start, extent, per_axis("roi_size", roi_size, ndim), flip, strict=True)
    for axis, (first, length, roi, flipped) in enumerate(axes):
        step = float(length) / roi
        centre = float(first) + (step - 1) / 2
        matrix[axis][axis] = -step if flipped else step
        matrix[axis][-1] = centre + step * (roi - 1) if flipped else centre
    return torch.tensor(matrix, dtype=torch.float64)


def extract_view(
    img: NdarrayOrTensor,
    start: Sequence[int],
    extent: Sequence[int],
    roi_size: Sizes,
    flip: Sequence[bool],
    mode: str = "linear",
) -> torch.Tensor:
    """Cut a box out of a volume, resize it and flip it; voxel i shows the place `view_matrix(...) @ i`.

    There is no anti-aliasing. Where a view is finer than the volume (extent < roi_size) its outermost voxels, up to
    half a voxel of the volume, repeat the edge of the box.

    Args:
        img: volume, (C, *spatial).
        start: first voxel of the box, one per axis.
        extent: voxels of the box, one per axis.
        roi_size: voxels of the view, an int or one per axis.
        flip: axes along which the view runs against the volume.
        mode: "linear", or "nearest" for masks.

    Returns:
        A plain tensor (C, *roi_size), float32, or of the volume's dtype with "nearest".

    Raises:
        ValueError: when the mode is unknown, numbers of axes differ, or the box is empty or leaves the volume.
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"unknown mode '{mode}', choose 'linear' or 'nearest'")
    image = _plain_tensor(img)
    spatial = tuple(image.shape[1:])
    roi = per_axis("roi_size", roi_size, len(spatial))
    if len(spatial) not in (1, 2, 3) or not len(start) == len(extent) == len(flip) == len(spatial):
        raise ValueError(
            f"start, extent and flip have {len(start)}, {len(extent)} and {len(flip)} entries for a volume of spatial "
            f"shape {spatial}; up to 3 axes"
        )
    box = [(int(s), int(s) + int(e)) for s, e in zip(start, extent)]
    if any(not 0 <= a < b <= size for (a, b), size in zip(box, spatial)):
        raise ValueError(f"the box {box} does not lie inside the volume of spatial shape {spatial}")
    window = (slice(None), *(slice(a, b) for a, b in box))
    dims = [axis + 1 for axis, flipped in enumerate(flip) if flipped]
    view = _nearest(image[window], roi) if mode == "nearest" else _linear(image[window], roi)
    return view.flip(dims) if dims else view


def view_iou(start_1: Sequence[int], extent_1: Sequence[int], start_2: Sequence[int], extent_2: Sequence[int]) -> float:
    """Intersection over union of two boxes; it bounds from below the share of either box that they have in common.

    Args:
        start_1: first voxel of box 1 along each axis.
        extent_1: voxels of box 1 along each axis.
        start_2: first voxel of box 2.
        extent_2: voxels of box 2.
    """
    boxes = list(zip(*(map(float, values) for values in (start_1, extent_1, start_2, extent_2)), strict=True))
    overlap = prod(max(0.0, min(s + e, t + f) - max(s, t)) for s, e, t, f in boxes)
    return overlap / (prod(e for _, e, _, _ in boxes) + prod(f for *_, f in boxes) - overlap)


def _linear(crop: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(C, *spatial) -> (C, *size) float32, as `F.interpolate`; of three axes the last apart, faster on a CPU."""
    crop = crop.float()
    if len(size) < 3:
        return F.interpolate(crop[None], size=size, mode=LINEAR[len(size)], align_corners=False)[0]
    rows = crop.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # whole rows are weighted at a time
    rows = F.interpolate(rows, size=size[:2], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    view = F.interpolate(rows.flatten(1, 2), size=size[2:], mode="linear", align_corners=False)
    return view.unflatten(1, size[:2])


def _nearest(crop: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(C, *spatial) -> (C, *size), as `F.interpolate` with "nearest-exact", for every dtype, axis by axis."""
    for axis, new in enumerate(size):
        index = torch.arange(crop.shape[axis + 1]).double()[None, None]
        index = F.interpolate(index, size=new, mode="nearest-exact")[0, 0].long()
        crop = crop.index_select(axis + 1, index.to(crop.device))
    return crop
