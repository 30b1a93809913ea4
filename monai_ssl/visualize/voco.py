# SPDX-License-Identifier: Apache-2.0
"""What VoCo is shown (arXiv 2402.17300)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import PurePath
from typing import Any

import torch
from einops import rearrange
from monai.utils import ensure_tuple_rep

from .panels import COLOURS, Box, Panel

__all__ = ["voco_panels"]


def voco_panels(
    batch: Mapping[str, Any],
    roi_size: Sequence[int] | int,
    grid_size: Sequence[int],
    image_key: str = "image",
    label_key: str = "label",
) -> list[Panel]:
    """For each volume: its base crops laid out as their grid with the random crops as boxes, then the random crops.

    The grid shows the middle slice of the first layer of cells; boxes of crops that begin in a deeper layer are dashed.
    A crop's frame has the colour of its box, its caption lists the cells with the largest shares of its target.

    Args:
        batch: as collated after ``RandVoCoCropsd``: ``<image>`` (B, R, C, *roi), ``<image>_base`` (B, K, C, *roi),
            ``<image>_origin`` (B, R, n) and ``<label>`` (B, R, K); ``name`` if there are names.
        roi_size: crop size in voxels, as given to ``RandVoCoCropsd`` (crops may since have been resized).
        grid_size: base crops along each axis.

    Raises:
        ValueError: when the batch does not have these shapes.
    """
    num_axes = len(grid_size)
    roi = ensure_tuple_rep(roi_size, num_axes)
    keys = (image_key, f"{image_key}_base", f"{image_key}_origin", label_key)
    crops, bases, origins, labels = (torch.as_tensor(batch[key]).detach().cpu() for key in keys)
    if bases.ndim != 3 + num_axes or bases.shape[1] != prod(grid_size) or labels.shape[2] != prod(grid_size):
        raise ValueError(
            f"grid_size {tuple(grid_size)} does not fit base crops {tuple(bases.shape)}, label {tuple(labels.shape)}."
        )
    names = batch.get("name")
    panels: list[Panel] = []
    for item in range(len(crops)):
        limits = tuple(
            torch.quantile(bases[item, :, 0].float().flatten()[:: _stride(bases[item, :, 0])], _ENDS).tolist()
        )
        scale = [bases.shape[3 + axis] / roi[axis] for axis in range(num_axes)]
        name = f"volume {item + 1}" if names is None else PurePath(str(names[item])).name
        boxes = _cells(bases, grid_size) + _boxes(origins[item], roi, scale)
        caption = f"{name}: {len(bases[item])} base crops; boxes: {len(crops[item])} random crops"
        panels.append(Panel(_mosaic(bases[item], grid_size), caption, boxes, limits=limits, lead=True))
        for number, crop in enumerate(crops[item]):
            caption = f"crop {number + 1}: {_shares(labels[item, number])}"
            panels.append(Panel(crop, caption, colour=COLOURS[number % len(COLOURS)], limits=limits))
    return panels


_ENDS = torch.tensor([0.005, 0.995])


def _stride(values: torch.Tensor) -> int:
    return max(1, values.numel() // 1_000_000)  # torch.quantile takes 16 million values at most


def _mosaic(bases: torch.Tensor, grid_size: Sequence[int]) -> torch.Tensor:
    if len(grid_size) == 2:
        return rearrange(bases, "(i j) c x y -> c (i x) (j y)", i=grid_size[0])
    layer = rearrange(bases, "(i j k) c x y z -> k c (i x) (j y) z", i=grid_size[0], j=grid_size[1])[0]
    return layer[..., layer.shape[-1] // 2]


def _cells(bases: torch.Tensor, grid_size: Sequence[int]) -> list[Box]:
    size = bases.shape[3:5]
    depth = prod(grid_size[2:])  # cells are numbered with the last axis fastest
    return [
        Box((i * size[0], j * size[1]), size, label=str((i * grid_size[1] + j) * depth))
        for i in range(grid_size[0])
        for j in range(grid_size[1])
    ]


def _boxes(origins: torch.Tensor, roi: Sequence[int], scale: Sequence[float]) -> list[Box]:
    boxes = []
    for number, origin in enumerate(origins.tolist()):
        start, size = zip(*((o * s, r * s) for o, r, s in zip(origin[:2], roi, scale)))
        deeper = len(roi) == 3 and origin[2] >= roi[2]
        boxes.append(Box(start, size, COLOURS[number % len(COLOURS)], dashed=deeper))
    return boxes


def _shares(label: torch.Tensor, most: int = 4) -> str:
    cells = [int(k) for k in label.argsort(descending=True, stable=True) if label[k] > 0]
    listed = [f"{100 * float(label[k]):.0f}% in {'cell ' if k == cells[0] else ''}{k}" for k in cells[:most]]
    if len(cells) > most:
        listed[-1] += ", ..."
    return ", ".join(share.replace(" ", "\N{NO-BREAK SPACE}") for share in listed)  # lines break between cells only
