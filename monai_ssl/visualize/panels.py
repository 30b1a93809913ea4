# SPDX-License-Identifier: Apache-2.0
"""Captioned images side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

__all__ = ["COLOURS", "Box", "Panel", "draw_panels", "figure_image"]

# distinct on grey images and from each other, also for most colour-blind readers
COLOURS = ("#ffb000", "#4cc9f0", "#ff5fa2", "#7ddf64", "#c792ff", "#ff7b39", "#fff275", "#3d8bff", "#e6e6e6", "#00d1a7")


class Box(NamedTuple):
    """A rectangle in a panel; pixel k covers [k, k + 1)."""

    start: Sequence[float]  # along the first two spatial axes, pixels
    size: Sequence[float]
    colour: str = "white"
    label: str = ""
    dashed: bool = False


class Panel(NamedTuple):
    """An image with its caption.

    A volume (C, X, Y, Z) is shown by the slice in the middle of its last axis, an image (C, X, Y) as it is: first
    channel, x to the right, y upwards.
    """

    image: torch.Tensor | np.ndarray
    caption: str = ""
    boxes: Sequence[Box] = ()
    colour: str | None = None  # of the frame
    limits: tuple[float, float] | None = None  # values shown black and white; None: percentiles 0.5 and 99.5
    lead: bool = False  # begins a new group and is drawn twice as large
    heat: torch.Tensor | np.ndarray | None = None  # (X, Y), laid over the image from 0, dark, to 1, light; NaN: nothing


def draw_panels(panels: Sequence[Panel], columns: int = 5, cell: float = 1.9) -> Figure:
    """Draw panels in groups: a leading panel with the others beside it, or rows where nothing leads.

    Args:
        panels: what to draw, in reading order.
        columns: panels per row in a group without a leading panel.
        cell: side of a panel in inches.

    Returns:
        a matplotlib figure that needs no display; ``figure.savefig(file)`` writes it.

    Raises:
        ValueError: when there is nothing to draw.
    """
    if not panels:
        raise ValueError("There are no panels to draw.")
    places, rows, width = _places(panels, columns)
    lines = max(len(_wrapped(panel, span, cell)) for panel, (_, _, span) in zip(panels, places))
    height = rows * (cell + 0.15 + 0.13 * max(2, lines))  # inches; captions that do not fit would be cut off
    figure = Figure(figsize=(width * cell + 0.2, height), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows, width)
    for panel, (row, column, span) in zip(panels, places):
        axes = figure.add_subplot(grid[row : row + span, column : column + span])
        _draw(axes, panel, caption="\n".join(_wrapped(panel, span, cell)))
    return figure


def figure_image(figure: Figure) -> np.ndarray:
    """The figure as an image (H, W, 3) of uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _places(panels: Sequence[Panel], columns: int) -> tuple[list[tuple[int, int, int]], int, int]:
    groups: list[list[Panel]] = []
    for panel in panels:
        if panel.lead or not groups:
            groups.append([])
        groups[-1].append(panel)
    places, top, width = [], 0, 1
    for group in groups:
        offset, followers = (2, len(group) - 1) if group[0].lead else (0, len(group))
        per_row = -(-followers // 2) if group[0].lead else min(columns, followers)
        if group[0].lead:
            places.append((top, 0, 2))
        places += [(top + i // per_row, offset + i % per_row, 1) for i in range(followers)]
        top += 2 if group[0].lead else -(-followers // per_row)
        width = max(width, offset + per_row)
    return places, top, width


def _wrapped(panel: Panel, span: int, cell: float) -> list[str]:
    return textwrap.wrap(panel.caption, round(span * cell * 16))


def _draw(axes: Axes, panel: Panel, caption: str) -> None:
    image = torch.as_tensor(panel.image).detach().float().cpu()
    if image.ndim not in (3, 4):
        raise ValueError(f"A panel's image must be (C, X, Y) or (C, X, Y, Z), got shape {tuple(image.shape)}.")
    plane = image[0] if image.ndim == 3 else image[0, ..., image.shape[-1] // 2]
    low, high = np.percentile(plane.numpy(), (0.5, 99.5)) if panel.limits is None else panel.limits
    axes.imshow(plane.T.numpy(), cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6))
    if panel.heat is not None:
        heat = torch.as_tensor(panel.heat).detach().float().cpu().T.numpy()
        axes.imshow(heat, cmap="viridis", origin="lower", vmin=0, vmax=1, alpha=0.6, interpolation="nearest")
    for box in panel.boxes:
        x, y = box.start[0] - 0.5, box.start[1] - 0.5  # imshow puts the centre of pixel k at k
        line = (0, (4, 3)) if box.dashed else "solid"
        frame = Rectangle((x, y), box.size[0], box.size[1], fill=False, edgecolor=box.colour, linestyle=line)
        frame.set_linewidth(0.6 if box.colour == "white" else 1.6)
        axes.add_patch(frame)
        outline = {"boxstyle": "round,pad=0.15", "facecolor": "black", "edgecolor": "none", "alpha": 0.55}
        if box.label:
            axes.text(x, y + box.size[1], f" {box.label}", color=box.colour, fontsize=6.5, va="top", bbox=outline)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=panel.colour or "black", linewidth=3 if panel.colour else 0.5)
    axes.set_anchor("S")  # what is left of the height is the caption's
    axes.set_title(caption, fontsize=7.5, loc="left", pad=4)
