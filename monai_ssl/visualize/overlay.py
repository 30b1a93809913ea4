# SPDX-License-Identifier: Apache-2.0
"""A scan with its label and a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

__all__ = ["plot_overlay"]

_PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}  # by the axis that is cut, for volumes in RAS order
_COLOURS = colormaps["tab20"](np.r_[0:20:2, 1:20:2])[:, :3]  # neighbours unlike each other


def plot_overlay(
    image: Any,
    label: Any,
    prediction: Any = None,
    file: str | Path | None = None,
    title: str = "",
    spacing: Sequence[float] | None = None,
) -> Figure:
    """Draw axial, coronal and sagittal slices through the label's centre: label filled, prediction as a line.

    Args:
        image: (X, Y, Z), (1, X, Y, Z) or 2D alike, axes in RAS order.
        label: integers of the image's shape, 0 is background; each class has a colour of its own.
        prediction: integers likewise, or None.
        file: picture to write; its folder is made.
        title: heading.
        spacing: size of a voxel in mm, for the proportions; None: cubes.

    Returns:
        the figure.

    Raises:
        ValueError: when the shapes differ.
    """
    scan, reference = _spatial(image), _spatial(label)
    outcome = None if prediction is None else _spatial(prediction)
    for name, other in (("label", reference), ("prediction", outcome)):
        if other is not None and other.shape != scan.shape:
            raise ValueError(f"image {scan.shape} and {name} {other.shape} must have one shape.")
    spacing = [1.0] * scan.ndim if spacing is None else list(spacing)
    centre = _centre(reference if reference.any() or outcome is None else outcome)
    cuts = [None] if scan.ndim == 2 else [2, 1, 0]
    figure = Figure(figsize=(3.6 * len(cuts), 4.3), dpi=110, layout="constrained")
    low, high = np.percentile(scan, (0.5, 99.5))
    for axes, axis in zip(np.ravel(figure.subplots(1, len(cuts), squeeze=False)), cuts):
        volumes = (scan, reference, outcome)
        planes = volumes if axis is None else [None if v is None else v.take(centre[axis], axis) for v in volumes]
        width, height = (s for a, s in enumerate(spacing) if a != axis)
        _draw(axes, planes, (low, max(high, low + 1e-6)), height / width)
        axes.set_title("" if axis is None else f"{_PLANES[axis]} {centre[axis]}", fontsize=9)
    _legend(figure, reference, outcome)
    if title:
        figure.suptitle(title, fontsize=11)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return figure


def _spatial(volume: Any) -> np.ndarray:
    array = torch.as_tensor(volume).detach().cpu().numpy()
    array = array[0] if array.ndim in (3, 4) and array.shape[0] == 1 else array
    if array.ndim not in (2, 3):
        raise ValueError(f"Expected a volume or an image with at most one channel, got shape {array.shape}.")
    return array


def _centre(label: np.ndarray) -> list[int]:
    """The labelled voxel nearest to the centre of mass, which may itself lie outside; the middle without a label."""
    voxels = np.argwhere(label > 0)
    if not len(voxels):
        return [size // 2 for size in label.shape]
    nearest = np.square(voxels - voxels.mean(0)).sum(1).argmin()
    return voxels[nearest].tolist()


def _draw(axes: Axes, planes: Sequence[Any], limits: tuple[float, float], aspect: float) -> None:
    scan, label = planes[0].T, planes[1].T
    prediction = None if planes[2] is None else planes[2].T
    axes.imshow(scan, cmap="gray", origin="lower", vmin=limits[0], vmax=limits[1], aspect=aspect)
    painted = np.zeros((*label.shape, 4))
    for number in np.unique(label[label > 0]):
        painted[label == number] = (*_colour(number), 0.45)
    axes.imshow(painted, origin="lower", aspect=aspect, interpolation="nearest")
    for number in [] if prediction is None else np.unique(prediction[prediction > 0]):
        mask = np.pad(prediction == number, 1).astype(float)  # a border, so that the line closes at the edge
        x, y = np.arange(mask.shape[1]) - 1, np.arange(mask.shape[0]) - 1
        axes.contour(x, y, mask, levels=[0.5], colors=[_colour(number)], linewidths=1.4)
    axes.set_xlim(-0.5, scan.shape[1] - 0.5)
    axes.set_ylim(-0.5, scan.shape[0] - 0.5)
    axes.axis("off")


def _colour(number: int) -> tuple[float, float, float]:
    return tuple(_COLOURS[(int(number) - 1) % len(_COLOURS)])


def _legend(figure: Figure, label: np.ndarray, prediction: np.ndarray | None) -> None:
    handles: list[Any] = [Patch(facecolor="0.6", alpha=0.6, label="label")]
    classes = set(np.unique(label)) - {0}
    if prediction is not None:
        handles.append(Line2D([], [], color="0.4", label="prediction"))
        classes |= set(np.unique(prediction)) - {0}
    if 1 < len(classes) <= 16:
        handles += [Patch(facecolor=_colour(number), label=str(int(number))) for number in sorted(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, fontsize=8, frameon=False)
