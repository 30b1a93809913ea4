# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, RandFlipd

from monai_ssl.transforms import (
    RandCubeRotationd,
    RandGridPatchesd,
    RandJigsawd,
    RandRelativeLocationd,
    RandViewsd,
    extract_patches,
)
from monai_ssl.visualize import (
    Panel,
    cpc_panels,
    draw_panels,
    figure_image,
    jigsaw_panels,
    relative_location_panels,
    rotation_panels,
    view_panels,
)

SHAPES = {2: (14, 17), 3: (14, 17, 19)}


def batch_of(transform: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    transform.set_random_state(seed=3)
    items = [{"image": torch.rand(1, *shape), "name": f"/data/patient{i}.nii.gz"} for i in range(2)]
    return next(iter(DataLoader(Dataset(items, transform), batch_size=2)))


def check(panels: list[Panel], number: int) -> list[str]:
    assert len(panels) == number
    picture = figure_image(draw_panels(panels))
    assert picture.std() > 10
    captions = [panel.caption for panel in panels]
    assert not any("/data" in caption for caption in captions)
    return captions


@pytest.mark.parametrize("dims", [2, 3])
def test_relative_location(dims: int) -> None:
    batch = batch_of(RandRelativeLocationd("image", jitter=1, gap=1, num_queries=5), SHAPES[dims])
    captions = check(relative_location_panels(batch, (3,) * dims), 12)
    last = {2: "+1 +1", 3: "+1 +1 +1"}[dims]
    batch["label"][0, 0] = 3**dims - 2
    captions = [panel.caption for panel in relative_location_panels(batch, (3,) * dims)]
    assert captions[1] == f"class {3**dims - 2}: {last}"


@pytest.mark.parametrize("dims", [2, 3])
def test_jigsaw_is_put_right(dims: int) -> None:
    task = RandJigsawd("image", grid_size=(3,) * dims, num_permutations=5, jitter=0, gap=0)
    shape = tuple(3 * n for n in (4, 5, 6)[:dims])
    values = torch.arange(float(torch.tensor(shape).prod())).reshape(1, *shape)
    item = task.set_random_state(seed=1)({"image": values})
    batch = {key: value[None] for key, value in item.items()}
    shuffled, right = jigsaw_panels(batch, task.permutations, (3,) * dims)
    starts = torch.cartesian_prod(*(torch.arange(3) * n for n in (4, 5, 6)[:dims]))
    patches = extract_patches(values, starts, (4, 5, 6)[:dims])
    assert torch.equal(patches[task.permutations[int(item["label"])]], item["image"])
    middle = values if dims == 2 else values[..., 9]  # the middle slice of the middle layer
    for i in range(3):
        for j in range(3):
            cell = right.image[:, i * 5 : i * 5 + 4, j * 6 : j * 6 + 5]
            assert torch.equal(cell, middle[:, i * 4 : i * 4 + 4, j * 5 : j * 5 + 5])
    assert not torch.equal(shuffled.image, right.image)
    check([shuffled, right], 2)


@pytest.mark.parametrize(("group", "shape"), [("axis10", (9, 9, 9)), ("plane4", (9, 9))])
def test_rotation(group: str, shape: tuple[int, ...]) -> None:
    batch = batch_of(RandCubeRotationd("image", group=group), shape)
    batch["label"][0] = 0
    assert check(rotation_panels(batch, group), 2)[0].startswith("patient0.nii.gz: class 0, axes [0, 1")


@pytest.mark.parametrize("dims", [2, 3])
def test_cpc_frames_context_and_target(dims: int) -> None:
    batch = batch_of(RandGridPatchesd("image", grid_size=4, jitter=0, gap=1), SHAPES[dims])
    panels = cpc_panels(batch, (4,) * dims)
    check(panels, 2)
    labels = [box.label for box in panels[0].boxes]
    assert labels.count("?") == 2
    assert labels.count("seen") >= 3


@pytest.mark.parametrize("dims", [2, 3])
def test_views(dims: int) -> None:
    views = Compose([RandFlipd("image", prob=0.5, spatial_axis=0)])
    panels = view_panels(batch_of(RandViewsd("image", 2, views), SHAPES[dims]))
    assert check(panels, 4)[1] == "patient0.nii.gz: view 2"
    assert panels[0].colour == panels[1].colour != panels[2].colour
