# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn

from monai_ssl.networks import PGLNet
from monai_ssl.transforms import view_matrix
from monai_ssl.visualize import agreement_panels, draw_panels

ROI = (8, 6)
FLIPS = [(False, False), (True, False), (False, True), (True, True)]


class Fixed(nn.Module):
    """Gives what it was made with."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs, self.weight = outputs, nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, image: Tensor, image_2: Tensor, view_affine: Tensor) -> tuple[Tensor, ...]:
        assert not torch.is_grad_enabled()
        assert not self.training
        assert not any(isinstance(x, MetaTensor) for x in (image, image_2, view_affine))
        return self.outputs


def with_cosine(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and target (N, 2, *F) of given cosines (N, *F)."""
    target = torch.stack([torch.ones_like(cosine), torch.zeros_like(cosine)], 1)
    return 3 * torch.stack([cosine, (1 - cosine**2).sqrt()], 1), target


def batch(flips: Any, starts: Any = ((0, 0), (4, 2)), roi: tuple[int, ...] = ROI) -> dict[str, Any]:
    """Boxes as large as the view, so that one voxel is one pixel."""
    matrices = torch.stack([view_matrix(s, roi, roi, f) for s, f in zip(starts, flips)])
    images = torch.rand(2, 1, 1, *roi, generator=torch.Generator().manual_seed(0))
    return {"image": MetaTensor(images[0]), "image_2": MetaTensor(images[1]), "view_affine": matrices[None]}


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("flip_2", FLIPS)
def test_each_pixel_has_the_cosine_of_its_place(flip: Any, flip_2: Any) -> None:
    """[4, 8) x [2, 6) is shared, in 2 x 2 cells of 2 x 2 pixels, numbered along the axes of the volume."""
    cosine = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]])
    mask = torch.tensor([[[True, True], [True, False]]]).repeat(2, 1, 1)
    panels = agreement_panels(batch((flip, flip_2)), Fixed(*with_cosine(cosine), mask))
    for panel, start, turned, values in zip(panels, ((0, 0), (4, 2)), (flip, flip_2), cosine):
        for x in range(8):
            for y in range(6):
                place = [
                    s + (r - 1 - i if f else i) for s, r, i, f in zip(start, ROI, (x, y), turned)
                ]  # voxel of the volume
                cell = (place[0] - 4) // 2, (place[1] - 2) // 2
                inside = all(0 <= c < 2 for c in cell) and cell != (1, 1)
                found = panel.heat[x, y].item()
                assert found == pytest.approx(values[cell].item(), abs=1e-6) if inside else np.isnan(found)
    framed = panels[0].boxes[0]
    assert list(framed.size) == [4, 4]
    assert list(framed.start) == [0 if flip[0] else 4, 0 if flip[1] else 2]


def test_captions() -> None:
    """Three cells count, and the second target is most like the first prediction."""
    cosine = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.6, 0.6], [0.6, 0.6]]])
    mask = torch.tensor([[[True, True], [True, False]], [[False] * 2] * 2])
    data = {**batch(FLIPS[:2]), "name": ["folder/a.nii.gz"]}
    first, second = agreement_panels(data, Fixed(*with_cosine(cosine), mask))
    # all targets are equal: each prediction finds the first, which is right once in three
    assert first.caption == "a.nii.gz, view 1 predicts view 2: mean cosine 0.20, 33% find their own (chance 33%)"
    assert second.caption == "a.nii.gz, view 2 predicts view 1: nothing shared"
    assert not second.boxes
    assert torch.isnan(second.heat).all()
    figure = draw_panels([first, second])
    heat = figure.axes[0].images[1]
    assert heat.get_clim() == (0, 1)
    assert np.ma.count_masked(np.ma.masked_invalid(heat.get_array())) == 48 - 12


@pytest.mark.parametrize("flip, shown", [(False, (7, 3)), (True, (7, 5))])
def test_volumes_are_cut_through_the_middle_cells(flip: bool, shown: Any) -> None:
    """[0, 8) and [4, 12) share [4, 8) along the last axis: the second of two cells is [6, 8), around 7."""
    data = batch(((False,) * 3, (flip,) * 3), ((0, 0, 0), (1, 2, 4)), (6, 7, 8))
    cosine = torch.linspace(0, 0.7, 8).view(2, 2, 2).expand(2, 2, 2, 2)
    network = Fixed(*with_cosine(cosine), torch.ones(2, 2, 2, 2, dtype=torch.bool))
    panels = agreement_panels(data, network)
    for panel, key, depth in zip(panels, ("image", "image_2"), shown):
        assert torch.equal(panel.image, data[key].as_tensor()[0, ..., depth])
        assert panel.heat.shape == (6, 7)
        seen = panel.heat[~panel.heat.isnan()].mul(10).round().int().tolist()
        assert set(seen) == {1, 3, 5, 7}  # of 0 to 7, numbered with the last axis fastest
    draw_panels(panels)


def test_with_the_network_itself() -> None:
    torch.manual_seed(0)
    encoder = SegResEncoder(2, init_filters=4, norm="instance", blocks_down=(1, 1))
    net = PGLNet(encoder, 8, 7, 5, spatial_dims=2).train()
    net.predictor.eval()  # a part in another mode
    before = {name: t.clone() for name, t in net.state_dict().items()}
    panels = agreement_panels(batch(FLIPS[1:3]), net)
    assert len(panels) == 2
    assert panels[0].heat.shape == ROI
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training
    assert net.projector.training
    assert not net.predictor.training
    with pytest.raises(ValueError, match="2 outputs, not prediction, target and mask"):
        agreement_panels(batch(FLIPS[1:3]), PGLNet(encoder, 8, 7, 5, spatial_dims=2, mode="global"))
