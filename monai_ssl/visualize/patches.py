# SPDX-License-Identifier: Apache-2.0
"""What the patch pretexts show the network (arXiv 2006.03829)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import PurePath
from typing import Any

import torch
from einops import rearrange

from monai_ssl.networks.nets.cpc_net import cpc_indices
from monai_ssl.transforms.cube_rotation import rotation_table
from monai_ssl.transforms.relative_location import location_offsets

from .panels import COLOURS, Box, Panel

__all__ = ["cpc_panels", "jigsaw_panels", "relative_location_panels", "rotation_panels", "view_panels"]

MOST_QUERIES = 9


def relative_location_panels(
    batch: Mapping[str, Any], grid_size: Sequence[int], image_key: str = "image", label_key: str = "label"
) -> list[Panel]:
    """For each volume the patch in the centre, then the first of the others with their offset from it in cells.

    Args:
        batch: as collated after ``RandRelativeLocationd``: patches (B, 1 + Q, C, *s), label (B, Q).
        grid_size: as given to the transform.
        image_key: key of the patches.
        label_key: key of the labels.
    """
    offsets = location_offsets(grid_size)
    panels: list[Panel] = []
    for name, patches, label in _items(batch, image_key, label_key):
        limits = _limits(patches)
        panels.append(
            Panel(patches[0], f"{name}: centre; {len(label)} others, where are they?", limits=limits, lead=True)
        )
        for patch, place in list(zip(patches[1:], label.tolist()))[:MOST_QUERIES]:
            offset = " ".join(f"{step:+d}" if step else "0" for step in offsets[place].tolist())
            panels.append(Panel(patch, f"class {place}: {offset}", limits=limits))
    return panels


def jigsaw_panels(
    batch: Mapping[str, Any],
    permutations: torch.Tensor,
    grid_size: Sequence[int],
    image_key: str = "image",
    label_key: str = "label",
) -> list[Panel]:
    """For each volume the patches as the network gets them, then in their right places, both laid out as the grid.

    In 3D the middle slice of the middle layer of the grid is shown.

    Args:
        batch: as collated after ``RandJigsawd``: patches (B, P, C, *s), label (B,).
        permutations: the table of the transform, (N, P): place i shows grid patch ``permutations[label][i]``.
        grid_size: as given to the transform.
        image_key: key of the patches.
        label_key: key of the labels.
    """
    panels: list[Panel] = []
    for name, patches, label in _items(batch, image_key, label_key):
        order = torch.as_tensor(permutations)[int(label)]
        limits = _limits(patches)
        shown, boxes = _mosaic(patches, grid_size)
        labels = [str(k) for k in _layer(order, grid_size)]
        boxes = [box._replace(label=text) for box, text in zip(boxes, labels)]
        panels.append(Panel(shown, f"{name}: permutation {int(label)}", boxes, limits=limits, lead=True))
        panels.append(Panel(_mosaic(patches[order.argsort()], grid_size)[0], "put right", limits=limits))
    return panels


def rotation_panels(
    batch: Mapping[str, Any], group: str, image_key: str = "image", label_key: str = "label"
) -> list[Panel]:
    """The rotated crops with class, axes and flips.

    Args:
        batch: as collated after ``RandCubeRotationd``: images (B, C, *spatial), label (B,).
        group: as given to the transform.
        image_key: key of the images.
        label_key: key of the labels.
    """
    panels = []
    for name, image, label in _items(batch, image_key, label_key):
        axes, flips = (table[int(label)].tolist() for table in rotation_table(group, image.ndim - 1))
        turned = [a for a, flip in zip(range(len(axes)), flips) if flip]
        change = f"axes {axes}" + (f", flipped {turned}" if turned else "")
        panels.append(Panel(image, f"{name}: class {int(label)}, {change}", limits=_limits(image)))
    return panels


def cpc_panels(
    batch: Mapping[str, Any], grid_size: Sequence[int], skip: int = 0, image_key: str = "image"
) -> list[Panel]:
    """For each volume the grid of patches, with the context and the targets of one column framed.

    In 3D the middle layer of the grid is shown; prediction runs to the right.

    Args:
        batch: as collated after ``RandGridPatchesd``: patches (B, P, C, *s).
        grid_size: as given to the transform.
        skip: as given to ``CPCNet``.
        image_key: key of the patches.
    """
    context, target = cpc_indices(grid_size, skip)
    layer = torch.arange(prod(grid_size)).reshape(*grid_size)
    layer = layer[..., layer.shape[-1] // 2] if layer.ndim == 3 else layer
    column = next(q for q in range(len(target)) if int(target[q, 0]) in layer[:, layer.shape[1] // 2])
    panels = []
    for name, patches, _ in _items(batch, image_key, None):
        shown, cells = _mosaic(patches, grid_size)
        boxes = [
            cell._replace(
                colour=COLOURS[0 if k in context[column] else 1], label="seen" if k in context[column] else "?"
            )
            for cell, k in zip(cells, layer.flatten().tolist())
            if k in context[column] or k in target[column]
        ]
        caption = f"{name}: {len(patches)} patches; one of {len(target)} columns: codes seen, and to be predicted"
        panels.append(Panel(shown, caption, boxes, limits=_limits(patches), lead=True))
    return panels


def view_panels(batch: Mapping[str, Any], image_key: str = "image") -> list[Panel]:
    """The views of each volume side by side; views of one volume are a positive pair.

    Args:
        batch: as collated after ``RandViewsd``: views (B, V, C, *spatial).
        image_key: key of the views.
    """
    panels = []
    for number, (name, views, _) in enumerate(_items(batch, image_key, None)):
        limits, colour = _limits(views), COLOURS[number % len(COLOURS)]
        panels += [Panel(view, f"{name}: view {v + 1}", colour=colour, limits=limits) for v, view in enumerate(views)]
    return panels


def _items(batch: Mapping[str, Any], image_key: str, label_key: str | None) -> list[tuple[str, torch.Tensor, Any]]:
    images = torch.as_tensor(batch[image_key]).detach().cpu()
    labels = [None] * len(images) if label_key is None else torch.as_tensor(batch[label_key]).cpu()
    names = batch.get("name")
    shown = [f"volume {i + 1}" if names is None else PurePath(str(names[i])).name for i in range(len(images))]
    return list(zip(shown, images, labels))


def _limits(images: torch.Tensor) -> tuple[float, float]:
    values = images.float().flatten()
    low, high = torch.quantile(values[:: max(1, values.numel() // 1_000_000)], torch.tensor([0.005, 0.995])).tolist()
    return low, high


def _layer(order: torch.Tensor, grid_size: Sequence[int]) -> list[int]:
    cells = order.reshape(*grid_size)
    return (cells[..., cells.shape[-1] // 2] if len(grid_size) == 3 else cells).flatten().tolist()


def _mosaic(patches: torch.Tensor, grid_size: Sequence[int]) -> tuple[torch.Tensor, list[Box]]:
    """One image (C, X, Y) of the patches laid out as their grid, a gap of a pixel between them, and their boxes."""
    if len(grid_size) == 3:
        stack = rearrange(patches, "(i j k) c x y z -> i j k c x y z", i=grid_size[0], j=grid_size[1])
        stack = stack[:, :, grid_size[2] // 2, ..., patches.shape[-1] // 2]  # (i, j, C, X, Y)
    else:
        stack = rearrange(patches, "(i j) c x y -> i j c x y", i=grid_size[0])
    size = stack.shape[-2:]
    stack = torch.nn.functional.pad(stack, (0, 1, 0, 1), value=float(stack.min()))
    boxes = [
        Box((i * (size[0] + 1), j * (size[1] + 1)), size) for i in range(grid_size[0]) for j in range(grid_size[1])
    ]
    return rearrange(stack, "i j c x y -> c (i x) (j y)"), boxes
