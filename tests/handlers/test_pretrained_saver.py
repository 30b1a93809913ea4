# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from handler_toys import files, toy_trainer
from ignite.engine import Engine, Events
from torch import nn

from monai_ssl.handlers import PretrainedSaver
from monai_ssl.networks import EncoderFeatures, read_provenance


def save(directory: Path, **kwargs: Any) -> Any:
    """PretrainedSaver of the toy's network."""

    def make(network: Any, evaluator: Any) -> PretrainedSaver:
        encoder = network.student
        return PretrainedSaver(EncoderFeatures(encoder), directory, encoder, network, {"method": "toy"}, **kwargs)

    return make


def test_files_at_the_end(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(save(tmp_path / "models"),))
    trainer.run()
    assert files(tmp_path / "models") == ["encoder.json", "encoder.pt", "model.pt", "pretext.pt"]
    trained = trainer.network.student.state_dict()
    states = {
        name: torch.load(tmp_path / "models" / f"{name}.pt", weights_only=True)
        for name in ("model", "encoder", "pretext")
    }
    assert states["encoder"].keys() == trained.keys()
    assert states["model"].keys() == {f"encoder.{name}" for name in trained}
    assert states["pretext"].keys() == trainer.network.state_dict().keys()
    for name, value in trained.items():
        assert torch.equal(states["encoder"][name], value)
        assert torch.equal(states["model"][f"encoder.{name}"], value)
    assert states["model"]._metadata["encoder.1"] == {"version": 2}  # BatchNorm's, which strict loading looks at


def test_provenance_tells_how_long_it_was_trained(tmp_path: Path) -> None:
    toy_trainer(handlers=(save(tmp_path),)).run()
    provenance = json.loads((tmp_path / "encoder.json").read_text())
    assert {key: provenance[key] for key in ("method", "epochs", "iterations")} == {
        "method": "toy",
        "epochs": 3,
        "iterations": 15,
    }
    assert read_provenance(tmp_path / "encoder.pt") == provenance


def test_a_part_under_another_name(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(save(tmp_path, file="unet_encoder.pt", include=["1."]),))
    trainer.run()
    assert files(tmp_path) == ["model.pt", "pretext.pt", "unet_encoder.json", "unet_encoder.pt"]
    saved = torch.load(tmp_path / "unet_encoder.pt", weights_only=True)
    trained = trainer.network.student.state_dict()
    assert list(saved) == [name for name in trained if name.startswith("1.")] != list(trained)
    assert read_provenance(tmp_path / "unet_encoder.pt")["prefixes"] == ["1."]


def test_an_exception_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"good")
    trainer = toy_trainer(handlers=(save(tmp_path),))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=14), lambda e: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert files(tmp_path) == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"good"


def test_swallowed_exception_with_broken_weights_writes_nothing(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(save(tmp_path),))

    @trainer.on(Events.ITERATION_COMPLETED(once=15))
    def spoil(engine: Engine) -> None:
        engine.network.student[0].weight.data[0, 0] = float("inf")
        raise ZeroDivisionError

    @trainer.on(Events.EXCEPTION_RAISED)
    def swallow(engine: Engine, error: BaseException) -> None:
        if isinstance(error, RuntimeError):
            raise error

    with pytest.raises(RuntimeError, match=r"'encoder\.0\.weight' of 'model' is NaN or infinite"):
        trainer.run()
    assert files(tmp_path) == []


def test_interval(tmp_path: Path) -> None:
    trainer = toy_trainer(handlers=(save(tmp_path, interval=2),))
    seen: list[list[str]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: seen.append(files(tmp_path)))
    trainer.run()
    everything = ["encoder.json", "encoder.pt", "model.pt", "pretext.pt"]
    assert seen == [[], [], everything]


def test_network_alone(tmp_path: Path) -> None:
    trainer = toy_trainer()
    PretrainedSaver(trainer.network, tmp_path).attach(trainer)
    trainer.run()
    assert files(tmp_path) == ["model.pt"]
    assert read_provenance(tmp_path / "model.pt") is None


def test_network_alone_with_provenance(tmp_path: Path) -> None:
    """It travels in the file and does not disturb strict loading."""
    trainer = toy_trainer()
    PretrainedSaver(trainer.network, tmp_path, provenance={"method": "toy"}).attach(trainer)
    trainer.run()
    assert files(tmp_path) == ["model.pt"]
    told = read_provenance(tmp_path / "model.pt")
    assert told is not None
    assert (told["method"], told["epochs"]) == ("toy", trainer.state.epoch)
    trainer.network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


@pytest.mark.parametrize("provenance", [{"rate": torch.ones(1)}, {"data": "/home/user/scan.nii.gz"}])
def test_provenance_is_checked_before_training(provenance: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="provenance"):
        PretrainedSaver(nn.Linear(1, 1), "somewhere", provenance=provenance)
