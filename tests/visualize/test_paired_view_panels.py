# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.utils import list_data_collate

from monai_ssl.transforms import RandPairedViewsd, extract_view, view_iou, view_matrix
from monai_ssl.visualize import COLOURS, draw_panels, paired_view_panels

SPL = torch.tensor([[0, 0, -2, 90], [0, -2, 0, 80], [2, 0, 0, -70], [0, 0, 0, 1]], dtype=torch.float64)


def pair(volume: torch.Tensor, boxes: Any, roi: Any, flips: Any, affine: Any = None) -> dict[str, Any]:
    """A batch of one pair, cut by hand."""
    views = [extract_view(volume, *box, roi, flip) for box, flip in zip(boxes, flips)]
    matrices = torch.stack([view_matrix(*box, roi, flip) for box, flip in zip(boxes, flips)])
    matrices = matrices if affine is None else affine @ matrices
    return {"image": views[0][None], "image_2": views[1][None], "view_affine": matrices[None]}


def test_hand_worked_boxes() -> None:
    """[0, 8) x [0, 8) and [4, 16) x [2, 6), the latter flipped along its first axis, at 8 x 4 pixels."""
    batch = pair(torch.rand(1, 16, 8), [([0, 0], [8, 8]), ([4, 2], [12, 4])], [8, 4], [[False, False], [True, False]])
    first, second = paired_view_panels({**batch, "name": ["dir/a.nii.gz"]})
    assert (list(first.boxes[0].start), list(first.boxes[0].size)) == ([4, 1], [4, 2])
    np.testing.assert_allclose(second.boxes[0].start, [16 / 3, 0], atol=1e-9)
    np.testing.assert_allclose(second.boxes[0].size, [8 / 3, 4], atol=1e-9)
    assert first.boxes[0].colour == second.boxes[0].colour == COLOURS[0]
    assert first.colour is second.colour is None
    assert first.caption == "a.nii.gz, view 1: 25% shared (IoU 0.17), 1.00×2.00 voxels"
    assert second.caption == "a.nii.gz, view 2: 33% shared (IoU 0.17), 1.50×1.00 voxels, flipped: 0"
    assert torch.equal(first.image, batch["image"][0])
    draw_panels([first, second])


@pytest.mark.parametrize("affine", [None, SPL])
def test_boxes_hold_the_shared_places(affine: Any) -> None:
    """Pixels inside the frame show what both views show, in volume indices and in mm, for all flips of either view."""
    size, roi = (16, 18, 20), (8, 6, 10)
    volume = torch.stack(torch.meshgrid(*(torch.arange(float(s)) for s in size), indexing="ij"))
    boxes = [([0, 3, 2], [8, 12, 10]), ([4, 0, 7], [12, 12, 10])]
    shared = [(4, 8), (3, 12), (7, 12)]  # corner coordinates of the volume
    for flips in product(product([False, True], repeat=3), repeat=2):
        batch = pair(volume, boxes, roi, flips, affine)
        for axis in range(3):
            for panel in paired_view_panels(batch, unit="voxels" if affine is None else "mm", axis=axis):
                kept = [a for a in range(3) if a != axis]
                box, pixels = panel.boxes[0], panel.image.shape[1:]
                for at in product(*(range(s) for s in pixels)):
                    framed = all(s <= i + 0.5 <= s + e for s, e, i in zip(box.start, box.size, at))
                    place = panel.image[:, at[0], at[1]] + 0.5  # centre of the pixel in corner coordinates
                    assert framed == all(shared[a][0] <= place[a] <= shared[a][1] for a in kept)
                middle = float(panel.image[axis].mean()) + 0.5
                assert box.dashed != (shared[axis][0] <= middle <= shared[axis][1])


def test_captions_agree_with_the_draw() -> None:
    roi, transform = (8, 10, 12), RandPairedViewsd("scan", (8, 10, 12), [(1.1, 1.4)] * 3).set_random_state(seed=3)
    for _ in range(10):
        item = transform({"scan": torch.rand(2, 30, 30, 30)})
        panels = paired_view_panels(list_data_collate([item]), image_key="scan")
        iou = view_iou(transform.start[0], transform.extent[0], transform.start[1], transform.extent[1])
        for panel, extent, flip in zip(panels, transform.extent, transform.flip):
            assert f"IoU {iou:.2f}" in panel.caption
            assert "×".join(f"{e / r:.2f}" for e, r in zip(extent, roi)) + " voxels" in panel.caption
            flipped = ", ".join(str(a) for a in range(3) if flip[a])
            assert panel.caption.endswith(f"flipped: {flipped}" if flipped else "voxels")


def test_flips_in_mm_are_those_of_view_2_against_view_1() -> None:
    volume, boxes = torch.rand(1, 16, 16, 16), [([0, 0, 0], [12, 12, 12]), ([4, 4, 4], [12, 12, 12])]
    batch = pair(volume, boxes, (6, 6, 6), [[False] * 3, [False] * 3], SPL)
    assert all(panel.caption.endswith("4.00×4.00×4.00 mm") for panel in paired_view_panels(batch, unit="mm"))
    batch = pair(volume, boxes, (6, 6, 6), [[True, False, True], [True, True, False]], SPL)
    first, second = paired_view_panels(batch, unit="mm")
    assert first.caption.endswith("4.00×4.00×4.00 mm")
    assert second.caption.endswith("mm, flipped: 1, 2")


def test_nothing_shared_and_other_keys() -> None:
    batch = pair(torch.rand(1, 16, 8), [([0, 0], [8, 8]), ([8, 0], [8, 8])], [8, 8], [[False] * 2] * 2)
    renamed = {"a": batch["image"], "b": batch["image_2"], "where": batch["view_affine"]}
    panels = paired_view_panels(renamed, "a", "b", "where")
    assert [len(panel.boxes) for panel in panels] == [0, 0]
    assert panels[0].caption == "volume 1, view 1: 0% shared (IoU 0.00), 1.00×1.00 voxels"
    draw_panels(panels)


def test_batch_of_two_in_mm() -> None:
    transform = RandPairedViewsd("image", (8, 10, 12), pixdim=2.2, placement="seed").set_random_state(seed=0)
    items = [transform({"image": MetaTensor(torch.rand(1, 30, 30, 30), affine=SPL)}) for _ in range(2)]
    panels = paired_view_panels(list_data_collate(items), unit="mm", axis=0)
    colours = [panel.boxes[0].colour for panel in panels]
    assert colours == [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]]
    assert [tuple(panel.image.shape) for panel in panels] == [(1, 10, 12)] * 4
    draw_panels(panels)


def test_errors() -> None:
    batch = pair(torch.rand(1, 16, 8), [([0, 0], [8, 8]), ([8, 0], [8, 8])], [8, 8], [[False] * 2] * 2)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(1, 7, 8\).*do not belong together"):
        paired_view_panels({**batch, "image_2": batch["image_2"][:, :, 1:]})
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) do not belong together"):
        paired_view_panels({**batch, "view_affine": torch.eye(4).expand(1, 2, 4, 4)})
    turned = batch["view_affine"].clone()
    turned[0, 1] = turned[0, 1][[1, 0, 2]]
    with pytest.raises(ValueError, match="rotated against each other"):
        paired_view_panels({**batch, "view_affine": turned})
