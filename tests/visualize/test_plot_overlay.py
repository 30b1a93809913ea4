# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from monai_ssl.visualize import plot_overlay

IMAGE = torch.arange(5 * 6 * 7.0).reshape(5, 6, 7)
LABEL = torch.zeros(5, 6, 7, dtype=torch.uint8)
LABEL[1:4, 2:5, 3:6] = 1  # centre (2, 3, 4)
LABEL[2, 3, 4] = 2


def test_slices_through_the_centre_of_the_label(tmp_path: Path) -> None:
    figure = plot_overlay(IMAGE, LABEL, LABEL, tmp_path / "new" / "x.png", title="case 7")
    axes = figure.axes
    assert [a.get_title() for a in axes] == ["axial 4", "coronal 3", "sagittal 2"]
    for a, plane in zip(axes, (IMAGE[:, :, 4], IMAGE[:, 3], IMAGE[2])):
        assert np.array_equal(a.images[0].get_array(), plane.T)
    painted = axes[0].images[1].get_array()
    assert painted.shape == (6, 5, 4)
    assert np.array_equal(painted[..., 3] > 0, (LABEL[:, :, 4] > 0).T)
    assert not np.array_equal(painted[3, 2], painted[3, 1])  # class 2, class 1
    assert figure.get_suptitle() == "case 7"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["label", "prediction", "1", "2"]
    assert (tmp_path / "new" / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_prediction_is_outlined_in_the_colour_of_its_class() -> None:
    prediction = torch.zeros(5, 6, 7, dtype=torch.long)
    prediction[3:, 4:, :] = 1  # to the edge of the image
    axes = plot_overlay(IMAGE, LABEL, prediction).axes[0]
    (line,) = (collection for collection in axes.collections if collection.get_paths())
    points = np.concatenate([path.vertices for path in line.get_paths()])
    assert points.min(0).tolist() == [2.5, 3.5]
    assert points.max(0).tolist() == [4.5, 5.5]  # closed at the edge
    painted = axes.images[1].get_array()
    assert line.get_edgecolor()[0][:3].tolist() == pytest.approx(painted[2, 1][:3].tolist())


def test_centre_lies_in_the_label() -> None:
    ring = np.zeros((5, 6, 7), dtype=int)
    ring[0, 0, 0] = ring[4, 5, 6] = 3  # the centre of mass, (2, 2.5, 3), is background
    figure = plot_overlay(IMAGE, ring)
    assert figure.axes[0].get_title() in ("axial 0", "axial 6")


@pytest.mark.parametrize("prediction, title", [(LABEL, "axial 4"), (None, "axial 3")])
def test_empty_label(prediction: torch.Tensor | None, title: str) -> None:
    figure = plot_overlay(IMAGE[None], torch.zeros(1, 5, 6, 7), prediction)
    assert figure.axes[0].get_title() == title


def test_voxels_keep_their_proportions() -> None:
    axes = plot_overlay(IMAGE, LABEL, spacing=(1.0, 2.0, 4.0)).axes
    assert [a.get_aspect() for a in axes] == [2.0, 4.0, 2.0]  # height over width: y/x, z/x, z/y


def test_plane_image() -> None:
    figure = plot_overlay(IMAGE[:, :, 0], LABEL[:, :, 4], LABEL[:, :, 4])
    assert len(figure.axes) == 1
    assert np.array_equal(figure.axes[0].images[0].get_array(), IMAGE[:, :, 0].T)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"image \(5, 6, 7\) and label \(7, 6, 5\)"):
        plot_overlay(IMAGE, LABEL.permute(2, 1, 0))
    with pytest.raises(ValueError, match=r"image \(5, 6, 7\) and prediction \(5, 6\)"):
        plot_overlay(IMAGE, LABEL, LABEL[..., 0])
    with pytest.raises(ValueError, match=r"at most one channel, got shape \(3, 5, 6, 7\)"):
        plot_overlay(IMAGE.expand(3, 5, 6, 7), LABEL)
