# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet

from monai_ssl.data import PrepareSliceBatch
from monai_ssl.losses import region_starts, slice_pairs
from monai_ssl.networks import ContrastiveUNet
from monai_ssl.visualize import COLOURS, Panel, draw_panels, figure_image, partition_panels, region_panels

PLANE = (20, 32)
GREEN, PINK, YELLOW = COLOURS[3], COLOURS[2], COLOURS[6]


def batch(
    volumes: int = 3, partitions: int = 4, views: int | None = 2, plane: tuple[int, int] = PLANE
) -> dict[str, Any]:
    """Every view has a value of its own: its number in the batch."""
    count = volumes * partitions * (views or 1)
    image = torch.arange(float(count)).view(-1, 1, 1, 1) + torch.rand(count, 1, *plane) / 10
    return {
        "image": image if views is None else image.unflatten(0, (-1, views)),
        "partition": torch.arange(partitions).repeat(volumes),
        "slice_index": 5 * torch.arange(partitions).repeat(volumes) + torch.arange(volumes * partitions) // partitions,
        "volume": 40 + torch.arange(volumes).repeat_interleave(partitions),
    }


def boxed(panel: Panel, colour: str) -> set[int]:
    """The views that have a frame of a colour, by what is in it."""
    found = set()
    for box in panel.boxes:
        if box.colour == colour:
            x, y = (round(a + n / 2) for a, n in zip(box.start, box.size))
            found.add(int(panel.image[0, x, y]))
    return found


def test_slices_in_the_colour_of_their_partition() -> None:
    panel = partition_panels({**batch(), "name": [f"/data/{i // 4}.nii.gz" for i in range(12)]})[0]
    assert (
        panel.caption
        == "0.nii.gz, 1.nii.gz, 2.nii.gz: a slice (its number) of each of 4 partitions, 2 views below each other"
    )
    assert panel.image.shape == (1, 4 * 21, 6 * 33)
    assert [box.label for box in panel.boxes] == [str(5 * p + v) for v in range(3) for p in range(4)]
    assert [box.colour for box in panel.boxes] == list(COLOURS[:4]) * 3
    for number, box in enumerate(panel.boxes):
        (x, y), (width, height) = box.start, box.size
        inside = panel.image[0, round(x) : round(x + width), round(y) : round(y + height)]
        values = set(inside[inside > 0].floor().int().tolist()) - {0}
        assert values == {2 * number, 2 * number + 1} - {0}  # both views, the first above
        assert int(inside[5, -5]) == 2 * number
    assert panel.lead


@pytest.mark.parametrize("mode, positives, negatives", [
    ("GR", {1}, set(range(2, 24))),
    ("GD-", {1}, set(range(2, 8)) | set(range(10, 16)) | set(range(18, 24))),
    ("GD", {1, 8, 16}, set(range(2, 8)) | set(range(10, 16)) | set(range(18, 24))),
])  # fmt: skip
def test_pairs_of_the_first_view(mode: str, positives: set[int], negatives: set[int]) -> None:
    _, array, matrix = partition_panels(batch(), [mode])
    assert boxed(array, GREEN) == positives
    assert boxed(array, PINK) == negatives
    assert boxed(array, YELLOW) == {0}
    assert all(box.dashed == (box.colour == PINK) for box in array.boxes)
    assert (
        array.caption
        == f"{mode}: positives {len(positives)} (solid), negatives {len(negatives)} (dashed), no frame: neither"
    )
    row = matrix.heat[:, -1]  # y upwards: the first anchor is on top
    assert set(torch.nonzero(row == 1).flatten().tolist()) == positives
    assert set(torch.nonzero(row == 0).flatten().tolist()) == negatives
    total = {"GR": 24, "GD-": 24, "GD": 72}[mode]
    number = f"{total} positive pairs of 24 items (light), {len(negatives)} negatives each (dark)"
    assert matrix.caption == f"{mode}, a row per anchor: {number}, grey: neither"


def test_matrix_with_a_repeated_volume() -> None:
    """The first two rows are one volume, whose slices are no partners."""
    data = batch()
    data["volume"][4:8] = 40
    positives, negatives = slice_pairs("GD", **PrepareSliceBatch()(data)[1])
    heat = partition_panels(data, ["GD"])[2].heat
    for i, j in product(range(24), repeat=2):  # anchor i is a row, the first on top
        shown = heat[j, 23 - i]
        assert (shown == 1) == positives[i, j]
        assert (shown == 0) == negatives[i, j]


def test_all_modes_draw() -> None:
    panels = partition_panels(batch())
    assert [re.split("[:,]", panel.caption)[0] for panel in panels[1:]] == ["GR", "GD-", "GD"] * 2
    assert figure_image(draw_panels(panels)).std() > 10


