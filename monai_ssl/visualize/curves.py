# SPDX-License-Identifier: Apache-2.0
"""Loss, learning rate and metrics over a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["plot_curves"]

_PLACES = ("iteration", "epoch")


def plot_curves(
    source: str | Path | Mapping[str, Sequence[float]],
    file: str | Path,
    chance: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw each column of a table over the iterations, three to a row.

    Args:
        source: ``curves.csv`` of ``CurvesHandler``, or its columns; empty cells and NaN are left out.
        file: picture to write; its folder is made.
        chance: column -> chance level, drawn as a dashed line.
        title: heading of the picture.

    Returns:
        the figure.

    Raises:
        ValueError: when the table has no column ``iteration``, or no numbers beside it.
    """
    columns = _read(Path(source)) if isinstance(source, (str, Path)) else {k: list(v) for k, v in source.items()}
    if "iteration" not in columns:
        raise ValueError(f"The table needs a column 'iteration', it has {sorted(columns)}.")
    steps = np.asarray(columns["iteration"], dtype=float)
    curves = {name: np.asarray(values, dtype=float) for name, values in columns.items() if name not in _PLACES}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        raise ValueError(f"The table has no numbers beside {_PLACES}.")
    width = min(3, len(curves))
    height = math.ceil(len(curves) / width)
    heading = 0.3 * bool(title)
    figure = Figure(figsize=(4.0 * width, 2.7 * height + heading), dpi=110)
    grid = figure.subplots(height, width, squeeze=False, gridspec_kw=_margins(width, height, heading))
    for axes, (name, values) in zip(np.ravel(grid), curves.items()):
        _draw(axes, name, steps, values, (chance or {}).get(name))
    for axes in figure.axes[len(curves) :]:
        axes.remove()
    if title:
        figure.suptitle(title)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return figure


def _margins(width: int, height: int, heading: float) -> dict[str, float]:
    """Room for titles and numbers in inches; matplotlib's own layouts measure every text, which takes half a second."""
    left, right, bottom, top, across, down = 0.6, 0.15, 0.45, 0.45 + heading, 0.75, 0.8
    inches = 4.0 * width, 2.7 * height + heading
    wide = (inches[0] - left - right - across * (width - 1)) / width
    high = (inches[1] - bottom - top - down * (height - 1)) / height
    return {
        "left": left / inches[0],
        "right": 1 - right / inches[0],
        "bottom": bottom / inches[1],
        "top": 1 - top / inches[1],
        "wspace": across / wide,
        "hspace": down / high,
    }


def _draw(axes: Axes, name: str, steps: np.ndarray, values: np.ndarray, chance: float | None) -> None:
    there = np.isfinite(values)
    x, y = steps[there], values[there]
    many = len(y) > 60 and name != "lr"  # noisy: a thin line with its running mean
    axes.plot(x, y, color="#3d6fb6", linewidth=0.7 if many else 1.4, alpha=0.35 if many else 1.0,
              marker=None if len(y) > 20 else "o", markersize=3)  # fmt: skip
    if many:
        axes.plot(x, _smooth(y, len(y) // 30), color="#1f3f77", linewidth=1.6)
    if np.ptp(y) <= 1e-6 * np.abs(y).max():  # constant: no axis of rounding errors
        axes.set_ylim(y[0] - 0.1 * abs(y[0]) - 1e-3, y[0] + 0.1 * abs(y[0]) + 1e-3)
    if chance is not None:
        axes.axhline(chance, color="#b5472e", linestyle="--", linewidth=1.1, label=f"chance {chance:.4g}")
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set_fontsize(7.5)
    axes.locator_params(nbins=6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values, of fewer at the beginning."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - max(window, 1), 0)
    return (total[end] - total[begin]) / (end - begin)


def _read(path: Path) -> dict[str, list[float]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}
