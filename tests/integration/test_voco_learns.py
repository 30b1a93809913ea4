# SPDX-License-Identifier: Apache-2.0
"""VoCo as a whole: it learns anatomy from the phantom, and nothing where there is none.

Window 36 x 36 x 12, crops of 12^3 on a grid (3, 3, 1): the best constant prediction has skill 0, the best fixed cell an
accuracy of .2704 (both exact over all starts).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from monai.transforms import Compose, RandFlip, RandRotate90, RandShiftIntensity, ScaleIntensityRange

from monai_ssl.data import torso_phantom
from monai_ssl.losses import VoCoLoss
from monai_ssl.metrics import OverlapPredictionMetric, effective_rank
from monai_ssl.networks import UNetEncoder, VoCoNet
from monai_ssl.transforms import RandVoCoCrops

WINDOW, ROI, GRID, SAMPLES, BATCH = (36, 36, 12), (12, 12, 12), (3, 3, 1), 4, 4
Source = Callable[[np.random.RandomState], torch.Tensor]  # volumes (BATCH, 1, *WINDOW) of one step


@pytest.fixture(scope="module")
def phantom() -> tuple[torch.Tensor, torch.Tensor]:
    """32 subjects to learn from and 64 others, all resized to the window, soft-tissue window of HU."""
    scale = ScaleIntensityRange(-175, 250, 0, 1, clip=True)
    volumes = [scale(torch.from_numpy(torso_phantom(i, size=WINDOW).image)[None]) for i in range(96)]
    stacked = torch.stack([torch.as_tensor(v).as_subclass(torch.Tensor) for v in volumes])
    return stacked[:32], stacked[32:]


def network(seed: int = 0, teacher: str = "projector") -> VoCoNet:
    torch.manual_seed(seed)
    unet = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="instance")
    return VoCoNet(UNetEncoder(unet), 56, 128, 128, teacher=teacher)


def crop_batch(crops: RandVoCoCrops, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    items = [(*crops(volume), crops.label) for volume in volumes]
    image, base, label = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*items))
    return image.as_subclass(torch.Tensor), base.as_subclass(torch.Tensor), label


def train(net: VoCoNet, source: Source, steps: int, variant: str = "v2", seed: int = 0) -> None:
    augmentation = Compose(
        [*(RandFlip(0.2, axis) for axis in range(3)), RandRotate90(0.2, 3, (0, 1)), RandShiftIntensity(0.1, prob=0.5)]
    )
    crops = RandVoCoCrops(ROI, GRID, SAMPLES, augmentation).set_random_state(seed)
    loss_function, draw = VoCoLoss(variant), np.random.RandomState(seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    net.train()
    for _ in range(steps):
        image, base, label = crop_batch(crops, source(draw))
        net.update_teacher(0.9)
        loss = loss_function(net(image, base), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(net: VoCoNet, volumes: torch.Tensor, variant: str = "v2") -> dict[str, float]:
    """Skill and accuracy with the own base crops and, "cross", with those of the next volume; rank of one batch."""
    crops, loss = RandVoCoCrops(ROI, GRID, SAMPLES).set_random_state(99), VoCoLoss(variant)
    metrics = {
        (name, cross): OverlapPredictionMetric(name, variant)
        for name in ("skill", "accuracy")
        for cross in (False, True)
    }
    net.eval()
    for some in volumes.split(BATCH):
        image, base, label = crop_batch(crops, some)
        output = net(image, base)
        for (_, cross), metric in metrics.items():
            partner = torch.arange(len(label)).roll(-1) if cross else None
            metric(loss.logits(output, label, partner), label)
    values = {f"{'cross ' if cross else ''}{name}": m.aggregate().item() for (name, cross), m in metrics.items()}
    rows = torch.cat([image, base], 1).flatten(0, 1)  # 52 crops
    return {**values, "rank": effective_rank(net.embed(rows)).item()}


def choose(volumes: torch.Tensor) -> Source:
    return lambda draw: volumes[draw.permutation(len(volumes))[:BATCH]]


def noise(draw: np.random.RandomState, batch: int = BATCH) -> torch.Tensor:
    return torch.from_numpy(draw.rand(batch, 1, *WINDOW).astype(np.float32))


def constant(draw: np.random.RandomState, batch: int = BATCH) -> torch.Tensor:
    return torch.from_numpy(draw.rand(batch, 1, 1, 1, 1).astype(np.float32)).expand(-1, -1, *WINDOW).clone()


@pytest.mark.parametrize("variant, teacher", [("v2", "projector"), ("v1", "full")])
def test_learns_anatomy(phantom: tuple[torch.Tensor, torch.Tensor], variant: str, teacher: str) -> None:
    training, held_out = phantom
    net = network(teacher=teacher)
    before = evaluate(net, held_out, variant)
    train(net, choose(training), steps=100, variant=variant)
    after = evaluate(net, held_out, variant)
    assert after["skill"] >= before["skill"] + 0.1  # random features already tell lungs from abdomen
    assert after["skill"] >= 0.3
    assert after["cross skill"] >= 0.2  # another patient's base crops: read by anatomy, not by shared voxels
    assert after["accuracy"] >= 0.45
    assert after["rank"] >= 10


def test_white_noise_shows_nothing_across_volumes() -> None:
    """Own-volume values are not at chance: a crop shares voxels with its base crops."""
    net = network()
    train(net, noise, steps=100)
    after = evaluate(net, noise(np.random.RandomState(77), 64))
    assert after["cross accuracy"] <= 0.2
    assert after["cross skill"] <= 0


def test_constant_volumes_show_nothing() -> None:
    """A loss that falls is no proof: neither untrained nor after 40 steps is the constant prediction beaten."""
    net, volumes = network(), constant(np.random.RandomState(77), 64)
    for steps in (0, 40):
        train(net, constant, steps)
        after = evaluate(net, volumes)
        assert after["skill"] < 0
        assert after["accuracy"] <= 0.2704
        assert after["rank"] <= 2
