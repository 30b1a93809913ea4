# SPDX-License-Identifier: Apache-2.0
"""The five patch pretexts as wholes: below chance on the phantom, at chance where there is nothing to see.

Crops of 48^3 (Rotation 32^3, Jigsaw 40^3), a small SegResNet encoder, AdamW 1e-3, mean loss of the last 20 steps;
chance: ln 26, ln 10 (ten permutations, ten rotations), ln(B Q K) and ln(2 N - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import FullyConnectedNet
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.transforms import (
    Compose,
    RandAffined,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSpatialCrop,
    ScaleIntensityRange,
)
from torch import Tensor, nn

from monai_ssl.data import torso_phantom
from monai_ssl.losses import CPCLoss, NTXentLoss
from monai_ssl.metrics import effective_rank
from monai_ssl.networks import CPCNet, PatchClassifier, ProjectionHead
from monai_ssl.transforms import RandCubeRotation, RandGridPatches, RandJigsaw, RandRelativeLocation, RandViewsd

FEATURES = 64
Source = Callable[[np.random.RandomState, int], Tensor]  # volumes (B, 1, *spatial)


class Task(NamedTuple):
    cut: Callable[[Tensor], tuple[Tensor, Any]]  # one crop -> network input and target
    network: nn.Module
    loss: Callable[[Any, Tensor], Tensor]
    chance: float
    batch: int
    steps: int
    crop: int
    share: float  # of chance, which the loss must fall below on the phantom


def views() -> Compose:
    size = (32, 32, 32)
    affine = RandAffined(
        "image", prob=1.0, rotate_range=[0.35] * 3, scale_range=[0.2] * 3, spatial_size=size, padding_mode="reflection"
    )
    flips = [RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)]
    turns = [RandRotate90d("image", prob=0.5, spatial_axes=plane) for plane in ((0, 1), (1, 2), (0, 2))]
    shift = RandShiftIntensityd("image", offsets=0.125, prob=0.5)
    return Compose([affine, *flips, *turns, shift, RandScaleIntensityFixedMeand("image", factors=0.5, prob=0.5)])


def build(name: str, seed: int = 0) -> Task:
    torch.manual_seed(seed)
    encoder = SegResEncoder(3, init_filters=8, norm="instance", blocks_down=(1, 1, 2, 2))
    head = lambda i, o, h: FullyConnectedNet(i, o, [h], act="relu", adn_ordering="A")
    entropy = lambda p, y: F.cross_entropy(p, y)
    if name == "rpl":
        task: Any = RandRelativeLocation().set_random_state(seed)
        net: nn.Module = PatchClassifier(encoder, head(2 * FEATURES, 26, 256), combine="pairs")
        return Task(lambda x: (task(x), task.label), net, entropy, math.log(26), 4, 60, 48, 0.8)
    if name == "jigsaw":
        # larger crops let few features tell ten permutations apart: effective rank 2 to 3 once they do
        task = RandJigsaw(num_permutations=10).set_random_state(seed)
        net = PatchClassifier(encoder, head(27 * FEATURES, 10, 1024))
        return Task(lambda x: (task(x), task.label), net, entropy, math.log(10), 4, 130, 40, 0.8)
    if name == "rotation":
        task = RandCubeRotation().set_random_state(seed)
        net = PatchClassifier(encoder, head(8 * FEATURES, 10, 128), pool=2)
        return Task(lambda x: (task(x), task.label), net, entropy, math.log(10), 8, 120, 32, 0.8)
    if name == "cpc":
        task = RandGridPatches(4, jitter=0.125, gap=0.125).set_random_state(seed)
        loss = CPCLoss()
        return Task(
            lambda x: (task(x), 0), CPCNet(encoder, FEATURES), lambda p, _: loss(*p), math.log(128), 4, 120, 48, 0.8
        )
    two = RandViewsd("image", 2, views()).set_random_state(seed)
    net = PatchClassifier(encoder, ProjectionHead((FEATURES, 64, 64), norm="batch"), combine="each")
    contrast = NTXentLoss()
    cut = lambda x: (two({"image": x})["image"], 0)
    return Task(cut, net, lambda z, _: contrast(z[:, 0], z[:, 1]), math.log(15), 8, 80, 48, 0.93)


def step_input(task: Task, volumes: Tensor, crop: RandSpatialCrop) -> tuple[Tensor, Tensor]:
    items = [task.cut(torch.as_tensor(crop(volume)).as_subclass(Tensor)) for volume in volumes]
    images = torch.stack([torch.as_tensor(image).as_subclass(Tensor) for image, _ in items])
    return images, torch.stack([torch.as_tensor(label) for _, label in items])


def train(task: Task, source: Source, seed: int = 0) -> float:
    """The mean loss of the last 20 steps as a share of chance."""
    draw, crop = np.random.RandomState(seed), RandSpatialCrop([task.crop] * 3, random_size=False).set_random_state(seed)
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=1e-3)
    task.network.train()
    losses = []
    for _ in range(task.steps):
        images, target = step_input(task, source(draw, task.batch), crop)
        loss = task.loss(task.network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-20:]).mean().item() / task.chance


def chosen_from(size: tuple[int, ...], middle: tuple[slice, ...]) -> Source:
    """24 subjects, soft-tissue window of HU."""
    scale = ScaleIntensityRange(-175, 250, 0, 1, clip=True)
    images = [torso_phantom(i, size=size).image[middle] for i in range(24)]
    volumes = torch.stack([torch.as_tensor(scale(image[None])) for image in images]).as_subclass(Tensor)
    return lambda draw, batch: volumes[draw.permutation(len(volumes))[:batch]]


@pytest.fixture(scope="module")
def phantom() -> Source:
    """The middle of the body at 4.3 mm: the table and the air around tell too much of a place."""
    return chosen_from((90, 74, 90), (slice(17, 73), slice(13, 61), slice(17, 73)))


@pytest.fixture(scope="module")
def whole_phantom() -> Source:
    """The whole body at 6.4 mm, in which subjects differ most."""
    return chosen_from((60, 54, 60), (slice(None),) * 3)


def noise(draw: np.random.RandomState, batch: int) -> Tensor:
    return torch.from_numpy(draw.rand(batch, 1, 48, 48, 48).astype(np.float32))


def constant(draw: np.random.RandomState, batch: int) -> Tensor:
    return torch.full((batch, 1, 48, 48, 48), 0.5)


def interpolated_noise(draw: np.random.RandomState, batch: int) -> Tensor:
    """As after `Spacingd`: larger than the crop, which is then cut at random, so that no place has its own blur."""
    coarse = torch.from_numpy(draw.rand(batch, 1, 45, 45, 45).astype(np.float32))
    return F.interpolate(coarse, size=(60, 60, 60), mode="trilinear", align_corners=True)


@pytest.fixture(scope="module")
def trained_exemplar(whole_phantom: Source) -> tuple[Task, float]:
    """With its loss as a share of chance."""
    task = build("exemplar")
    return task, train(task, whole_phantom)


# the quickest at every commit
@pytest.mark.parametrize(
    "name",
    ["rpl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("jigsaw", "rotation", "cpc", "exemplar"))],
)
def test_learns_anatomy(name: str, request: pytest.FixtureRequest) -> None:
    if name == "exemplar":
        (task, share), source = (request.getfixturevalue(n) for n in ("trained_exemplar", "whole_phantom"))
    else:
        task, source = build(name), request.getfixturevalue("phantom")
        share = train(task, source)
    assert share < task.share
    crop = RandSpatialCrop([task.crop] * 3, random_size=False).set_random_state(5)
    images, _ = step_input(task, source(np.random.RandomState(5), 8), crop)
    patches = images if name == "rotation" else images.flatten(0, 1)
    with torch.no_grad():
        features = task.network.eval().embed(patches[:64])
    assert effective_rank(features).item() > 4


# constant volumes are left to the transforms' own tests: their patches are equal to the bit for every label
SOURCES = [pytest.param(source, id=source.__name__) for source in (noise, interpolated_noise)]


def slow(name: str, source: Any) -> Any:
    quick = name == "rpl" and source.id == "noise"
    return pytest.param(name, *source.values, id=f"{name}-{source.id}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name, source", [slow(n, source) for n in ("rpl", "jigsaw", "rotation") for source in SOURCES])
def test_classes_cannot_be_told_without_anatomy(name: str, source: Source) -> None:
    """After as many steps as beat chance on the phantom: accuracy within three standard deviations of chance."""
    task = build(name)
    train(task, source)
    draw, crop = np.random.RandomState(77), RandSpatialCrop([task.crop] * 3, random_size=False).set_random_state(7)
    hits = []
    with torch.no_grad():
        for _ in range(16):
            images, target = step_input(task, source(draw, 8), crop)
            hits.append((task.network.eval()(images).argmax(1) == target).flatten())
    found, chance = torch.cat(hits).float(), math.exp(-task.chance)
    assert abs(found.mean().item() - chance) <= 3 * math.sqrt(chance * (1 - chance) / len(found))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_codes_cannot_be_predicted_without_anatomy(source: Source) -> None:
    task = build("cpc")
    assert train(task, source) * task.chance >= task.chance - 0.02


@pytest.mark.parametrize("name", ["noise", "constant", pytest.param("whole_phantom", marks=pytest.mark.slow)])
def test_views_of_one_volume_cannot_be_told_apart(name: str, request: pytest.FixtureRequest) -> None:
    """One volume N times over: the loss stays at ln(2 N - 1), so nothing but the volume makes a pair."""
    if name == "whole_phantom":
        (task, _), source = (request.getfixturevalue(n) for n in ("trained_exemplar", name))
        task.network.train()
    else:
        task, source = build("exemplar"), {"noise": noise, "constant": constant}[name]
    crop = RandSpatialCrop([task.crop] * 3, random_size=False).set_random_state(1)
    draw, losses = np.random.RandomState(3), []
    with torch.no_grad():
        for _ in range(12):
            one = source(draw, 1)
            centre = torch.as_tensor(crop(one[0])).as_subclass(Tensor)
            images = torch.stack([task.cut(centre)[0].as_subclass(Tensor) for _ in range(task.batch)])
            losses.append(task.loss(task.network(images), images))
    assert torch.stack(losses).mean().item() >= task.chance - 0.05