@pytest.mark.parametrize("views", [None, 1, 3])
def test_other_numbers_of_views(views: int | None) -> None:
    panels = partition_panels(batch(2, 3, views), ["GD"])
    assert panels[0].caption.startswith("volume 40, volume 41: a slice (its number) of each of 3 partitions")
    assert boxed(panels[1], GREEN) == {*range(1, views or 1), 3 * (views or 1)}
    draw_panels(panels)


def test_a_batch_cut_in_the_middle_of_a_volume() -> None:
    """As PretextPreview does, and no more volumes than wanted."""
    cut = {name: value[:6] for name, value in batch().items()}
    panels = partition_panels(cut)
    assert len(panels[0].boxes) == 6
    draw_panels(panels)
    assert len(partition_panels(batch(5))[0].boxes) == 12
    assert len(partition_panels(batch(5), max_volumes=4)[0].boxes) == 16
    assert len(partition_panels({name: value[:1] for name, value in batch().items()})[0].boxes) == 1


# ---- regions


def network() -> ContrastiveUNet:
    torch.manual_seed(0)
    unet = UNet(2, 1, 2, (4, 6, 8), (2, 2), num_res_units=1, norm="batch")
    return ContrastiveUNet(unet, (40, 48), 1, out_channels=5)


def test_regions_of_a_slice_and_what_is_like_the_middle_one() -> None:
    net, data = network(), batch(2, 2, plane=(40, 48))
    modes = [module.training for module in net.modules()]
    panels = region_panels({**data, "name": ["a/x.nii", "a/x.nii", "a/y.nii", "a/y.nii"]}, net, max_slices=2)
    assert [module.training for module in net.modules()] == modes
    assert len(panels) == 6
    shown, second, other = panels[:3]
    assert shown.caption.startswith("x.nii, slice 0: 13 regions; beside: cosine of each place with the anchor")
    assert [panel.lead for panel in panels[:3]] == [True, False, False]
    starts = region_starts((20, 24), 3).tolist()
    assert sorted(tuple(box.start) for box in shown.boxes) == sorted((2.0 * a, 2.0 * b) for a, b in starts)
    assert all(tuple(box.size) == (6, 6) for box in shown.boxes)
    assert [(tuple(box.start), box.label) for box in shown.boxes if box.colour == YELLOW] == [((16.0, 20.0), "anchor")]
    assert torch.equal(second.image, data["image"][0, 1])
    assert torch.equal(other.image, data["image"][2, 0])
    assert second.caption.startswith("view 2: cosine ")
    assert other.caption.startswith("y.nii, same partition: cosine ")
    vectors = F.normalize(net.eval()(data["image"].flatten(0, 1)), dim=-1)
    for panel, view in ((second, 1), (other, 4)):
        expected = vectors[view] @ vectors[0, 4]
        for (row, column), cosine in zip(starts, expected.tolist()):
            # the middle cell of a region, two pixels wide
            block = panel.heat[2 * row + 2 : 2 * row + 4, 2 * column + 2 : 2 * column + 4]
            torch.testing.assert_close(block, torch.full((2, 2), cosine), atol=1e-5, rtol=0)
        here, elsewhere = expected[4].item(), max(expected[[*range(4), *range(5, 13)]].tolist())
        assert panel.caption.endswith(f"cosine {here:.2f} here, at most {elsewhere:.2f} in other regions")
        assert panel.heat[:2].isnan().all()
        assert panel.heat[-2:].isnan().all()
        assert not panel.heat[2:-2, 2:-2].isnan().any()
    assert figure_image(draw_panels(panels)).std() > 10


def test_one_view_of_one_volume_has_no_relatives() -> None:
    panels = region_panels(batch(1, 2, None, (40, 48)), network())
    titles = [panel.caption.split(";")[0] for panel in panels]
    assert titles == ["volume 40, slice 0: 13 regions", "volume 40, slice 5: 13 regions"]
    draw_panels(panels)


def test_errors() -> None:
    unet = UNet(2, 1, 2, (4, 6, 8), (2, 2), norm="batch")
    with pytest.raises(ValueError, match="stage 1 has no regions"):
        region_panels(batch(), ContrastiveUNet(unet, PLANE))
    crops = ContrastiveUNet(UNet(3, 1, 2, (4, 6, 8), (2, 2), norm="batch"), (12, 16, 20), 1, region_size=1)
    with pytest.raises(ValueError, match=r"draws slices, the network takes \(12, 16, 20\): 3D crops are for stage 1"):
        region_panels(batch(), crops)
    with pytest.raises(KeyError, match="'volume' is not in the batch"):
        partition_panels({name: value for name, value in batch().items() if name != "volume"})
    with pytest.raises(ValueError, match=r"'image' \(12, 2, 1\) must be"):
        partition_panels({**batch(), "image": torch.zeros(12, 2, 1)})
