# SPDX-License-Identifier: Apache-2.0
"""Cuts the box that two views share out of their feature maps, so that voxels of the two lie on the same anatomy.

Coordinates: voxel k of an axis covers [k, k + 1) in corner coordinates; its index is the corner coordinate less a half.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import Tensor

__all__ = ["align_overlap", "overlap_theta"]

ANCHORS = ("rf", "cell")
_ROUNDING = 1e-6  # voxels or cells; matrices in mm reproduce whole voxels up to about 1e-10


def overlap_theta(
    view_affine: Tensor,
    view_size: Sequence[int],
    feature_size: Sequence[int],
    anchor: str = "rf",
    output_stride: float | Sequence[float] | None = None,
) -> Tensor:
    """Affine maps that sample the box shared by two views from the feature map of each, on a grid of the map's size.

    Source: the alignment of PGL (arXiv 2011.12640): undo the flips, RoIAlign, resize, here in one matrix per view.
    Differs from second-hand accounts of it in three points. Both boxes end at the minimum of their ends. The box is
    measured in voxels of the resized view, since that is what the encoder saw. A feature of strided convolutions sits
    on its receptive field's centre, view index ``output_stride * j``, and not in the middle of its cell.

    Args:
        view_affine: ``(B, 2, n + 1, n + 1)``, view index to index of the volume, or to mm; both views may be flipped
            and scaled, not rotated against each other.
        view_size: size of a view in voxels, n numbers.
        feature_size: size of a feature map in cells, n numbers.
        anchor: "rf" for strided convolutions (SegResNet, UNet, DynUNet, ResNet), "cell" where voxels are pooled or
            merged in groups (BasicUNet, SwinUNETR, ViT).
        output_stride: voxels of a view per cell, one or n numbers; None for ``view_size / feature_size``.

    Returns:
        ``(B, 2, n, n + 1)`` float64 on the device of ``view_affine``: the ``theta`` of ``F.affine_grid`` with
        ``align_corners=False``, rows and columns in the order x, y, z (last axis first). Both samples run along the
        axes of the volume. Scales are 0 on all axes where the boxes do not meet.

    Raises:
        ValueError: shapes that do not fit, an unknown anchor, a view that is no multiple of its map while
            ``output_stride`` is None, or (on the CPU only, elsewhere it would wait for the device) rotated views.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {anchor!r}")
    n = len(view_size)
    if len(feature_size) != n or view_affine.ndim != 4 or view_affine.shape[1:] != (2, n + 1, n + 1):
        raise ValueError(
            f"view_affine {tuple(view_affine.shape)} must be (B, 2, n + 1, n + 1), with n the length of view_size "
            f"{tuple(view_size)} and of feature_size {tuple(feature_size)}"
        )
    stride = _stride(view_size, feature_size, output_stride)
    start, end, empty = overlap_ends(view_affine, view_size)
    f, os = _vector(start, feature_size), _vector(start, stride)
    shift = 0.5 / os if anchor == "rf" else 0.5  # corner coordinate u is feature index u / os - shift
    first, last = start / os - shift, end / os - shift
    scale = ((last - first) / f).masked_fill(empty[:, None, None], 0.0)
    translation = (last + first + 1) / f - 1
    return torch.cat([torch.diag_embed(scale.flip(-1)), translation.flip(-1)[..., None]], dim=-1)


