# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handler_toys import files
from ignite.engine import Engine, Events
from matplotlib.image import imread
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from torch import Tensor, nn

from monai_ssl.handlers import PrepareBatchTensor, RegistrationPreview, registration_preview

SIZE = (8, 10, 6)
AFFINE = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))


class Flow(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.new_zeros(len(image), image.ndim - 2, *image.shape[2:])


class Postprocessing:
    """What `RegisteredPaird` leaves: a stretch by 1.5 along the second axis, and values that tell the item."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        assert item["pred"].shape == (3, *SIZE)
        ddf = torch.zeros(3, *SIZE)
        ddf[1] = 0.5 * torch.arange(SIZE[1])[:, None]
        return {**item, "ddf": ddf, "moved": MetaTensor(item["image"][:1] + 0.25)}


def evaluator(number: int, handler: RegistrationPreview | None = None, **options: Any) -> SupervisedEvaluator:
    items = []
    for k in range(number):
        image = torch.stack([torch.full(SIZE, 0.1 * k), torch.full(SIZE, 0.1 * k + 0.5)])
        fixed = MetaTensor(image[1:].clone(), affine=AFFINE)
        items.append({"image": MetaTensor(image), "fixed": fixed, "name": f"pair{k}"})
    loader = DataLoader(Dataset(items), batch_size=2)
    return SupervisedEvaluator(
        torch.device("cpu"),
        loader,
        Flow(),
        prepare_batch=PrepareBatchTensor(label_key="fixed"),
        postprocessing=Postprocessing() if options.get("decollate", True) else None,
        val_handlers=[] if handler is None else [handler],
        **options,
    )


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed, moving before and after, the Jacobian and the affine of each of the first items, over batches of two."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(registration_preview, "plot_registration", lambda *arguments: calls.append(arguments))
    evaluator(5, RegistrationPreview(tmp_path)).run()
    assert [Path(call[5]).name for call in calls] == [f"registration_0001_{n}.png" for n in (1, 2, 3)]
    for k, (fixed, before, after, determinant, title, file) in enumerate(calls):
        assert title == f"pair{k}"
        assert file.parent == tmp_path
        torch.testing.assert_close(fixed.affine, AFFINE)
        for image, value in ((fixed, 0.1 * k + 0.5), (before, 0.1 * k), (after, 0.1 * k + 0.25), (determinant, 1.5)):
            assert image.shape == (1, *SIZE)
            np.testing.assert_allclose(torch.as_tensor(image).numpy(), value, atol=1e-6)


def test_pictures_in_a_training(tmp_path: Path) -> None:
    """Named by the trainer's epoch; every second evaluation; again from the first item."""
    trainer = Engine(lambda e, b: None)
    handler = RegistrationPreview(tmp_path / "pictures", max_items=1, interval=2)
    ValidationHandler(1, evaluator(2, handler)).attach(trainer)
    trainer.run([0], max_epochs=4)
    assert files(tmp_path / "pictures") == ["registration_0001_1.png", "registration_0003_1.png"]
    assert imread(tmp_path / "pictures" / "registration_0003_1.png").std() > 0.05


def test_without_the_fixed_image_and_names(tmp_path: Path) -> None:
    run = evaluator(1, RegistrationPreview(tmp_path))
    run.data_loader = DataLoader(Dataset([{"image": torch.rand(2, *SIZE)}]), batch_size=1)
    run.prepare_batch = PrepareBatchTensor()
    run.run()
    assert files(tmp_path) == ["registration_0001_1.png"]


def test_only_the_first_process_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration_preview, "rank", lambda: 1)
    handler = RegistrationPreview(tmp_path / "pictures")
    run = evaluator(1, handler)
    assert not run.has_event_handler(handler, Events.ITERATION_COMPLETED)
    run.run()
    assert not (tmp_path / "pictures").exists()


def test_faults(tmp_path: Path) -> None:
    for options in ({"max_items": 0}, {"interval": 0}):
        with pytest.raises(ValueError, match="`interval` and `max_items` must be at least 1"):
            RegistrationPreview(tmp_path, **options)
    with pytest.raises(ValueError, match="give it decollate=True"):
        evaluator(1, RegistrationPreview(tmp_path), decollate=False).run()
