# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_ssl.apps import load_registration
from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    EmbeddingRegistrationNet,
    RegistrationUNet,
    make_provenance,
    save_pretrained,
)

SMALL: dict[str, Any] = {"channels": (3, 4), "up_channels": (4, 5, 6)}


def embedder(spatial_dims: int = 3, **options: Any) -> AnatomicalEmbeddingNet:
    encoder = AnisotropicResNet(spatial_dims, base_channels=4)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, spatial_dims, embed_dim=5, **options)


def network(spatial_dims: int = 3, radius: int = 1, **options: Any) -> EmbeddingRegistrationNet:
    """As in training: it gives velocities."""
    torch.manual_seed(0)
    unet = RegistrationUNet(
        spatial_dims, 2, (2 * radius + 1) ** spatial_dims, **{**SMALL, **options}, integration_steps=0
    )
    nn.init.normal_(unet.flow.weight, std=0.1)
    return EmbeddingRegistrationNet(embedder(spatial_dims), unet, radius=radius)


def saved(net: nn.Module, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    return file


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spatial_dims": 2},
        {"radius": 2},
        {"channels": (3, 4, 5), "up_channels": (6, 5, 4)},
        {"channels": (8, 2), "up_channels": (2, 5, 6, 7)},
    ],
    ids=str,
)
def test_networks_are_recognised_by_their_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    net = network(**options)
    matcher, found = load_registration(saved(net, tmp_path / "bundle" / "models" / "model.pt").parents[1], device="cpu")
    assert found is not None
    assert matcher.network is found.embedder
    assert matcher.spatial_dims == found.spatial_dims == options.get("spatial_dims", 3)
    assert found.radius == options.get("radius", 1)
    assert not found.training
    assert found.unet.integration_steps == 7
    image = torch.randn(1, 2, *(16, 48, 32)[3 - found.spatial_dims :]) * 50
    net.unet.integration_steps = 7
    with torch.no_grad():
        assert torch.equal(found(image), net.eval()(image))


def test_preprocessing_of_the_provenance_and_options_of_the_matcher(tmp_path: Path) -> None:
    file = saved(network(), tmp_path / "model.pt")
    scaling = {"intensity": [-1000, 1000], "scaled": [0, 1]}
    (tmp_path / "encoder.json").write_text(json.dumps({"preprocessing": {"spacing": 3.0, **scaling}}))
    matcher, _ = load_registration(file, device="cpu", chunk_size=7)
    assert matcher.chunk_size == 7
    assert matcher.body_threshold == pytest.approx(0.25)  # -500 HU
    assert matcher.transform.transforms[1].pixdim.tolist() == [3, 3, 3]
    (tmp_path / "other.json").write_text(json.dumps({"preprocessing": {"spacing": 4.0}}))
    matcher, _ = load_registration(file, {"percentiles": [1, 99]}, tmp_path / "other.json", device="cpu")
    assert matcher.transform.transforms[1].pixdim.tolist() == [4, 4, 4]
    assert matcher.body_threshold is None


def test_an_embedding_alone(tmp_path: Path) -> None:
    net = embedder()
    matcher, found = load_registration(saved(net, tmp_path / "model.pt"), {"spacing": 5}, device="cpu")
    assert found is None
    assert matcher.transform.transforms[1].pixdim.tolist() == [5, 5, 5]
    for name, value in matcher.network.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_a_described_network_is_rebuilt(tmp_path: Path) -> None:
    """Its window, which the weights do not tell, is kept; a velocity is integrated."""
    backbone = {"_target_": "AnisotropicResNet", "base_channels": 4}
    inner = {"_target_": "AnatomicalEmbeddingNet", "encoder": backbone, "channels": [4, 8, 16, 32], "embed_dim": 5}
    unet = {"_target_": "RegistrationUNet", "feature_channels": 27, "integration_steps": 0}
    unet |= {"channels": [3, 4], "up_channels": [4, 5, 6]}
    described = {"_target_": "EmbeddingRegistrationNet", "embedder": inner, "unet": unet, "window": [-10.0, 10.0]}
    net = network()
    origin = make_provenance("SAM-VoxelMorph", "2109.11572", described, {"spacing": 4.0})
    save_pretrained(net, tmp_path / "model.pt", origin)
    matcher, found = load_registration(tmp_path / "model.pt", device="cpu")
    assert found is not None
    assert found.window == (-10, 10)
    assert found.unet.integration_steps == 7
    assert torch.equal(found.unet.flow.weight, net.unet.flow.weight)
    assert matcher.transform.transforms[1].pixdim.tolist() == [4, 4, 4]
    described["_target_"] = "AnatomicalEmbeddingNet"
    save_pretrained(net, tmp_path / "wrong.pt", origin | {"network": described})
    with pytest.raises(ValueError, match="AnatomicalEmbeddingNet cannot be built as described"):
        load_registration(tmp_path / "wrong.pt")


class Broken(nn.Module):
    """A file with an embedder and something else."""

    def __init__(self, other: nn.Module, name: str = "unet") -> None:
        super().__init__()
        self.embedder = embedder()
        self.add_module(name, other)

    def forward(self, image: Tensor) -> Tensor:
        raise NotImplementedError


def test_faults(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"holds no models/model.pt: train the bundle first"):
        load_registration(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_registration(tmp_path / "none.pt")
    saved(nn.Conv3d(1, 2, 3), file)
    with pytest.raises(ValueError, match="holds no network that can be recognised: its keys begin with"):
        load_registration(file)
    saved(RegistrationUNet(**SMALL), file)
    with pytest.raises(ValueError, match="holds a RegistrationUNet without an embedding"):
        load_registration(file)
    saved(Broken(nn.Conv3d(1, 2, 3)), file)
    with pytest.raises(ValueError, match=r"its other keys are not those of a U-Net: \['weight', 'bias'\]"):
        load_registration(file)
    saved(Broken(RegistrationUNet(feature_channels=7, **SMALL)), file)
    with pytest.raises(ValueError, match=r"the U-Net takes \[0, 7\] features besides those of its levels"):
        load_registration(file)
    saved(Broken(RegistrationUNet(**SMALL)), file)
    with pytest.raises(ValueError, match=r"takes \[0, 0\] features"):
        load_registration(file)
    net = network()
    state = net.state_dict()
    del state["unet.flow.bias"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"the file does not fit"):
        load_registration(file)
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, file)
    _, found = load_registration(file, device="cpu")
    assert found is not None
    assert torch.equal(found.unet.flow.weight, net.unet.flow.weight)
