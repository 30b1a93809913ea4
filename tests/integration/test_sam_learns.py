# SPDX-License-Identifier: Apache-2.0
"""SAM as a whole in 2D: below chance and matching points on a phantom, at chance where there is nothing to see."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_ssl.losses import AnatomicalEmbeddingLoss, GlobalPairSampler, LocalPairSampler
from monai_ssl.metrics import effective_rank
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet, MergedEmbeddingNet
from monai_ssl.transforms import RandPairedViews

ROI, MM, BATCH = (64, 64), 2.0, 3
CHANCE = math.log(1 + 100), math.log(1 + 30 + 40)  # global: 2 * 16 cells less anchor and positive, 40 diverse
AFFINE = torch.diag(torch.tensor([MM, MM, 1.0, 1.0], dtype=torch.float64))
Views = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # step -> image, image_2, view_affine


def subject(seed: int, size: tuple[int, int] = (180, 200), turn: float = 0.0, scale: float = 1.0) -> Tensor:
    """A body with 40 ellipses, (1, *size): the same in all subjects but for 1.5 % of their places.

    Rotated and scaled about the centre where asked for.
    """
    common, own = np.random.RandomState(0), np.random.RandomState(1000 + seed)
    centre = (np.array(size) - 1) / 2
    place = (np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) - centre) @ rotation(turn) / scale
    place = place / (np.array(size) / 2)  # (*size, 2), the body within the unit circle
    image = 0.3 * (np.square(place / 0.92).sum(-1) < 1)
    for _ in range(40):
        angle, radius = common.uniform(0, 2 * math.pi), 0.8 * math.sqrt(common.uniform())
        middle = radius * np.array([math.cos(angle), math.sin(angle)]) + 0.015 * own.randn(2)
        half, tilt, value = common.uniform(0.1, 0.45, 2), common.uniform(0, math.pi), common.uniform(-0.3, 0.3)
        inside = np.square((place - middle) @ rotation(tilt) / half).sum(-1) < 1
        image = image + value * inside
    return torch.as_tensor(image[None], dtype=torch.float32)


def rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def network(seed: int = 0) -> AnatomicalEmbeddingNet:
    torch.manual_seed(seed)
    encoder = AnisotropicResNet(2, base_channels=8)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, 2, embed_dim=32)


def pairs(volumes: list[Tensor], seed: int = 0, **kwargs: float) -> Views:
    """Views of three volumes at a time."""
    transform = RandPairedViews(
        ROI, (0.8, 1.2), MM, min_overlap=0.0, flip_prob=0.0, placement="seed", **{"overlap_prob": 0.8, **kwargs}
    ).set_random_state(seed)
    order = np.random.RandomState(seed)

    def cut(step: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = order.permutation(len(volumes))[:BATCH]
        parts = zip(*(transform(MetaTensor(volumes[i], affine=AFFINE)) for i in chosen))
        image, image_2, affine = (torch.stack([torch.as_tensor(p).as_subclass(Tensor) for p in part]) for part in parts)
        return image, image_2, affine

    return cut


def mean_of_last(values: list[float], number: int) -> float:
    return sum(values[-number:]) / number


def train(net: nn.Module, views: Views, steps: int) -> tuple[list[float], list[float]]:
    """Local and global term of each step; SGD 0.02 after a warm-up of 50 steps."""
    loss = AnatomicalEmbeddingLoss(
        ROI, LocalPairSampler(32, 2.0, 20.0, (400, 100)), GlobalPairSampler(25.0, None, 5.0, (60, 40), 40)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 0.001 + step / 50))
    generator = torch.Generator().manual_seed(0)
    terms = []
    net.train()
    for step in range(steps):
        image, image_2, affine = views(step)
        value = loss(net(image, image_2), affine, generator=generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        terms.append(torch.stack(loss.last_terms))
    fine, coarse = torch.stack(terms).unbind(1)
    return fine.tolist(), coarse.tolist()


def matching_error(
    net: nn.Module, size: tuple[int, int] = (180, 200), turn: float = 0.12, scale: float = 1.08
) -> float:
    """Mean distance in mm of matches to where the points of an unseen subject are in its rotated and scaled image."""
    merged = MergedEmbeddingNet.sharing(net).eval()
    pad = [0, -size[1] % 16, 0, -size[0] % 16]
    with torch.no_grad():
        images = torch.stack([subject(9, size), subject(9, size, turn, scale)])
        query, key = merged(F.pad(images, pad))[..., : size[0] // 2, : size[1] // 2]  # (64, 90, 100) each
    centre = (np.array(size) - 1) / 2
    cells = np.stack(np.meshgrid(np.arange(0, 90, 2), np.arange(0, 100, 2), indexing="ij"), -1).reshape(-1, 2)
    voxels = 2 * cells + 0.5
    inside = np.square((voxels - centre) / size).sum(1) < 0.42**2  # so that no truth lies outside the image
    cells, voxels = cells[inside], voxels[inside]
    similarity = torch.einsum("cp,chw->phw", query[:, cells[:, 0], cells[:, 1]], key)
    found = 2 * peaks(similarity) + 0.5
    truth = (voxels - centre) @ rotation(-turn) * scale + centre
    return MM * float(np.linalg.norm(found - truth, axis=1).mean())


def peaks(similarity: Tensor) -> np.ndarray:
    """Index of the largest value of maps (P, H, W), by a parabola along each axis, (P, 2)."""
    row, column = (x.numpy() for x in torch.unravel_index(similarity.flatten(1).argmax(1), similarity.shape[1:]))
    values = F.pad(similarity[None], (1, 1, 1, 1), mode="replicate")[0].numpy()
    at = lambda i, j: values[np.arange(len(values)), row + 1 + i, column + 1 + j]
    offsets = []
    for step in ((1, 0), (0, 1)):
        low, high = at(-step[0], -step[1]), at(*step)
        bend = np.minimum(low + high - 2 * at(0, 0), -1e-6)
        offsets.append(np.clip(0.5 * (low - high) / bend, -0.5, 0.5))
    return np.stack([row, column], 1) + np.stack(offsets, 1)


def test_learns_places() -> None:
    """150 steps; reached were 3.6, 3.1, 3.0 mm (with other seeds 2.7 and 3.6) and a rank of 25 of 32."""
    net = network()
    untrained = matching_error(net)
    assert untrained > 10
    fine, coarse = train(net, pairs([subject(i) for i in range(6)]), 150)
    assert mean_of_last(fine, 20) < 4.2 < CHANCE[0]
    assert mean_of_last(coarse, 20) < 3.7 < CHANCE[1]
    assert matching_error(net) < 4
    with torch.no_grad():
        local = net.eval()(F.pad(subject(9)[None], (0, 8, 0, 12)))[0]
    assert effective_rank(local[0].flatten(1).T).item() >= 12


@pytest.mark.parametrize("what", ["constant", "noise"])
def test_nothing_to_be_seen(what: str) -> None:
    """Neither interpolation nor padding may tell which cells correspond.

    Padding tells the place in a view; where the view nearly fills the volume this is the place in the body. So the
    volume is 400 voxels wide: over the last 100 steps the global loss was 0.04 to 0.07 below chance with 14 seeds (over
    the last 50 alone, which is noisier, up to 0.095), 0.003 and less in 600 x 600, and 0.17 in 180 x 200.
    """
    cut, generator = pairs([torch.full((1, 400, 400), 0.5)] * BATCH, 1, overlap_prob=1.0), torch.Generator()

    def views(step: int) -> tuple[Tensor, Tensor, Tensor]:
        image, image_2, affine = cut(step)
        if what == "noise":  # drawn for each view on its own
            image, image_2 = torch.rand(2, *image.shape, generator=generator.manual_seed(step))
        return image, image_2, affine

    fine, coarse = train(network(1), views, 200)
    assert abs(mean_of_last(fine, 100) - CHANCE[0]) <= 0.01
    assert mean_of_last(coarse, 100) >= CHANCE[1] - 0.1
