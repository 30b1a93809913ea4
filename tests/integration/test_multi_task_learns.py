# SPDX-License-Identifier: Apache-2.0
"""Rotation, jigsaw and VoCo on one encoder, as `multi_task_pretraining` puts them together: each learns on the phantom.

Crops of 36^3, 24 subjects to learn from and 16 others, weights of 1. Chance: cross-entropy ln 10 for rotation (ten
rotations) and jigsaw (ten permutations of 3 x 3 x 3 patches), skill 0 for VoCo (grid 3 x 3 x 1).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import FullyConnectedNet, UNet
from monai.transforms import Compose, CopyItemsd, EnsureTyped, RandSpatialCropd, ScaleIntensityRanged
from torch import nn

from monai_ssl.data import KeyedDataset, KeyedSampler, torso_phantom
from monai_ssl.handlers import PrepareBatchTensor
from monai_ssl.losses import MultiTaskLoss, VoCoLoss
from monai_ssl.metrics import OverlapPredictionMetric, effective_rank
from monai_ssl.networks import MultiTaskNet, PatchClassifier, UNetEncoder, VoCoNet
from monai_ssl.transforms import RandCubeRotationd, RandJigsawd, RandVoCoCropsd

FEATURES, CROP, BATCH, EPOCHS = 64, (36, 36, 36), 4, 15
NAMES = ("rotation", "jigsaw", "voco")
IMAGES = ["image_rotation", "image_jigsaw", "image_voco", "image_voco_base"]
PREPARE = PrepareBatchTensor(image_key=IMAGES, label_key={name: f"label_{name}" for name in NAMES})


def pipeline() -> Compose:
    return Compose(
        [
            ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
            RandSpatialCropd("image", CROP, random_size=False),
            CopyItemsd("image", times=3, names=[f"image_{name}" for name in NAMES]),
            RandCubeRotationd("image_rotation", label_key="label_rotation"),
            RandJigsawd("image_jigsaw", num_permutations=10, label_key="label_jigsaw"),
            RandVoCoCropsd("image_voco", (12, 12, 36), (3, 3, 1), num_samples=4, label_key="label_voco"),
            EnsureTyped(["image", *IMAGES], track_meta=False),
        ]
    )


def network() -> MultiTaskNet:
    torch.manual_seed(0)
    encoder = UNetEncoder(UNet(3, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1))

    def head(features: int) -> nn.Module:
        return FullyConnectedNet(features, 10, [128], act="relu", adn_ordering="A")

    tasks = {
        "rotation": PatchClassifier(encoder, head(8 * FEATURES), pool=2),
        "jigsaw": PatchClassifier(encoder, head(27 * FEATURES)),
        "voco": VoCoNet(encoder, FEATURES, 64, 64, stages=[-1]),
    }
    return MultiTaskNet(encoder, tasks, {"rotation": IMAGES[:1], "jigsaw": IMAGES[1:2], "voco": IMAGES[2:]})


@torch.no_grad()
def evaluate(net: MultiTaskNet, loss: MultiTaskLoss, volumes: list[dict[str, Any]]) -> dict[str, float]:
    """Losses of the classifiers, skill of VoCo, effective rank of the crops' embeddings."""
    net.eval()
    skill = OverlapPredictionMetric("skill")
    terms, rows = [], []
    for batch in DataLoader(KeyedDataset(Dataset(volumes, pipeline()), seed=1), batch_size=BATCH):
        images, labels = PREPARE(batch)
        output = net(images)
        terms.append(loss.terms(output, labels))
        skill(loss.losses["voco"].logits(output["voco"], labels["voco"]), labels["voco"])
        rows.append(net.encoder(images["image_voco"].flatten(0, 1))[-1].flatten(2).mean(2))
    values = {name: float(torch.stack([term[name] for term in terms]).mean()) for name in ("rotation", "jigsaw")}
    return {**values, "skill": float(skill.aggregate()), "rank": float(effective_rank(torch.cat(rows)))}


def test_every_task_learns() -> None:
    volumes = [{"image": torso_phantom(k, size=(48, 40, 48)).image[None]} for k in range(40)]
    net = network()
    loss = MultiTaskLoss({"rotation": nn.CrossEntropyLoss(), "jigsaw": nn.CrossEntropyLoss(), "voco": VoCoLoss()})
    before = evaluate(net, loss, volumes[24:])
    assert before["rotation"] == pytest.approx(math.log(10), rel=0.05)
    assert before["jigsaw"] == pytest.approx(math.log(10), rel=0.05)

    dataset = Dataset(volumes[:24], pipeline())
    sampler = KeyedSampler(dataset, shuffle=True, seed=0)
    loader = DataLoader(KeyedDataset(dataset, seed=0), batch_size=BATCH, sampler=sampler, drop_last=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        net.train()
        for batch in loader:
            net.update_teacher(0.9)
            images, labels = PREPARE(batch)
            value = loss(net(images), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    after = evaluate(net, loss, volumes[24:])
    assert after["rotation"] < 0.5 * math.log(10)
    assert after["jigsaw"] < 0.5 * math.log(10)
    assert before["skill"] < 0
    assert after["skill"] > 0.2
    assert after["rank"] >= 4
