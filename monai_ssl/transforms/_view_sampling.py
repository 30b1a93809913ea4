# SPDX-License-Identifier: Apache-2.0
"""Where the two views of a volume lie: sizes, places and flips, and what must hold of the volume."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from math import hypot
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from ._patches import per_axis
from ._view_boxes import view_iou

__all__ = ["PairSampler", "check_affines", "world_affine"]

ATTEMPTS, STEPS = 50, 16  # draws before a pair is moved together, and in how many steps
PLACEMENTS = ("uniform", "seed")


def world_affine(img: NdarrayOrTensor, ndim: int, name: str) -> tuple[torch.Tensor, list[float]]:
    """Voxel index -> world in mm, (ndim + 1, ndim + 1) float64, and the spacing along each axis in mm.

    A ValueError where lengths would have no meaning.
    """
    if not isinstance(img, MetaTensor):
        raise ValueError(
            f"'{name}' carries no affine, without which pixdim in mm has no meaning; keep it a MetaTensor up to here, "
            "or leave pixdim out"
        )
    affine = img.affine.detach().to("cpu", torch.float64)
    rows = affine.tolist()
    columns = list(zip(*rows[:-1]))[:ndim]
    spacing = [hypot(*column) for column in columns]
    if not all(length > 0 for length in spacing):
        raise ValueError(f"'{name}' has voxels of {spacing} mm")
    axes = [[value / length for value in column] for column, length in zip(columns, spacing)]
    if any(abs(sum(x * y for x, y in zip(a, b))) > 1e-3 for a, b in combinations(axes, 2)):
        raise ValueError(f"the axes of '{name}' are not orthogonal: affine {rows}; use Spacingd first")
    if any(abs(value) > 1e-3 for axis in axes for value in axis[ndim:]):  # MONAI keeps a 4 x 4 affine for 2D images too
        raise ValueError(f"the plane of '{name}' is not that of the first two world axes: affine {rows}")
    return affine if len(rows) == ndim + 1 else torch.as_tensor(to_affine_nd(ndim, affine.numpy())), spacing


def check_affines(data: Mapping[Hashable, Any], keys: Sequence[Hashable], size: Sequence[int]) -> None:
    """Raise a ValueError when some voxel of two keys lies more than a hundredth of a voxel apart in the world."""
    placed = [key for key in keys if isinstance(data[key], MetaTensor)]
    corner = torch.tensor([*size, 1], dtype=torch.float64)
    columns = [*range(len(size)), -1]
    for key in placed[1:]:
        first, other = (data[k].affine.detach().to("cpu", torch.float64) for k in (placed[0], key))
        same = first.shape == other.shape
        if same:
            distance = ((first - other).abs()[:-1, columns] @ corner).max()
            same = bool(distance <= 0.01 * first[:-1, : len(size)].norm(dim=0).min())
        if not same:
            raise ValueError(
                f"one draw serves all keys, but '{placed[0]}' has affine {first.tolist()} and '{key}' {other.tolist()}"
            )


class AxisValues(NamedTuple):
    """The arguments of `PairSampler`, one value per axis."""

    roi: np.ndarray  # (n,) voxels
    low: np.ndarray  # (1 or n,) factors
    high: np.ndarray  # (1 or n,)
    pixdim: np.ndarray | None  # (n,) mm
    flip_prob: np.ndarray  # (n,)


class PairSampler:
    """Draws boxes and flips of pairs of views; the arguments are those of `RandPairedViews`."""

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        scale_range: Sequence[Any],
        pixdim: Sequence[float] | float | None,
        min_overlap: float,
        overlap_prob: float,
        flip_prob: Sequence[float] | float,
        placement: str,
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"unknown placement '{placement}', choose one of {PLACEMENTS}")
        probabilities = {"min_overlap": min_overlap, "overlap_prob": overlap_prob, "flip_prob": flip_prob}
        for name, value in probabilities.items():
            if not ((np.asarray(value) >= 0) & (np.asarray(value) <= 1)).all():
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if pixdim is not None and not (np.asarray(pixdim, dtype=float) > 0).all():
            raise ValueError(f"pixdim must be positive, in mm, got {pixdim}")
        self.roi_size, self.pixdim, self.flip_prob, self.placement = roi_size, pixdim, flip_prob, placement
        self.min_overlap, self.overlap_prob = float(min_overlap), float(overlap_prob)
        self.scale_range, self.pairs = scale_range, _pairs(scale_range)
        arguments: tuple[Any, ...] = (roi_size, pixdim, flip_prob)
        known = [len(value) for value in arguments if value is not None and np.ndim(value)]
        known += [len(self.pairs)] if len(self.pairs) > 1 else []
        self._known: dict[int, AxisValues] = {}
        self.axes(known[0] if known else 2)  # what 2D images are refused for, 3D images are too

    def axes(self, ndim: int) -> AxisValues:
        """The arguments for images of `ndim` spatial axes, or a ValueError."""
        if ndim not in self._known:
            self._known[ndim] = self._checked(ndim)
        return self._known[ndim]

    def _checked(self, ndim: int) -> AxisValues:
        if ndim not in (2, 3):
            raise ValueError(f"images must have 2 or 3 spatial axes, got {ndim}")
        if len(self.pairs) not in (1, ndim):
            raise ValueError(f"scale_range {self.scale_range} has {len(self.pairs)} pairs for {ndim} spatial axes")
        bound = float(np.prod(np.broadcast_to(self.pairs[:, 0] / self.pairs[:, 1], ndim)))
        if self.overlap_prob > 0 and self.min_overlap > bound + 1e-9:
            raise ValueError(
                f"min_overlap {self.min_overlap} cannot be promised: views at the two ends of scale_range "
                f"{self.scale_range} have an intersection over union of {bound:.3f} at best"
            )
        roi = np.array(per_axis("roi_size", self.roi_size, ndim))
        pixdim = None if self.pixdim is None else _floats("pixdim", self.pixdim, ndim)
        return AxisValues(roi, self.pairs[:, 0], self.pairs[:, 1], pixdim, _floats("flip_prob", self.flip_prob, ndim))

    def check(self, size: Sequence[int], spacing: Sequence[float] | None, name: str = "img") -> None:
        """Raise a ValueError when the smallest view does not fit into the volume."""
        values = self.axes(len(size))
        needed = np.maximum(np.rint(values.low * self._unit(values, spacing) * values.roi), 1).astype(np.int64)
        if (np.array(size) < needed).any():
            raise ValueError(
                f"'{name}' has spatial shape {tuple(size)}, but the smallest views of roi_size {self.roi_size} cover "
                f"{tuple(needed.tolist())} voxels; use SpatialPadd before, or a smaller scale_range"
            )

    def draw(
        self, state: np.random.RandomState, size: Sequence[int], spacing: Sequence[float] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First voxel, voxels and flips of both views, (2, n) each, in a volume that passed `check`."""
        values, volume = self.axes(len(size)), np.array(size)
        unit = self._unit(values, spacing)
        fitting = volume / (unit * values.roi)
        if len(self.pairs) == 1:
            fitting = fitting.min(keepdims=True)
        high = np.maximum(values.low, np.minimum(values.high, fitting))
        together = state.uniform() < self.overlap_prob
        flip = state.uniform(size=(2, len(size))) < values.flip_prob
        for _ in range(ATTEMPTS):
            scale = values.low + state.uniform(size=(2, len(self.pairs))) * (high - values.low)
            extent = np.clip(np.rint(scale * unit * values.roi), 1, volume).astype(np.int64)
            start = np.stack(self._starts(state, volume, extent, together))
            if not together or view_iou(start[0], extent[0], start[1], extent[1]) >= self.min_overlap:
                return start, extent, flip
        return self._moved_together(volume, start, extent), extent, flip

    def _unit(self, values: AxisValues, spacing: Sequence[float] | None) -> np.ndarray:
        """Voxels of the volume in a voxel of a view at scale 1."""
        if values.pixdim is None:
            return np.ones(len(values.roi))
        if spacing is None:
            raise ValueError(f"pixdim {self.pixdim} in mm needs the spacing of the volume")
        return values.pixdim / _floats("spacing", spacing, len(values.roi))

    def _starts(
        self, state: np.random.RandomState, volume: np.ndarray, extent: np.ndarray, together: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """First voxel of view 1 and of view 2; every bound is inclusive."""
        room = volume - extent
        if not together:
            return state.randint(0, room[0] + 1), state.randint(0, room[1] + 1)
        if self.placement == "seed":
            seed = state.randint(0, volume)
            lowest, highest = np.maximum(0, seed - extent + 1), np.minimum(room, seed)
            return state.randint(lowest[0], highest[0] + 1), state.randint(lowest[1], highest[1] + 1)
        first = state.randint(0, room[0] + 1)
        lowest, highest = np.maximum(0, first - extent[1] + 1), np.minimum(room[1], first + extent[0] - 1)
        return first, state.randint(lowest, highest + 1)

    def _moved_together(self, volume: np.ndarray, start: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """View 2 as near to its place as `min_overlap` allows on the way to the centre of view 1."""
        centred = np.clip(np.rint(start[0] + (extent[0] - extent[1]) / 2), 0, volume - extent[1])
        second = start[1]
        for step in range(STEPS, -1, -1):
            second = np.rint(centred + step / STEPS * (start[1] - centred)).astype(np.int64)
            if view_iou(start[0], extent[0], second, extent[1]) >= self.min_overlap:
                break
        return np.stack([start[0], second])


def _pairs(scale_range: Any) -> np.ndarray:
    """Smallest and largest factor, (1 or n, 2), or a ValueError."""
    pairs = np.atleast_2d(np.array(scale_range, dtype=float))
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"scale_range must be one pair (lo, hi) or one per axis, got {scale_range}")
    if not ((pairs[:, 0] > 0) & (pairs[:, 0] <= pairs[:, 1]) & np.isfinite(pairs[:, 1])).all():
        raise ValueError(f"scale_range must have 0 < lo <= hi, got {scale_range}")
    return pairs


def _floats(name: str, value: Any, ndim: int) -> np.ndarray:
    """One number per axis, or a ValueError."""
    values = np.asarray(value, dtype=float)
    if values.ndim and values.shape != (ndim,):
        raise ValueError(f"{name} {value} does not have one entry for each of {ndim} spatial axes")
    return np.broadcast_to(values, (ndim,))