def overlap_ends(view_affine: Tensor, view_size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the shared box in corner coordinates of each view; start is the one with the lower volume coordinate.

    Args:
        view_affine: see :func:`overlap_theta`.
        view_size: n numbers.

    Returns:
        start ``(B, 2, n)``, end ``(B, 2, n)``, both float64, and empty ``(B,)`` bool, True where no box is shared.

    Raises:
        ValueError: views rotated against each other, on the CPU.
    """
    n = len(view_size)
    matrix = view_affine.double()
    # index of view 2 -> index of view 1; plain `solve` reads its error code back from the device
    relative = torch.linalg.solve_ex(matrix[:, 0], matrix[:, 1]).result
    ratio, offset = relative[:, :n, :n].diagonal(dim1=1, dim2=2), relative[:, :n, n]  # (B, n)
    if relative.device.type == "cpu":
        _check_parallel(relative[:, :n, :n], ratio)
    size = _vector(matrix, view_size)
    ends = torch.stack([offset - ratio / 2 + 0.5, offset + (size - 0.5) * ratio + 0.5])
    low, high = ends.amin(0).clamp_min(0), torch.minimum(size, ends.amax(0))
    empty = (high - low <= _ROUNDING).any(-1)
    columns = matrix[:, 0, :n, :n]
    largest = columns.abs().argmax(1, keepdim=True)  # (B, 1, n)
    against = columns.gather(1, largest).squeeze(1) < 0  # the axis runs against that of the volume
    start, end = torch.where(against, high, low), torch.where(against, low, high)
    to_second = lambda u: (u - 0.5 - offset) / ratio + 0.5
    return torch.stack([start, to_second(start)], 1), torch.stack([end, to_second(end)], 1), empty


def align_overlap(features: Tensor, theta: Tensor, border: float = 0.5) -> tuple[Tensor, Tensor]:
    """Features on the grid of the shared box, linearly interpolated, and where that grid lies on the map.

    Args:
        features: ``(N, C, *F)`` with 2 or 3 spatial axes.
        theta: ``(N, n, n + 1)`` of :func:`overlap_theta`.
        border: cells beyond the outermost feature centres that still count; features are repeated there. 0 takes
            samples between centres only, infinity takes all.

    Returns:
        aligned ``(N, C, *F)``, float32 for half precision and under autocast, and valid ``(N, *F)`` bool, True where
        the sample counts; nowhere for an empty box.

    Raises:
        ValueError: shapes that do not fit, or a negative border.
    """
    n = features.ndim - 2
    if n not in (2, 3) or theta.shape != (len(features), n, n + 1):
        raise ValueError(
            f"features {tuple(features.shape)} must be (N, C, *F) with 2 or 3 spatial axes and theta "
            f"{tuple(theta.shape)} (N, n, n + 1)"
        )
    if not border >= 0:
        raise ValueError(f"border must not be negative, got {border}")
    grid = F.affine_grid(theta.double(), [len(features), 1, *features.shape[2:]], align_corners=False)  # (N, *F, n)
    size = _vector(grid, features.shape[:1:-1])  # x, y, z
    place = ((grid + 1) * size - 1) / 2  # feature index
    inside = (place >= -border - _ROUNDING) & (place <= size - 1 + border + _ROUNDING)
    exists = theta[..., :n].any(-1).any(-1)
    valid = inside.all(-1) & exists.view(-1, *[1] * n)
    full = (
        features if features.dtype == torch.float64 else features.float()
    )  # a half precision grid is off by cells / 100
    return F.grid_sample(full, grid.to(full.dtype), padding_mode="border", align_corners=False), valid


def _vector(like: Tensor, values: Sequence[float]) -> Tensor:
    """A tensor of few numbers without a copy from the host, for which the device would be waited for."""
    return torch.stack([like.new_full((), value) for value in values])


def _stride(
    view_size: Sequence[int], feature_size: Sequence[int], output_stride: float | Sequence[float] | None
) -> Sequence[float]:
    if output_stride is not None:
        return ensure_tuple_rep(output_stride, len(view_size))
    if any(i % f for i, f in zip(view_size, feature_size)):
        raise ValueError(
            f"views of {tuple(view_size)} are no multiples of their maps {tuple(feature_size)}: give output_stride"
        )
    return [i / f for i, f in zip(view_size, feature_size)]


def _check_parallel(linear: Tensor, diagonal: Tensor) -> None:
    off = (linear - torch.diag_embed(diagonal)).abs().amax((1, 2))
    if not bool((off <= 1e-4 * diagonal.abs().amin(1)).all()):  # so that NaN is refused too
        raise ValueError(f"the views are rotated against each other: view 2 in view 1 has the axes {linear.tolist()}")
