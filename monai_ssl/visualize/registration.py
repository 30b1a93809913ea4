# SPDX-License-Identifier: Apache-2.0
"""Two images before and after their registration, and how the field stretches space (SAME, arXiv 2109.11572)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from monai.data import MetaTensor

from monai_ssl.transforms.view_geometry import spacing_of

from .matching import _PLANES, _frame, _plane, _scan

__all__ = ["plot_registration"]

FIXED, MOVING, FOLDED = "#00ff00", "#ff00ff", "black"  # the first two add up to white
DARK = 0.05  # share of the range of grey up to which a voxel counts as black
TILES = 10  # of the checkerboard along the longest side of a plane
TICKS = (1.1, 1.2, 1.5, 2, 4, 8)  # of the determinant, and one over each
NAMES = ("overlay before", "overlay after", "checkerboard before", "checkerboard after", "Jacobian determinant")
MOST_CROSSES = 300  # folded voxels of a plane that get a cross each, so that single ones are seen


def plot_registration(
    fixed: Any,
    before: Any,
    after: Any,
    determinant: Any = None,
    title: str = "",
    file: str | Path | None = None,
    limits: Sequence[float] | None = None,
) -> Figure:
    """Draw the moving image on the fixed one before and after registration: overlays, checkerboards and the Jacobian.

    Axial, coronal and sagittal planes lie on top of each other, the patient's right or front on the left of the
    picture, as radiologists look at scans. They go through the middle of the box that holds all that is not black,
    and end at it. Overlay: fixed in green, moving in magenta, grey where they are alike. Checkerboard: fixed and
    moving in turns, edges go on from tile to tile where they agree. Determinant, on a logarithmic scale: white where
    the volume stays, red where a place of the fixed image takes more room in the moving one, blue where it takes
    less; folded voxels, of a determinant of 0 or less, are black.

    Args:
        fixed: (1, *size), 2D or 3D; a MetaTensor for proportions and directions, else voxels are cubes in RAS order.
        before: the moving image on the grid of `fixed`, not registered, (1, *size).
        after: the same, registered.
        determinant: of the field, (1, *size); None: without that column.
        title: heading.
        file: picture to write; its folder is made.
        limits: values shown black and white; None: percentiles 0.5 and 99.5, of the fixed and of the moving image each.

    Returns:
        the figure.

    Raises:
        ValueError: images of other shapes.
    """
    images = _checked({"fixed": fixed, "before": before, "after": after, "determinant": determinant})
    volumes, spacing = _grey_volumes(images, limits)
    box = _box(np.maximum.reduce([volumes[name] for name in ("fixed", "before", "after")]))
    cropped = {name: volume[box] for name, volume in volumes.items()}
    size = cropped["fixed"].shape
    cuts: list[int | None] = [2, 1, 0] if len(size) == 3 else [None]
    kept = [[axis for axis in range(len(size)) if axis != cut] for cut in cuts]
    extent = np.array([[size[axis] * spacing[axis] for axis in axes] for axes in kept])  # mm, (rows, 2)
    figure, grid = _grid(extent, len(images) + 1)  # each of before and after twice
    for row, cut in enumerate(cuts):
        planes = {name: _plane(volume, (np.array(size) - 1) // 2, cut) for name, volume in cropped.items()}
        _draw_row(grid[row], planes, spacing[kept[row]], extent.max() / TILES, cut)
    if determinant is not None:
        _draw_determinants(figure, grid[:, -1], volumes["determinant"])
    _explain(figure, grid[0], volumes.get("determinant"))
    if title:
        figure.suptitle(title, fontsize=10)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return figure


def _checked(given: dict[str, Any]) -> dict[str, MetaTensor]:
    images = {name: torch.as_tensor(image).detach().cpu() for name, image in given.items() if image is not None}
    shape = tuple(images["fixed"].shape)
    if len(shape) not in (3, 4) or shape[0] != 1 or min(shape) < 1:
        raise ValueError(f"fixed {shape} must be (1, *size) with 2 or 3 axes")
    for name, image in images.items():
        if tuple(image.shape) != shape:
            raise ValueError(f"{name} {tuple(image.shape)} must be on the grid of fixed {shape}")
    known = [image.affine for image in images.values() if isinstance(image, MetaTensor)]
    affine = known[0] if known else torch.eye(len(shape))
    return {n: MetaTensor(image.as_subclass(torch.Tensor).float(), affine=affine) for n, image in images.items()}


def _grey_volumes(
    images: dict[str, MetaTensor], limits: Sequence[float] | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Volumes in RAS order, images from 0, black, to 1, white, and the size of a voxel in mm."""
    scans = {name: _scan(image, name, (0, 1)) for name, image in images.items()}
    volumes = {name: scan.values for name, scan in scans.items()}
    for names in (("fixed",), ("before", "after")):
        ends = np.array([np.percentile(volumes[name], (0.5, 99.5)) if limits is None else limits for name in names])
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        for name in names:
            volumes[name] = ((volumes[name] - low) / max(high - low, 1e-6)).clip(0, 1)
    return volumes, spacing_of(scans["fixed"].affine).numpy()


