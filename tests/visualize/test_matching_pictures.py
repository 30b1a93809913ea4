# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from monai.data import MetaTensor

from monai_ssl.transforms.view_geometry import transform_points, voxel_index
from monai_ssl.visualize import plot_match

# axes to the front, down and to the left, 1.5, 3 and 1 mm
TEMPLATE = torch.tensor([[0, 0, -1.0, 15], [1.5, 0, 0, -20], [0, -3.0, 0, 30], [0, 0, 0, 1]], dtype=torch.float64)
QUERY = torch.tensor([[2.0, 0, 0, -20], [0, 2, 0, -10], [0, 0, 4, -30], [0, 0, 0, 1]], dtype=torch.float64)


def coordinate(affine: torch.Tensor, size: tuple[int, ...], axis: int) -> MetaTensor:
    """(1, *size): the world coordinate along an axis."""
    return MetaTensor(transform_points(affine, voxel_index(size))[:, axis].reshape(1, *size).float(), affine=affine)


def marked(axes: Axes) -> np.ndarray:
    """Where the circle is, in pixels."""
    line = next(line for line in axes.lines if line.get_marker() == "o")
    return np.array([line.get_xdata()[0], line.get_ydata()[0]], dtype=float)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_circles_lie_at_the_points(axis: int) -> None:
    """On coordinate images the pixel under each circle tells its own place; slices are cut there."""
    template, query = coordinate(TEMPLATE, (20, 18, 30), axis), coordinate(QUERY, (18, 16, 15), axis)
    points = np.array([4.0, -11.0, 12.0]), np.array([6.0, 8.0, 2.0])  # on voxels
    heat = query - query.min()
    figure = plot_match(template, query, points[0], points[1], heat, title="t")
    grid = np.array(figure.axes).reshape(3, 3)
    for row, cut in enumerate((2, 1, 0)):
        for axes, point in zip(grid[row], (points[0], points[1], points[1])):
            plane = axes.images[0].get_array()
            x, y = np.rint(marked(axes)).astype(int)
            assert float(plane[y, x]) == pytest.approx(point[axis])
            name = ("sagittal", "coronal", "axial")[cut]
            assert f"{name}, {'xyz'[cut]} = {point[cut]:.1f} mm" in axes.get_title()
            # the patient's right, or front, on the left; feet at the bottom
            kept = [a for a in range(3) if a != cut]
            left, right = axes.get_xlim()
            assert left > right
            assert "".join(t.get_text() for t in axes.texts) == ("APIS", "RLIS", "RLPA")[cut]
            if axis == kept[0]:
                assert plane[0, -1] > plane[0, 0]
            if axis == kept[1]:
                assert plane[-1, 0] > plane[0, 0]
        assert len(grid[row][1].images) == 2
        assert grid[row][0].get_aspect() == pytest.approx(
            np.array([1, 1.5, 3])[kept[1]] / np.array([1, 1.5, 3])[kept[0]]
        )


def test_without_map_in_2d_and_to_a_file(tmp_path: Path) -> None:
    affine = torch.eye(3, dtype=torch.float64)
    image: Any = MetaTensor(torch.rand(1, 12, 9), affine=torch.eye(4))
    assert affine.shape == (3, 3)
    figure = plot_match(image, image, [3.0, 4.0], [5.0, 2.0], file=tmp_path / "new" / "match.png")
    assert [axes.get_title() for axes in figure.axes] == ["template point", "match"]
    assert marked(figure.axes[1]).tolist() == [5, 2]
    assert (tmp_path / "new" / "match.png").stat().st_size > 1000


def test_flat_map_and_errors() -> None:
    image = coordinate(QUERY, (8, 6, 5), 0)
    plot_match(image, image, [0.0, 0, 0], [0.0, 0, 0], torch.ones(1, 8, 6, 5), limits=(-50, 205))
    with pytest.raises(ValueError, match=r"similarity \(1, 8, 6, 4\) must be on the grid of query \(1, 8, 6, 5\)"):
        plot_match(image, image, [0.0, 0, 0], [0.0, 0, 0], torch.ones(1, 8, 6, 4))
    with pytest.raises(ValueError, match="template must be a MetaTensor"):
        plot_match(image.as_tensor(), image, [0.0, 0, 0], [0.0, 0, 0])  # type: ignore[arg-type]
