# SPDX-License-Identifier: Apache-2.0
"""Which class was taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["plot_confusion"]

MOST_NUMBERS = 12  # classes up to which counts and names are written into the cells


def plot_confusion(
    counts: np.ndarray, file: str | Path, class_names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Draw a confusion matrix, each row as shares of its true class; rows are truth, columns prediction.

    Args:
        counts: (K, K), `counts[true, predicted]`.
        file: picture to write; its folder is made.
        class_names: K names; default the numbers.
        title: heading; accuracy and chance level (1 / K) are added.

    Returns:
        the figure.

    Raises:
        ValueError: when `counts` is not square, or there are not K names.
    """
    counts = np.asarray(counts)
    number = len(counts)
    if counts.shape != (number, number):
        raise ValueError(f"counts must be (K, K), got {counts.shape}")
    names = [str(k) for k in range(number)] if class_names is None else list(class_names)
    if len(names) != number:
        raise ValueError(f"{len(names)} class names for {number} classes")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 4.2 if number <= MOST_NUMBERS else 5.6
    figure = Figure(figsize=(side + 0.9, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="viridis", vmin=0.0, vmax=max(shares.max(), 1e-6))
    figure.colorbar(picture, ax=axes, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{title + ': ' if title else ''}accuracy {accuracy:.3f} (chance {1 / number:.3f})", fontsize=9)
    if number <= MOST_NUMBERS:
        axes.set_xticks(range(number), names, fontsize=7, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(number), names, fontsize=7)
        for (row, column), count in np.ndenumerate(counts):
            colour = "black" if shares[row, column] > shares.max() / 2 else "white"
            axes.text(column, row, f"{int(count)}", ha="center", va="center", fontsize=7, color=colour)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return figure
