# SPDX-License-Identifier: Apache-2.0
"""A point of one scan and where it was found in another (SAM, arXiv 2012.02383)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import Orientation

from monai_ssl.transforms.view_geometry import spacing_of, transform_points

__all__ = ["plot_match"]

# by the axis that is cut, for volumes in RAS order: name, and what lies left, right, at the bottom and at the top
_PLANES = {2: ("axial", "RLPA"), 1: ("coronal", "RLIS"), 0: ("sagittal", "APIS")}
_EDGES = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.02), (0.5, 0.98))
_CROSS = "#ffb000"


class _Scan(NamedTuple):
    values: np.ndarray  # (*size), axes to the right, anterior, superior
    affine: torch.Tensor
    limits: tuple[float, float]


def plot_match(
    template: MetaTensor,
    query: MetaTensor,
    template_point: Any,
    match_point: Any,
    similarity: torch.Tensor | None = None,
    title: str = "",
    file: str | Path | None = None,
    limits: Sequence[float] | None = None,
) -> Figure:
    """Draw the template point, the similarity map and the match, in three planes each.

    Axial, coronal and sagittal slices lie on top of each other, each through the point that the column is about; the
    patient's right or front is on the left of the picture, as radiologists look at scans. The map is drawn from its
    median over the scan (from 0 where that is negative), dark, to its largest value, light.

    Args:
        template: (1, *size) with affine; 2D images have one row.
        query: the scan that was searched, likewise.
        template_point: (n,), RAS mm.
        match_point: where it was found in the query, (n,), RAS mm.
        similarity: (1, *size), on the grid of `query`; None: without that column.
        title: heading.
        file: picture to write; its folder is made.
        limits: values shown black and white; None: percentiles 0.5 and 99.5 of each scan.

    Returns:
        the figure.

    Raises:
        ValueError: scans without affine, of other shapes, or a map of another size than the query.
    """
    known, found = _scan(template, "template", limits), _scan(query, "query", limits)
    heat = None
    if similarity is not None:
        if similarity.shape[1:] != query.shape[1:]:
            raise ValueError(f"similarity {tuple(similarity.shape)} must be on the grid of query {tuple(query.shape)}")
        plain = torch.as_tensor(similarity).as_subclass(torch.Tensor)
        heat = _scan(MetaTensor(plain, affine=query.affine), "similarity").values
    columns: list[tuple[str, _Scan, Any, np.ndarray | None]] = [("template point", known, template_point, None)]
    if heat is not None:
        columns.append(("similarity", found, match_point, heat))
    columns.append(("match", found, match_point, None))
    cuts: list[int | None] = [2, 1, 0] if known.values.ndim == 3 else [None]
    figure = Figure(figsize=(3.4 * len(columns), 3.2 * len(cuts) + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(len(cuts), len(columns), squeeze=False)
    for row, cut in enumerate(cuts):
        for axes, (name, scan, point, values) in zip(grid[row], columns):
            _draw(axes, scan, _place(scan, point), cut, values)
            plane = "" if cut is None else f", {_PLANES[cut][0]}, {'xyz'[cut]} = {float(point[cut]):.1f} mm"
            axes.set_title(f"{name}{plane}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return figure


def _scan(image: Any, name: str, limits: Sequence[float] | None = None) -> _Scan:
    if not isinstance(image, MetaTensor) or image.ndim not in (3, 4) or len(image) < 1:
        raise ValueError(f"{name} must be a MetaTensor (1, *size) with its affine, got {type(image).__name__}")
    image = image[:1].detach().cpu()
    if image.ndim == 4:
        image = Orientation(axcodes="RAS", labels=None)(image)
    affine = torch.as_tensor(to_affine_nd(image.ndim - 1, image.affine.double().numpy()), dtype=torch.float64)
    values = image.as_tensor()[0].float().numpy()
    low, high = np.percentile(values, (0.5, 99.5)) if limits is None else limits
    return _Scan(values, affine, (float(low), max(float(high), float(low) + 1e-6)))


def _place(scan: _Scan, point: Any) -> np.ndarray:
    """Index of a world point."""
    point = torch.as_tensor(point).detach().cpu().double().reshape(1, -1)
    return transform_points(torch.linalg.inv(scan.affine), point)[0].numpy()


def _draw(axes: Axes, scan: _Scan, place: np.ndarray, cut: int | None, heat: np.ndarray | None) -> None:
    kept = [axis for axis in range(scan.values.ndim) if axis != cut]
    width, height = spacing_of(scan.affine)[kept].tolist()
    style: dict[str, Any] = {"origin": "lower", "aspect": height / width}
    axes.imshow(_plane(scan.values, place, cut).T, cmap="gray", vmin=scan.limits[0], vmax=scan.limits[1], **style)
    if heat is not None:
        low = min(max(0.0, float(np.median(heat))), float(heat.max()) - 1e-6)
        axes.imshow(_plane(heat, place, cut).T, cmap="inferno", vmin=low, vmax=float(heat.max()), alpha=0.6, **style)
    x, y = place[kept]
    axes.axvline(x, color=_CROSS, linewidth=0.7, alpha=0.45)
    axes.axhline(y, color=_CROSS, linewidth=0.7, alpha=0.45)
    axes.plot([x], [y], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=_CROSS, markeredgewidth=1.5)
    _frame(axes, [scan.values.shape[axis] for axis in kept], cut)


def _frame(axes: Axes, size: Sequence[int], cut: int | None) -> None:
    """Limits and the letters of the patient's sides for a plane (X, Y) of a volume in RAS order."""
    axes.set_xlim(*((-0.5, size[0] - 0.5) if cut is None else (size[0] - 0.5, -0.5)))
    axes.set_ylim(-0.5, size[1] - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for (left, bottom), side in zip(_EDGES, "" if cut is None else _PLANES[cut][1]):
        sides: dict[str, Any] = {"ha": "left" if left < 0.1 else "right" if left > 0.9 else "center"}
        sides["va"] = "bottom" if bottom < 0.1 else "top" if bottom > 0.9 else "center"
        sides["bbox"] = {"boxstyle": "round,pad=0.1", "facecolor": "black", "edgecolor": "none", "alpha": 0.5}
        axes.text(left, bottom, side, transform=axes.transAxes, color="white", fontsize=7, **sides)


def _plane(values: np.ndarray, place: np.ndarray, cut: int | None) -> np.ndarray:
    if cut is None:
        return values
    return values.take(int(np.clip(np.rint(place[cut]), 0, values.shape[cut] - 1)), cut)
