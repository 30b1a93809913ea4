# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data.utils import list_data_collate
from monai.transforms import Resize

from monai_ssl.transforms import RandVoCoCropsd
from monai_ssl.visualize import COLOURS, draw_panels, voco_panels

NBSP = "\N{NO-BREAK SPACE}"


def batch(
    roi: tuple[int, ...], grid: tuple[int, ...], crops: int, **kwargs: Any
) -> tuple[dict[str, Any], torch.Tensor]:
    """Two windows whose voxels hold their flat index, and the first of them."""
    size = [r * g for r, g in zip(roi, grid)]
    window = torch.arange(float(torch.tensor(size).prod())).reshape(1, *size)
    transform = RandVoCoCropsd("image", roi, grid, num_samples=crops, **kwargs)
    transform.set_random_state(3)
    return list_data_collate([transform({"image": window, "name": f"{i}.nii.gz"}) for i in range(2)]), window


@pytest.mark.parametrize("roi, grid", [((4, 6, 5), (3, 2, 1)), ((4, 6, 5), (2, 3, 2)), ((4, 6), (3, 2))])
def test_mosaic_is_the_window_again(roi: tuple[int, ...], grid: tuple[int, ...]) -> None:
    data, window = batch(roi, grid, crops=3)
    panels = voco_panels(data, roi, grid)
    assert [panel.lead for panel in panels] == [True, False, False, False] * 2
    layer = window if len(roi) == 2 else window[..., roi[2] // 2]  # the middle of the first layer of cells
    assert torch.equal(panels[0].image, layer)
    draw_panels(panels)


@pytest.mark.parametrize("roi, grid", [((4, 6, 5), (3, 2, 1)), ((4, 6), (3, 2))])
def test_boxes_hold_the_crops(roi: tuple[int, ...], grid: tuple[int, ...]) -> None:
    data, _ = batch(roi, grid, crops=3)
    mosaic, *crops = voco_panels(data, roi, grid)[:4]
    boxes = [box for box in mosaic.boxes if box.colour != "white"]
    for box, crop, colour in zip(boxes, crops, COLOURS):
        (x, y), (width, height) = box.start, box.size
        inside = mosaic.image[:, int(x) : int(x + width), int(y) : int(y + height)]
        shown = crop.image if len(roi) == 2 else crop.image[..., roi[2] // 2]
        assert torch.equal(inside, shown)
        assert box.colour == crop.colour == colour


def test_cells_bear_their_numbers() -> None:
    data, _ = batch((4, 6, 5), (2, 3, 2), crops=1)
    cells = [box for box in voco_panels(data, (4, 6, 5), (2, 3, 2))[0].boxes if box.colour == "white"]
    assert {box.label: tuple(box.start) for box in cells} == {
        "0": (0, 0), "2": (0, 6), "4": (0, 12), "6": (4, 0), "8": (4, 6), "10": (4, 12),
    }  # fmt: skip
    assert all(tuple(box.size) == (4, 6) for box in cells)


def test_captions_tell_the_target() -> None:
    data, _ = batch((5, 5, 5), (2, 2, 1), crops=2)
    data["label"][0, 0] = torch.tensor([0.0, 0.25, 0.75, 0.0])
    data["label"][0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    mosaic, first, second = voco_panels(data, 5, (2, 2, 1))[:3]
    assert mosaic.caption == "0.nii.gz: 4 base crops; boxes: 2 random crops"
    assert first.caption.replace(NBSP, " ") == "crop 1: 75% in cell 2, 25% in 1"
    assert second.caption.replace(NBSP, " ") == "crop 2: 100% in cell 0"
    del data["name"]
    assert voco_panels(data, 5, (2, 2, 1))[0].caption.startswith("volume 1: ")


def test_many_cells_are_cut_short() -> None:
    data, _ = batch((4, 4, 4), (2, 2, 2), crops=1)
    data["label"][0, 0] = torch.full((8,), 1 / 8)
    assert voco_panels(data, 4, (2, 2, 2))[1].caption.endswith(f",{NBSP}...")


def test_crops_in_deeper_layers_are_dashed() -> None:
    data, _ = batch((4, 4, 4), (2, 2, 2), crops=2)
    data["image_origin"][0] = torch.tensor([[0, 0, 3], [0, 0, 4]])
    boxes = [box for box in voco_panels(data, 4, (2, 2, 2))[0].boxes if box.colour != "white"]
    assert [box.dashed for box in boxes] == [False, True]


def test_boxes_scale_with_resized_crops() -> None:
    data, _ = batch((4, 6, 5), (3, 2, 1), crops=2, crop_transform=Resize((8, 6, 5)))
    boxes = voco_panels(data, (4, 6, 5), (3, 2, 1))[0].boxes[6:]
    origins = data["image_origin"][0]
    assert [tuple(box.start) for box in boxes] == [(2.0 * o[0], 1.0 * o[1]) for o in origins.tolist()]
    assert all(tuple(box.size) == (8.0, 6.0) for box in boxes)


def test_wrong_grid() -> None:
    data, _ = batch((4, 6, 5), (3, 2, 1), crops=2)
    with pytest.raises(ValueError, match=r"grid_size \(3, 3, 1\) does not fit base crops \(2, 6, 1, 4, 6, 5\)"):
        voco_panels(data, (4, 6, 5), (3, 3, 1))
