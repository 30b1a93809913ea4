# SPDX-License-Identifier: Apache-2.0
"""Where a network agrees with its teacher about what two views share (PGL, arXiv 2011.12640)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_ssl.metrics import matched_accuracy, matched_chance
from monai_ssl.networks.blocks.overlap_align import overlap_ends

from .panels import COLOURS, Box, Panel
from .patches import _items, _limits

__all__ = ["agreement_panels"]


def agreement_panels(
    batch: Mapping[str, Any], network: nn.Module, image_key: str = "image", image_2_key: str | None = None
) -> list[Panel]:
    """For each pair both views with the cosine of prediction and target over the box that they share.

    Colours go from dark, a cosine of 0 or less, to light, 1; cells that do not count have none. Volumes are shown by
    the slice across the last axis through the middle cells of the shared box. Captions: the mean cosine, and the share
    of cells that are most like their own counterpart, which must lie far above its chance level; a high cosine alone
    may come from features that are the same everywhere.

    Args:
        batch: as collated after ``RandPairedViewsd``: views (B, C, *roi), ``view_affine`` (B, 2, n + 1, n + 1);
            ``name`` if there are names.
        network: ``PGLNet`` in local mode; runs on its device in evaluation mode, and its modes stay as they were.
        image_key: key of view 1.
        image_2_key: key of view 2; None: ``<image_key>_2``.

    Raises:
        ValueError: when the network gives no map of what is shared, as in global mode.
    """
    image_2_key = f"{image_key}_2" if image_2_key is None else image_2_key
    images, images_2, affine = (
        torch.as_tensor(batch[key]).detach().as_subclass(Tensor) for key in (image_key, image_2_key, "view_affine")
    )
    outputs = _evaluated(network, images, images_2, affine)
    if len(outputs) != 3:
        raise ValueError(f"the network gives {len(outputs)} outputs, not prediction, target and mask: is it PGL's?")
    cosine, start, end = F.cosine_similarity(outputs[0], outputs[1], dim=1), *overlap_ends(affine, images.shape[2:])[:2]
    panels: list[Panel] = []
    for item, (name, first, _) in enumerate(_items(batch, image_key, None)):
        pair = torch.stack([first.as_subclass(Tensor), images_2[item].cpu()])
        limits, colour = _limits(pair), COLOURS[item % len(COLOURS)]
        for v, view in enumerate(pair):
            row = item + v * len(images)
            values = cosine[row].masked_fill(~outputs[2][row], torch.nan)
            plane, heat, box = _plane(view, values, start[item, v], end[item, v])
            boxes = [box._replace(colour=colour)] if bool(outputs[2][row].any()) else []
            caption = f"{name}, view {v + 1} predicts view {2 - v}: {_caption(values, *(o[[row]] for o in outputs))}"
            panels.append(Panel(plane, caption, boxes, limits=limits, heat=heat))
    return panels


def _evaluated(network: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What the network gives in evaluation mode, on the CPU; modes as before."""
    device = next(network.parameters()).device
    modes = [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return [output.cpu() for output in network(*(x.to(device) for x in inputs))]
    finally:
        for layer, training in modes:
            layer.training = training


def _plane(view: Tensor, values: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Box]:
    """The picture (C, X, Y) of a view (C, *roi), the values (*F) of the box over its pixels, and the box."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    if view.ndim == 4:
        depth = values.shape[2] // 2
        middle = start[2] + (depth + 0.5) / values.shape[2] * (end[2] - start[2])
        view, values = view[..., int(middle.clamp(0, view.shape[3] - 1))], values[..., depth]
    rows, columns = (_cells(torch.arange(view.shape[a + 1]), start[a], end[a], values.shape[a]) for a in range(2))
    heat = values[rows.clamp_min(0)][:, columns.clamp_min(0)]
    outside = (rows < 0)[:, None] | (columns < 0)
    box = Box(low[:2].tolist(), (high - low)[:2].tolist(), label="shared")
    return view, heat.masked_fill(outside, torch.nan), box


def _cells(pixel: Tensor, start: Tensor, end: Tensor, number: int) -> Tensor:
    """Cell of the shared box in which the centre of each pixel lies, -1 outside; cells are counted from start."""
    place = (pixel + 0.5 - start) / (end - start)
    return torch.where((place >= 0) & (place < 1), (place * number).long().clamp_max(number - 1), -1)


def _caption(values: Tensor, prediction: Tensor, target: Tensor, mask: Tensor) -> str:
    if not bool(mask.any()):
        return "nothing shared"
    found, chance = float(matched_accuracy(prediction, target, mask)), float(matched_chance(mask))
    return f"mean cosine {float(values.nanmean()):.2f}, {100 * found:.0f}% find their own (chance {100 * chance:.2g}%)"
