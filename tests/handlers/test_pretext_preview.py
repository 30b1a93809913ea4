# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handler_toys import files
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_ssl.handlers import PretextPreview
from monai_ssl.visualize import Panel

BATCH = {
    "image": torch.arange(3 * 5 * 6.0).reshape(3, 1, 5, 6),
    "label": np.array([4, 5, 6]),
    "name": ["a.nii.gz", "b.nii.gz", "c.nii.gz"],
    "constant": 7,
}


class Panels:
    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def __call__(self, batch: dict[str, Any]) -> list[Panel]:
        self.batches.append(batch)
        return [Panel(image, f"label {label}") for image, label in zip(batch["image"], batch["label"])]


def preview(handler: PretextPreview, epochs: int = 1) -> Engine:
    engine = Engine(lambda e, b: None)
    handler.attach(engine)
    engine.run([BATCH, BATCH], max_epochs=epochs)
    return engine


def test_first_items_of_the_batch(tmp_path: Path) -> None:
    panels = Panels()
    preview(PretextPreview(panels, tmp_path, max_items=2))
    (batch,) = panels.batches  # one of the two batches of the epoch
    assert torch.equal(batch["image"], BATCH["image"][:2])
    assert batch["label"].tolist() == [4, 5]
    assert batch["name"] == ["a.nii.gz", "b.nii.gz"]
    assert batch["constant"] == 7


@pytest.mark.parametrize("interval, epochs", [(1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])])
def test_interval(tmp_path: Path, interval: int, epochs: list[int]) -> None:
    preview(PretextPreview(Panels(), tmp_path / "pictures", interval), epochs=4)
    assert files(tmp_path / "pictures") == [f"preview_epoch={epoch:04d}.png" for epoch in epochs]
    assert (tmp_path / "pictures" / "preview_epoch=0001.png").read_bytes()[:4] == b"\x89PNG"


def test_drawn_before_the_network_sees_it(tmp_path: Path) -> None:
    order: list[str] = []
    engine = Engine(lambda e, b: order.append("step"))
    PretextPreview(lambda batch: order.append("draw") or [Panel(batch["image"][0])], tmp_path).attach(engine)
    engine.run([BATCH, BATCH])
    assert order == ["draw", "step", "step"]


def test_tensorboard_image(tmp_path: Path) -> None:
    preview(PretextPreview(Panels(), tmp_path / "pictures", log_dir=tmp_path / "log"), epochs=2)
    events = EventAccumulator(str(tmp_path / "log" / "preview")).Reload()
    images = events.Images("pretext_preview")
    assert [image.step for image in images] == [1, 2]
    assert images[0].width > images[0].height > 100


def test_resumed_inside_an_epoch_draws_what_is_left(tmp_path: Path) -> None:
    engine = Engine(lambda e, b: None)
    PretextPreview(Panels(), tmp_path, interval=2).attach(engine)
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "iteration", 3))
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", 1))
    engine.run([BATCH, BATCH], max_epochs=3)
    assert files(tmp_path) == ["preview_epoch=0003.png"]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PretextPreview(Panels(), tmp_path, interval=0)
