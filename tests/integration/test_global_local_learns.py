# SPDX-License-Identifier: Apache-2.0
"""Contrast of slices and regions as wholes: below chance on a phantom that varies along its axis, at chance elsewhere.

12 volumes of 10 to 21 slices of 64 x 64, four partitions, 3 volumes and 2 views a step, Adam 1e-3; the mean loss of the
last 20 steps as a share of chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSpatialCropd,
    Resized,
    ScaleIntensityRanged,
    SplitDimd,
)
from torch import Tensor, nn

from monai_ssl.data import PrepareSliceBatch
from monai_ssl.losses import PartitionContrastiveLoss, RegionContrastiveLoss
from monai_ssl.metrics import effective_rank
from monai_ssl.networks import ContrastiveUNet
from monai_ssl.transforms import RandPartitionSlicesd, RandViewsd

PLANE, VOLUMES, BATCH, PARTITIONS = (64, 64), 12, 3, 4
CHANCE = {"GD": math.log(19), "GD-": math.log(19), "GR": math.log(23), "LR": math.log(43), "LD": math.log(43)}
Source = Callable[[np.random.RandomState], list[dict[str, Any]]]  # the items of one step


def patient(number: int) -> Tensor:
    """Body, spine, and one organ in each quarter of the axis; sizes, places, brightness and length vary."""
    draw = np.random.RandomState(number)
    slices = 10 + number
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in PLANE), indexing="ij")
    axes, shift = draw.uniform([0.72, 0.8], [0.86, 0.95]), draw.uniform(-0.03, 0.03, 2)
    inside = lambda centre, size: ((y - centre[0]) / size[0]) ** 2 + ((x - centre[1]) / size[1]) ** 2 < 1
    radii = [(0.55, 0.55), (0.7, 0.45), (0.4, 0.75), (0.65, 0.65)]  # of organs around the middle, which all crops show
    values = np.array([0.75, 0.1, 1.0, 0.3]) + draw.uniform(-0.06, 0.06, 4)
    jitter = draw.uniform(-0.03, 0.03, (4, 2))
    volume = np.zeros((*PLANE, slices), dtype=np.float32)
    for k in range(slices):
        place = 4 * (k + 0.5) / slices
        quarter, depth = int(place), place % 1
        image = 0.5 * inside(shift, axes * (1 - 0.04 * abs(place - 2)))
        image[inside(shift + (0.66, 0.0), (0.1, 0.1))] = 1.0
        size = 0.75 + 0.25 * math.sin(math.pi * depth)
        image[inside(shift + jitter[quarter], size * np.array(radii[quarter]))] = values[quarter]
        volume[..., k] = image + 0.03 * draw.randn(*PLANE)
    return torch.from_numpy(volume)[None]


@cache
def patients() -> list[dict[str, Any]]:
    return [{"image": patient(number), "volume": number} for number in range(VOLUMES)]


def phantom(draw: np.random.RandomState) -> list[dict[str, Any]]:
    return [patients()[i] for i in draw.permutation(VOLUMES)[:BATCH]]


def noise(draw: np.random.RandomState) -> list[dict[str, Any]]:
    return [{"image": torch.from_numpy(draw.rand(1, *PLANE, 12).astype(np.float32)), "volume": i} for i in range(BATCH)]


def constant(draw: np.random.RandomState) -> list[dict[str, Any]]:
    return [{"image": torch.full((1, *PLANE, 12), 0.5), "volume": i} for i in range(BATCH)]


def pipeline(crop: bool, seed: int) -> Compose:
    """Slices of volumes and their views; the crop belongs to stage 1, since regions must stay in place."""
    moved = [
        RandSpatialCropd("image", [round(0.52 * n) for n in PLANE], random_size=False),
        Resized("image", PLANE, mode="bilinear"),
    ]
    intensity = [
        RandShiftIntensityd("image", 0.3, prob=1.0),
        RandScaleIntensityFixedMeand("image", factors=0.3, prob=1.0),
        ScaleIntensityRanged("image", 0, 1.5, 0, 1.5, clip=True),
    ]
    slices = [
        RandPartitionSlicesd("image", PARTITIONS),
        SplitDimd(["image", "partition", "slice_index"], dim=0, keepdim=False, list_output=True),
        RandViewsd("image", 2, Compose(moved + intensity if crop else intensity)),
        EnsureTyped("image", track_meta=False),
    ]
    return Compose(slices).set_random_state(seed)


class Task:
    """One stage: network, loss and batches."""

    def __init__(self, mode: str, source: Source, matched: bool = True, seed: int = 0) -> None:
        torch.manual_seed(seed)
        network = UNet(2, 1, 5, (8, 16, 32, 64), (2, 2, 2), num_res_units=2, norm="BATCH", act="RELU")
        regions = mode.startswith("L")
        self.net = ContrastiveUNet(network, PLANE, 2 if regions else 0)
        matching = {"matched_negatives": matched} if regions else {}
        self.loss: nn.Module = (RegionContrastiveLoss if regions else PartitionContrastiveLoss)(mode, **matching)
        self.mode, self.source, self.draw = mode, source, np.random.RandomState(seed)
        self.transform, self.prepare = pipeline(not regions, seed), PrepareSliceBatch()

    def batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.prepare(list_data_collate([one for item in self.source(self.draw) for one in self.transform(item)]))

    def train(self, steps: int) -> float:
        """The mean loss of the last 20 steps as a share of chance."""
        optimizer = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=1e-3)
        self.net.train()
        losses = []
        for _ in range(steps):
            image, ids = self.batch()
            loss = self.loss(self.net(image), **ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses[-20:]).mean().item() / CHANCE[self.mode]

    @torch.no_grad()
    def rank(self) -> float:
        """Effective rank of the embeddings, or region vectors, of a batch."""
        self.net.eval()
        return effective_rank(self.net(self.batch()[0]).flatten(0, -2)).item()


# steps and share of chance that the loss falls below
FULL = {"GD": (400, 0.6), "GD-": (400, 0.6), "GR": (400, 0.8), "LR": (200, 0.4), "LD": (200, 0.4)}
QUICK = {"GD": (150, 0.85), "LR": (100, 0.4)}


def check_learning(mode: str, steps: int, share: float) -> None:
    task = Task(mode, phantom)
    assert task.train(steps) < share
    # one direction less than partitions says all that G^D asks for; regions differ in far more
    assert task.rank() > (10 if mode.startswith("L") else 2)


@pytest.mark.parametrize("mode", QUICK)
def test_learns_anatomy(mode: str) -> None:
    check_learning(mode, *QUICK[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", FULL)
def test_learns_anatomy_well(mode: str) -> None:
    check_learning(mode, *FULL[mode])


@pytest.mark.parametrize("source", [noise, constant])
def test_partitions_cannot_be_told_without_anatomy(source: Source) -> None:
    assert Task("GD", source).train(60) * CHANCE["GD"] == pytest.approx(math.log(19), abs=0.02)


def test_place_in_the_plane_is_no_shortcut() -> None:
    """On constant volumes zero padding gives every place a signature: with matched negatives it is not enough."""
    assert Task("LR", constant).train(60) * CHANCE["LR"] >= math.log(19) - 0.1
    without = Task("LR", constant, matched=False)
    assert without.train(60) * CHANCE["LR"] < 0.1 * math.log(25)
