# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from monai_ssl.visualize import Box, Panel, draw_panels, figure_image


def coordinates(*size: int) -> torch.Tensor:
    """Each voxel holds its place, read as digits: (x, y, z) -> xyz."""
    grid = torch.meshgrid(*[torch.arange(s) for s in size], indexing="ij")
    return sum(g * 10 ** (len(size) - 1 - a) for a, g in enumerate(grid))[None].float()


@pytest.mark.parametrize("image", [coordinates(5, 6, 7), coordinates(5, 6, 7).numpy(), coordinates(5, 6, 7).half()])
def test_volume_is_shown_by_its_middle_slice(image: torch.Tensor | np.ndarray) -> None:
    figure = draw_panels([Panel(image)])
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (6, 5)  # rows are y
    assert shown[2, 4] == 423
    assert figure.axes[0].images[0].origin == "lower"


def test_image_is_shown_whole_by_its_first_channel() -> None:
    image = torch.cat([coordinates(5, 6), torch.zeros(2, 5, 6)])
    shown = draw_panels([Panel(image)]).axes[0].images[0].get_array()
    assert np.array_equal(shown, coordinates(5, 6)[0].T)


def test_boxes_enclose_their_pixels() -> None:
    boxes = [Box((1, 2), (3, 4), "red", "7"), Box((0, 0), (5, 6), dashed=True)]
    axes = draw_panels([Panel(coordinates(5, 6), boxes=boxes)]).axes[0]
    first, second = (patch for patch in axes.patches if isinstance(patch, Rectangle))
    assert first.get_bbox().extents.tolist() == [0.5, 1.5, 3.5, 5.5]  # pixel centres 1..3 and 2..5
    assert [text.get_text().strip() for text in axes.texts] == ["7"]
    assert second.get_linestyle() == (0, (4, 3))
    assert first.get_linestyle() == "solid"


def test_limits_colour_and_caption() -> None:
    axes = draw_panels([Panel(coordinates(5, 6), "cell 3", colour="#ff0000", limits=(10, 20))]).axes[0]
    assert axes.images[0].get_clim() == (10, 20)
    assert axes.get_title(loc="left") == "cell 3"
    assert axes.spines["top"].get_edgecolor() == (1.0, 0.0, 0.0, 1.0)


def test_constant_image_is_black() -> None:
    image = figure_image(draw_panels([Panel(torch.full((1, 5, 6), 3.0))]))
    assert image.dtype == np.uint8
    assert image[image.shape[0] // 2, image.shape[1] // 2].tolist() == [0, 0, 0]


def test_places() -> None:
    lead, other = Panel(coordinates(5, 6), lead=True), Panel(coordinates(5, 6))

    def spans(figure: object) -> list[tuple[int, int, int]]:
        places = [axes.get_subplotspec() for axes in figure.axes]  # type: ignore[attr-defined]
        return [(p.rowspan.start, p.colspan.start, len(p.rowspan)) for p in places]

    figure = draw_panels([lead, other, other, other, lead, other])
    # twice as large, the others beside it in two rows
    assert spans(figure) == [(0, 0, 2), (0, 2, 1), (0, 3, 1), (1, 2, 1), (2, 0, 2), (2, 2, 1)]
    assert spans(draw_panels([other] * 5, columns=2)) == [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2, 0, 1)]
    assert spans(draw_panels([lead])) == [(0, 0, 2)]


def test_wrong_panels() -> None:
    with pytest.raises(ValueError, match="no panels"):
        draw_panels([])
    with pytest.raises(ValueError, match=r"got shape \(5, 6\)"):
        draw_panels([Panel(torch.zeros(5, 6))])


def test_no_global_state() -> None:
    # pyplot would choose a display's window system and keep every figure alive
    figure_image(draw_panels([Panel(coordinates(5, 6))]))
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("lines", [1, 3, 6])
@pytest.mark.parametrize("lead", [False, True])
def test_captions_are_not_cut_off(lines: int, lead: bool) -> None:
    """Every caption lies inside the figure and covers no picture."""
    image, caption = coordinates(8, 8), "nearly thirty letters a line " * lines
    shown = [Panel(image, caption, lead=lead and number % 5 == 0) for number in range(10)]
    figure = draw_panels(shown)
    figure_image(figure)
    for axes in figure.axes:
        box = axes._left_title.get_window_extent()
        assert box.y1 <= figure.bbox.y1
        for other in (axes.get_window_extent() for axes in figure.axes):
            assert box.y0 >= other.y1 or box.y1 <= other.y0 or box.x0 >= other.x1 or box.x1 <= other.x0
