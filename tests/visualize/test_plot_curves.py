# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from monai_ssl.visualize import plot_curves

TABLE = "iteration,epoch,loss,lr,val_skill\n10,1,1.5,0.1,\n20,1,1.0,0.1,\n20,1,,,0.25\n30,2,nan,0.05,\n40,2,0.5,0.05,\n"


def test_table(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text(TABLE)
    figure = plot_curves(
        tmp_path / "curves.csv", tmp_path / "new" / "curves.png", chance={"val_skill": 0.125}, title="run"
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "lr", "val skill"]
    loss, _, skill = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[10, 1.5], [20, 1.0], [40, 0.5]]
    assert skill.lines[0].get_xydata().tolist() == [[20, 0.25]]
    assert skill.lines[0].get_marker() == "o"  # a single point is seen
    assert skill.lines[1].get_ydata() == [0.125, 0.125]
    assert skill.get_legend().get_texts()[0].get_text() == "chance 0.125"
    assert len(loss.lines) == 1
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_noisy_curve_has_its_running_mean(tmp_path: Path) -> None:
    values = np.arange(90.0)
    figure = plot_curves({"iteration": values, "loss": values, "lr": values}, tmp_path / "x.png")
    raw, mean = figure.axes[0].lines
    assert raw.get_ydata().tolist() == values.tolist()
    assert mean.get_ydata()[:4].tolist() == [0.0, 0.5, 1.0, 2.0]  # of three values, fewer at the beginning
    assert len(figure.axes[1].lines) == 1  # a schedule has no noise


def test_constant_curve_has_a_sensible_axis(tmp_path: Path) -> None:
    figure = plot_curves({"iteration": [1, 2], "std": [0.03, 0.03 + 1e-12]}, tmp_path / "x.png")
    low, high = figure.axes[0].get_ylim()
    assert low < 0.029
    assert high > 0.031


@pytest.mark.parametrize(
    "table, match", [({"loss": [1]}, "'iteration'"), ({"iteration": [1], "loss": [np.nan]}, "no numbers")]
)
def test_nothing_to_draw(tmp_path: Path, table: dict[str, list[float]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plot_curves(table, tmp_path / "x.png")


@pytest.mark.parametrize("title", ["", "A run"])
@pytest.mark.parametrize("curves", [1, 5])
def test_nothing_is_cut_off(tmp_path: Path, title: str, curves: int) -> None:
    """A power of ten above the axis moves the title of a curve up."""
    values = {name: [-1.1e-5, -3.5e-5] for name in "abcde"[:curves]}
    plot_curves({"iteration": [1, 12000], **values}, tmp_path / "x.png", title=title)
    dark = imread(tmp_path / "x.png")[..., :3].min(-1) < 0.9
    for edge in (dark[:2], dark[-2:], dark[:, :2], dark[:, -2:]):
        assert not edge.any()
