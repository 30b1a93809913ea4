# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from monai.data import MetaTensor

from monai_ssl.transforms.view_geometry import transform_points, voxel_index
from monai_ssl.visualize import plot_registration

# axes to the front, down and to the left, 1.5, 3 and 1 mm
AFFINE = torch.tensor([[0, 0, -1.0, 15], [1.5, 0, 0, -20], [0, -3.0, 0, 30], [0, 0, 0, 1]], dtype=torch.float64)
SIZE = (20, 18, 30)
COLUMNS = ["overlay before", "overlay after", "checkerboard before", "checkerboard after", "Jacobian determinant"]


def coordinate(axis: int) -> MetaTensor:
    """(1, *SIZE): the world coordinate along an axis, from 0.2 at its lowest to 1."""
    values = transform_points(AFFINE, voxel_index(SIZE))[:, axis]
    values = 0.2 + 0.8 * (values - values.min()) / (values.max() - values.min())
    return MetaTensor(values.reshape(1, *SIZE).float(), affine=AFFINE)


def picture(figure: Figure, row: int, column: int, columns: int = 4) -> np.ndarray:
    """(Y, X) or (Y, X, 3) as drawn, y upwards."""
    return np.asarray(figure.axes[row * columns + column].images[0].get_array())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_lie_in_the_body(axis: int) -> None:
    """An image whose values are a coordinate grows to the patient's right, front or head, on its side of each."""
    fixed, moving = coordinate(axis), coordinate((axis + 1) % 3)
    figure = plot_registration(fixed, moving, fixed, limits=(0, 1))
    assert [a.get_title() for a in figure.axes] == [*COLUMNS[:4], *[""] * 8]
    size = {0: 30, 1: 20, 2: 18}  # voxels along the patient's axes
    step = {0: 1.0, 1: 1.5, 2: 3.0}
    for row, (cut, name) in enumerate(((2, "axial"), (1, "coronal"), (0, "sagittal"))):
        kept = [a for a in range(3) if a != cut]
        axes = figure.axes[4 * row]
        assert axes.get_ylabel() == name
        assert axes.get_aspect() == pytest.approx(step[kept[1]] / step[kept[0]])
        assert axes.get_xlim()[0] > axes.get_xlim()[1]  # the patient's right, or front, on the left
        before, after = picture(figure, row, 0), picture(figure, row, 1)
        assert before.shape == (size[kept[1]], size[kept[0]], 3)
        line = np.linspace(0.2, 1, size[axis])
        if axis == cut:
            expected = np.full(before.shape[:2], line[(size[cut] - 1) // 2])
        else:
            expected = np.broadcast_to(line if axis == kept[0] else line[:, None], before.shape[:2])
        np.testing.assert_allclose(before[..., 1], expected, atol=1e-5)  # fixed: green
        np.testing.assert_array_equal(before[..., 0], before[..., 2])  # moving: red and blue
        assert np.abs(before[..., 0] - before[..., 1]).max() > 0.2
        np.testing.assert_array_equal(after[..., 0], after[..., 1])  # alike: grey


def test_checkerboard_takes_turns() -> None:
    fixed = MetaTensor(torch.full((1, 40, 20, 30), 0.25), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    figure = plot_registration(fixed, fixed + 0.25, fixed + 0.5, limits=(0, 1))
    axial, sagittal = picture(figure, 0, 2), picture(figure, 2, 3)
    # tiles of a tenth of 90 mm: 9 voxels of 1 mm, 4.5 of 2 mm, 3 of 3 mm; the lowest corner is the fixed image
    assert axial[0].tolist() == ([0.25] * 9 + [0.5] * 9) * 2 + [0.25] * 4
    assert axial[:10, 0].tolist() == [0.25] * 5 + [0.5] * 4 + [0.25]
    assert sagittal[:9, 0].tolist() == [0.25] * 3 + [0.75] * 3 + [0.25] * 3
    assert (axial == 0.25).sum() == pytest.approx(axial.size / 2, rel=0.1)


def test_what_is_black_is_left_out_and_each_image_has_its_own_range() -> None:
    fixed, before = torch.zeros(1, 21, 22, 23), torch.full((1, 21, 22, 23), 1000.0)
    fixed[:, 5:12, 6:16, 7:19] = 40.0
    before[:, 4:11, 8:12, 9:17] = 3000.0
    figure = plot_registration(fixed, before, before)
    assert picture(figure, 0, 0).shape == (10 + 2, 8 + 2, 3)  # the box of both, a voxel beyond on each side
    assert picture(figure, 2, 0).shape == (12 + 2, 10 + 2, 3)
    assert np.unique(picture(figure, 0, 0)).tolist() == [0, 1]
    same = plot_registration(fixed, before, before, limits=torch.tensor([0.0, 4000.0]))  # type: ignore[arg-type]
    np.testing.assert_allclose(np.unique(picture(same, 0, 0)[..., 0]), [0.25, 0.75])
    assert picture(plot_registration(*[torch.zeros(1, 5, 6, 7)] * 3), 0, 0).shape == (6, 5, 3)  # nothing to see


@pytest.mark.parametrize("rank", [2, 3])
def test_folded_voxels_are_marked_and_counted(rank: int) -> None:
    image = torch.ones(1, 8, 10, 5)[:, :, :, : 5 if rank == 3 else 1].reshape(1, 8, 10, *[5] * (rank - 2))
    determinant = torch.ones_like(image)
    determinant[(0, 3, 4, *[2] * (rank - 2))] = -0.5
    determinant[(0, 0, 0, *[0] * (rank - 2))] = 0.0
    determinant[(0, 6, 2, *[2] * (rank - 2))] = 2.0
    figure = plot_registration(image, image, image, determinant)
    drawn = np.ma.asarray(figure.axes[4].images[0].get_array())
    assert figure.axes[4].get_title() == COLUMNS[4]
    mask = np.ma.getmaskarray(drawn)
    assert mask[4, 3]
    assert mask.sum() == (1 if rank == 3 else 2)  # the corner lies in another plane in 3D
    assert drawn[2, 6] == 2
    marks = figure.axes[4].lines[0]
    assert (3, 4) in set(zip(marks.get_xdata(), marks.get_ydata()))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[-1] == f"folded: {2 / image.numel() * 100:.2g} % of all"
    low, high = figure.axes[4].images[0].get_clim()
    assert low == pytest.approx(1 / high)
    grey = figure.axes[4].images[0].to_rgba(np.array([[1.0]]))[0, 0]  # the volume stays: white
    assert grey[:3].min() > 0.95


def test_scale_of_determinants() -> None:
    image = torch.ones(1, 6, 5, 4)
    for value, end in ((1.0, 1.25), (1.7, 1.7), (0.5, 2.0), (30.0, 8.0), (-1.0, 1.25)):
        figure = plot_registration(image, image, image, image * value)
        assert figure.axes[4].images[0].get_clim()[1] == pytest.approx(end, rel=1e-5)
        labels = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
        assert labels[len(labels) // 2] == "1"
    assert labels == ["1/1.1", "1/1.2", "1", "1.1", "1.2"]


def test_file_in_2d(tmp_path: Path) -> None:
    image: Any = MetaTensor(torch.rand(1, 30, 20), affine=torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])))
    file = tmp_path / "new" / "registration.png"
    figure = plot_registration(image, image, image, title="a to b", file=file)
    assert [axes.get_title() for axes in figure.axes] == COLUMNS[:4]
    assert figure.axes[0].get_aspect() == pytest.approx(2)
    assert imread(file).std() > 0.05


def test_faults() -> None:
    image = torch.rand(1, 5, 6, 7)
    with pytest.raises(ValueError, match=r"after \(1, 5, 6, 8\) must be on the grid of fixed \(1, 5, 6, 7\)"):
        plot_registration(image, image, torch.rand(1, 5, 6, 8))
    with pytest.raises(ValueError, match=r"determinant \(5, 6, 7\) must be on the grid of fixed \(1, 5, 6, 7\)"):
        plot_registration(image, image, image, image[0])
    with pytest.raises(ValueError, match=r"fixed \(2, 5, 6, 7\) must be \(1, \*size\)"):
        plot_registration(image.repeat(2, 1, 1, 1), image, image)
