# SPDX-License-Identifier: Apache-2.0
"""Two overlapping, resized and flipped views of one volume, and where they lie in it (PGL, SAM)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.data.utils import to_affine_nd
from monai.utils import ensure_tuple_rep

from ._one_draw import OneDraw, OneDrawd, check_written_keys, shared_size, with_meta_of
from ._patches import Sizes
from ._view_boxes import extract_view, view_iou, view_matrix
from ._view_sampling import PairSampler, check_affines, world_affine
from .voco_crops import _plain_tensor

__all__ = [
    "RandPairedViews",
    "RandPairedViewsD",
    "RandPairedViewsDict",
    "RandPairedViewsd",
    "extract_view",
    "view_iou",
    "view_matrix",
]


class RandPairedViews(OneDraw):
    """Two overlapping views of one volume, each a box cut out, resized and flipped, and their matrices.

    Source: PGL (arXiv 2011.12640), and with `placement="seed"` SAM (arXiv 2012.02383). PGL asks for an overlap of 10 %
    without saying of what; here it is the intersection over union of the boxes, the strictest reading. SAM's released
    sampler fails at random on small volumes; here they narrow the range of scales and are finally refused.
    The last draw stays in `start` and `extent`, (2, n) int64 in voxels of the volume, and `flip` (2, n) bool.

    Args:
        roi_size: voxels of a view, an int or one per axis.
        scale_range: smallest and largest factor by which a view covers more than `roi_size`. One pair draws one factor
            for all axes of a view, one pair per axis independent factors.
        pixdim: voxel size of a view at scale 1 in mm, a number or one per axis; the volume must then be a MetaTensor.
            None: a voxel of the volume.
        min_overlap: least intersection over union of views that are drawn together.
        overlap_prob: share of the pairs that are drawn together; the others lie anywhere.
        flip_prob: probability of a flip, a number or one per axis, drawn for each view and axis.
        placement: "uniform": view 1 anywhere, view 2 anywhere that meets it; "seed": both anywhere around one voxel.

    Shapes: (C, *spatial) -> two views (C, *roi_size) float32 and `view_affine` (2, n + 1, n + 1), a plain float64
    tensor: index in the view -> index in the volume, or with `pixdim` -> world in mm. With meta tracking each view
    carries its own affine, so that it lies on the volume in a viewer.

    Raises:
        ValueError: when an argument is out of range or has another number of axes, `min_overlap` is more than views of
            unequal scale can have, the volume is smaller than the smallest view, or with `pixdim` the volume has no
            affine or axes that are not orthogonal.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("start", "extent", "flip")

    def __init__(
        self,
        roi_size: Sizes,
        scale_range: Sequence[Any] = (1.1, 1.4),
        pixdim: Sequence[float] | float | None = None,
        min_overlap: float = 0.1,
        overlap_prob: float = 1.0,
        flip_prob: Sequence[float] | float = 0.5,
        *,
        placement: str = "uniform",
    ) -> None:
        self.sampler = PairSampler(roi_size, scale_range, pixdim, min_overlap, overlap_prob, flip_prob, placement)
        self.start: np.ndarray | None = None
        self.extent: np.ndarray | None = None
        self.flip: np.ndarray | None = None

    def randomize(self, size: Sequence[int], spacing: Sequence[float] | None = None) -> None:
        """Draw whether the views lie together, the flips, then scales and places until they overlap enough.

        Args:
            size: spatial shape of the volume.
            spacing: its voxel size in mm, for `pixdim`.
        """
        self.sampler.check(size, spacing)
        self.start, self.extent, self.flip = self.sampler.draw(self.R, size, spacing)

    def check(self, img: NdarrayOrTensor, name: str = "img") -> None:
        """Raise a ValueError when no view can be cut out of the volume."""
        self.measured(img, name)

    def measured(self, img: NdarrayOrTensor, name: str = "img") -> tuple[tuple[int, ...], list[float] | None]:
        """Spatial shape of a volume that passes all checks and, where `pixdim` asks for it, its voxel size in mm."""
        if isinstance(img, MetaTensor) and img.pending_operations:
            raise ValueError(f"'{name}' has lazy operations pending; put the transform into the same Compose")
        size, spacing = tuple(img.shape[1:]), None
        if self.sampler.pixdim is not None:
            spacing = world_affine(img, len(size), name)[1]
        self.sampler.check(size, spacing, name)
        return size, spacing

    def apply(
        self,
        img: NdarrayOrTensor,
        start: Sequence[Sequence[int]] | np.ndarray,
        extent: Sequence[Sequence[int]] | np.ndarray,
        flip: Sequence[Sequence[bool]] | np.ndarray,
        mode: str = "linear",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut the two views, without any draw: (C, *roi_size) twice, and their matrices (2, n + 1, n + 1)."""
        image = _plain_tensor(img)
        ndim = image.ndim - 1
        roi = tuple(self.sampler.axes(ndim).roi.tolist())
        boxes = list(zip(start, extent, flip, strict=True))
        matrices = torch.stack([view_matrix(s, e, roi, f) for s, e, f in boxes])
        source = MetaTensor(image) if get_track_meta() and not isinstance(img, MetaTensor) else img
        views = [extract_view(image, s, e, roi, f, mode) for s, e, f in boxes]  # one after the other is faster
        first, second = (_placed(source, view, matrix) for view, matrix in zip(views, matrices))
        return first, second, matrices if self.sampler.pixdim is None else world_affine(img, ndim, "img")[0] @ matrices

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw, unless `randomize` is False, which repeats the last draw, and cut the views.

        Args:
            img: volume, (C, *spatial).
            randomize: whether to draw anew.

        Returns:
            View 1 and view 2 (C, *roi_size), and `view_affine` (2, n + 1, n + 1).
        """
        size, spacing = self.measured(img)
        if randomize:
            self.randomize(size, spacing)
        return self.apply(img, *self.last_draw())


class RandPairedViewsd(OneDrawd):
    """Dictionary form of `RandPairedViews`; one draw for all keys, which stay aligned.

    Source: arXiv 2011.12640, arXiv 2012.02383. An item holds afterwards, for every key, `<key>` view 1 and `<key>_2`
    view 2, (C, *roi_size), and once `view_affine` (2, n + 1, n + 1), a plain float64 tensor.

    Args:
        keys: volumes of one spatial shape and one affine, (C, *spatial).
        roi_size: see `RandPairedViews`.
        scale_range: see `RandPairedViews`.
        pixdim: see `RandPairedViews`.
        min_overlap: see `RandPairedViews`.
        overlap_prob: see `RandPairedViews`.
        flip_prob: see `RandPairedViews`.
        mode: "linear" or, for masks, "nearest"; one or one per key.
        allow_missing_keys: do not raise when a key is absent.
        placement: see `RandPairedViews`.

    Raises:
        ValueError: as `RandPairedViews`, with the key; or when keys differ in spatial shape or affine, the mode is
            unknown, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sizes,
        scale_range: Sequence[Any] = (1.1, 1.4),
        pixdim: Sequence[float] | float | None = None,
        min_overlap: float = 0.1,
        overlap_prob: float = 1.0,
        flip_prob: Sequence[float] | float = 0.5,
        mode: Sequence[str] | str = "linear",
        allow_missing_keys: bool = False,
        *,
        placement: str = "uniform",
    ) -> None:
        transform = RandPairedViews(
            roi_size, scale_range, pixdim, min_overlap, overlap_prob, flip_prob, placement=placement
        )
        super().__init__(keys, transform, "view_affine", False, allow_missing_keys)
        check_written_keys([*self.keys, *(f"{key}_2" for key in self.keys)], "view_affine", False)
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        if not set(self.mode) <= {"linear", "nearest"}:
            raise ValueError(f"mode must be 'linear' or 'nearest', one or one per key, got {mode}")

    start = property(lambda self: self.transform.start, doc="First voxels of the last views, (2, n).")
    extent = property(lambda self: self.transform.extent, doc="Voxels of the volume that they cover, (2, n).")
    flip = property(lambda self: self.transform.flip, doc="Flips of the last views, (2, n).")

    def randomize(self, size: Sequence[int], spacing: Sequence[float] | None = None) -> None:
        """Draw once for all keys; see `RandPairedViews.randomize`."""
        self.transform.randomize(size, spacing)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and cut the views of every key.

        Args:
            data: item with the volumes.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with the keys named above beside the untouched others.
        """
        d = dict(data)
        modes = dict(self.key_iterator(d, self.mode))
        if not modes:
            return d
        keys = list(modes)
        size = shared_size(d, keys)
        measured = [self.transform.measured(d[key], str(key)) for key in keys]
        check_affines(d, keys, size)
        if randomize:
            self.randomize(*measured[0])
        drawn = self.transform.last_draw()
        for key, mode in modes.items():
            d[key], d[f"{key}_2"], d["view_affine"] = self.transform.apply(d[key], *drawn, mode)
        return d


RandPairedViewsD = RandPairedViewsDict = RandPairedViewsd


def _placed(source: NdarrayOrTensor, view: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The view with the meta data of the volume and the affine of its own place."""
    if not isinstance(source, MetaTensor):
        return view
    rank = len(source.affine) - 1  # MONAI keeps a 4 x 4 affine for 2D images too
    step = matrix if len(matrix) == rank + 1 else torch.as_tensor(to_affine_nd(rank, matrix))
    return with_meta_of(source, view, source.affine @ step.to(source.affine))
