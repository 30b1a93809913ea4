# SPDX-License-Identifier: Apache-2.0
"""Two views of one volume and what they share (PGL, arXiv 2011.12640; SAM, arXiv 2012.02383)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monai_ssl.transforms.view_geometry import spacing_of

from .panels import COLOURS, Box, Panel
from .patches import _items, _limits

__all__ = ["paired_view_panels"]


def paired_view_panels(
    batch: Mapping[str, Any],
    image_key: str = "image",
    image_2_key: str | None = None,
    affine_key: str = "view_affine",
    unit: str = "voxels",
    axis: int = -1,
) -> list[Panel]:
    """For each volume the middle slices of both views with a frame around what the other view shows too.

    The frame is dashed where the slice itself lies outside of what is shared. Captions: the share of the view that lies
    in the other and the intersection over union, the step from pixel to pixel, and the axes that are flipped, for
    matrices in voxels against the volume, for others those of view 2 against view 1.

    Args:
        batch: as collated after ``RandPairedViewsd``: views (B, C, *roi), matrices (B, 2, n + 1, n + 1); ``name`` if
            there are names.
        image_key: key of view 1.
        image_2_key: key of view 2; None: ``<image_key>_2``.
        affine_key: key of the matrices.
        unit: of the space that the matrices lead to, "voxels", or "mm" where the transform was given ``pixdim``.
        axis: spatial axis across which volumes are sliced.

    Raises:
        ValueError: when the batch does not have these shapes, or views are rotated against each other.
    """
    image_2_key = f"{image_key}_2" if image_2_key is None else image_2_key
    seconds = torch.as_tensor(batch[image_2_key]).detach().cpu()
    panels: list[Panel] = []
    for number, (name, first, matrices) in enumerate(_items(batch, image_key, affine_key)):
        views, matrices = (first, seconds[number]), torch.as_tensor(matrices).double()
        size, rank = tuple(first.shape[1:]), first.ndim
        if views[1].shape != first.shape or matrices.shape != (2, rank, rank):
            raise ValueError(
                f"'{image_key}' {tuple(first.shape)}, '{image_2_key}' {tuple(views[1].shape)} and '{affine_key}' "
                f"{tuple(matrices.shape)} do not belong together"
            )
        ends = [_shared(matrices[v], matrices[1 - v], size) for v in range(2)]
        limits, colour = _limits(torch.stack(views)), COLOURS[number % len(COLOURS)]
        captions = _captions(matrices, ends, size, unit)
        for v, view in enumerate(views):
            shown, box = _slice(view, *ends[v], axis)
            boxes = [] if box is None else [box._replace(colour=colour)]
            # no coloured edge: it would hide a frame that runs along it
            panels.append(Panel(shown, f"{name}, view {v + 1}: {captions[v]}", boxes, limits=limits))
    return panels


def _shared(own: torch.Tensor, other: torch.Tensor, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where what both views show begins and ends in this one, pixel k covering [k, k + 1); nothing: ends at 0."""
    to_own = torch.linalg.inv(own) @ other
    step, shift = to_own[:-1, :-1].diagonal(), to_own[:-1, -1]
    if (to_own[:-1, :-1] - torch.diag(step)).abs().max() > 1e-3 * step.abs().min():
        raise ValueError(f"views are rotated against each other: index of one -> index of the other {to_own.tolist()}")
    length = torch.tensor(size, dtype=step.dtype)
    ends = torch.stack([shift - step / 2, shift + (length - 0.5) * step]) + 0.5
    low, high = ends.amin(0).clamp_min(0), torch.minimum(ends.amax(0), length)
    return (low, high) if bool((high > low).all()) else (torch.zeros_like(low), torch.zeros_like(high))


def _captions(matrices: torch.Tensor, ends: Any, size: tuple[int, ...], unit: str) -> list[str]:
    shares = [float(((high - low) / torch.tensor(size)).prod()) for low, high in ends]
    whole = [float(matrix[:-1, :-1].det().abs()) for matrix in matrices]
    overlap = shares[0] * whole[0]
    against = torch.eye(len(size) + 1, dtype=matrices.dtype) if unit == "voxels" else matrices[0]
    captions = []
    for v, matrix in enumerate(matrices):
        text = f"{100 * shares[v]:.0f}% shared (IoU {overlap / (sum(whole) - overlap):.2f}), "
        text += "\N{MULTIPLICATION SIGN}".join(f"{step:.2f}" for step in spacing_of(matrix).tolist()) + f" {unit}"
        turned = (torch.linalg.inv(against) @ matrix)[:-1, :-1].diagonal() < 0
        flipped = [str(a) for a, flip in enumerate(turned.tolist()) if flip]
        captions.append(text + (f", flipped: {', '.join(flipped)}" if flipped else ""))
    return captions


def _slice(view: torch.Tensor, low: torch.Tensor, high: torch.Tensor, axis: int) -> tuple[torch.Tensor, Box | None]:
    """The picture (C, X, Y) and the frame in it."""
    kept, dashed = [0, 1], False
    if view.ndim == 4:
        axis = axis % 3
        kept, middle = [a for a in range(3) if a != axis], view.shape[axis + 1] // 2
        dashed = not float(low[axis]) <= middle + 0.5 <= float(high[axis])
        view = view.select(axis + 1, middle)
    box = Box(low[kept].tolist(), (high - low)[kept].tolist(), label="shared", dashed=dashed)
    return view, box if bool((high > low).all()) else None