def _box(grey: np.ndarray) -> tuple[slice, ...]:
    """Around all that is not black, or everything where all is."""
    places = np.nonzero(grey > DARK)
    if not len(places[0]):
        return (slice(None),) * grey.ndim
    return tuple(slice(max(0, p.min() - 1), p.max() + 2) for p in places)


def _overlay(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    return np.stack([moving, fixed, moving], -1)


def _checkerboard(fixed: np.ndarray, moving: np.ndarray, step: np.ndarray, tile: float) -> np.ndarray:
    """Tiles of so many mm; the one in the lowest corner is fixed."""
    rows, columns = (np.arange(length) * s // tile for length, s in zip(fixed.shape, step))
    return np.where((rows[:, None] + columns) % 2 == 0, fixed, moving)


def _draw_row(row: np.ndarray, planes: dict[str, np.ndarray], step: np.ndarray, tile: float, cut: int | None) -> None:
    pairs = [(planes["fixed"], planes[name]) for name in ("before", "after")]
    pictures = [*(_overlay(*pair) for pair in pairs), *(_checkerboard(*pair, step, tile) for pair in pairs)]
    if "determinant" in planes:
        pictures.append(planes["determinant"])
    for axes, picture in zip(row, pictures):
        axes.imshow(picture.swapaxes(0, 1), cmap="gray", vmin=0, vmax=1, origin="lower", aspect=step[1] / step[0])
        _frame(axes, planes["fixed"].shape, cut)
    row[0].set_ylabel("" if cut is None else _PLANES[cut][0], fontsize=10)


def _draw_determinants(figure: Figure, column: np.ndarray, determinant: np.ndarray) -> None:
    """Colours for the determinants of a column, their scale, and crosses on what folds."""
    positive = determinant[determinant > 0]
    largest = np.percentile(np.abs(np.log(positive)), 99.5) if len(positive) else 0.0
    most = float(np.exp(np.clip(largest, np.log(1.25), np.log(8.0))))
    colours = ListedColormap(colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))).with_extremes(bad=FOLDED)
    for axes in column:
        picture, values = axes.images[0], np.asarray(axes.images[0].get_array())
        folded = values <= 0
        picture.set(cmap=colours, norm=LogNorm(1 / most, most), array=np.ma.masked_array(values, folded))
        if 0 < folded.sum() <= MOST_CROSSES:
            y, x = np.nonzero(folded)
            axes.plot(x, y, "x", color=FOLDED, markersize=3, markeredgewidth=0.8)
    ticks = [tick for tick in (TICKS if most < 2 else TICKS[2:]) if tick <= most]
    bar = figure.colorbar(column[0].images[0], ax=list(column), extend="both", shrink=0.8, pad=0.02)
    bar.set_ticks([*(1 / t for t in ticks), 1, *ticks], labels=[*(f"1/{t}" for t in ticks), "1", *map(str, ticks)])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7.5)


def _grid(extent: np.ndarray, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure whose rows are as high as their planes, in mm."""
    width = 2.3  # inches
    heights = width * extent[:, 1] / extent[:, 0].max()
    figure = Figure(figsize=(columns * width + 0.5, heights.sum() + 1.2), dpi=110, layout="constrained")
    return figure, figure.subplots(len(extent), columns, squeeze=False, height_ratios=heights)


def _explain(figure: Figure, first: np.ndarray, determinant: np.ndarray | None) -> None:
    handles: list[Any] = [
        Patch(facecolor=FIXED, label="fixed brighter"),
        Patch(facecolor=MOVING, label="moving brighter"),
        Patch(facecolor="0.7", label="alike"),
    ]
    if determinant is not None:
        share = f"folded: {100 * float((determinant <= 0).mean()):.2g} % of all"
        handles.append(Line2D([], [], color=FOLDED, marker="x", linestyle="", label=share))
    for axes, name in zip(first, NAMES):
        axes.set_title(name, fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
