# SPDX-License-Identifier: Apache-2.0
"""From the weights of a bundle to a matcher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    load_mmdet_checkpoint,
    load_pretrained,
    read_provenance,
)
from monai_ssl.networks.rebuild import rebuild_network
from monai_ssl.networks.state_file import read_state_dict

from .point_matcher import PointMatcher
from .preprocessing import embedding_transform

__all__ = ["load_matcher"]

_TAIL = "local_head.smooth.weight"


def load_matcher(
    model: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: str | Path | None = None,
    **options: Any,
) -> PointMatcher:
    """A matcher with the network and the preprocessing that belong to a file of weights.

    Args:
        model: a bundle, then its `models/model.pt`, or a file: `model.pt` or `pretext.pt` of a bundle, or the weights
            that the authors of SAM (arXiv 2012.02383) and UAE released. A network around an `AnisotropicResNet` is
            recognised by its weights; another one by the entry `network` of the provenance.
        preprocessing: entries of :func:`embedding_transform` that differ from the provenance, such as `spacing`.
        provenance: JSON file; None: what lies in `model`, or in `encoder.json` beside it, if that is there.
        options: of :class:`PointMatcher`, but for `network` and `transform`.

    Raises:
        OSError: there is no such file.
        ValueError: the file holds no network of this kind, or its provenance cannot be used.
    """
    file = weights_file(model)
    origin = known_origin(file, provenance)
    return matcher_around(_network(file, origin), origin, preprocessing, **options)


def matcher_around(
    network: nn.Module, origin: Mapping[str, Any], preprocessing: Mapping[str, Any] | None = None, **options: Any
) -> PointMatcher:
    """A matcher with the preprocessing of a provenance, see :func:`load_matcher`."""
    found = {**origin.get("preprocessing", {}), **(preprocessing or {})}
    rank = getattr(network, "spatial_dims", 3)
    matcher = PointMatcher(network, embedding_transform(found, rank), **options)
    if not found.get("percentiles") and options.get("body_threshold") is None:
        low, high = found.get("intensity") or (-1024.0, 3071.0)
        least, most = found.get("scaled") or (-50.0, 205.0)
        matcher.body_threshold = least + (-500.0 - low) / (high - low) * (most - least)  # HU of fat, not of lung
    return matcher


def weights_file(model: str | Path) -> Path:
    """The file of weights of a bundle, or the file itself."""
    model = Path(model)
    if not model.is_dir():
        return model
    for file in (model / "models" / "model.pt", model / "model.pt"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{model} holds no models/model.pt: train the bundle first, or name the file of weights")


def known_origin(file: Path, given: str | Path | None) -> dict[str, Any]:
    """What is known of the weights; an empty dictionary if nothing is."""
    beside = file.with_name("encoder.json")
    if given is None:
        inside = read_provenance(file)
        if inside is not None or not beside.is_file():
            return inside or {}
    place = beside if given is None else Path(given)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is no JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold a provenance, a dictionary, got {type(content).__name__}")
    return content


def _network(file: Path, origin: Mapping[str, Any]) -> nn.Module:
    state = read_state_dict(file)
    shapes = {name.removeprefix("module."): tuple(t.shape) for name, t in state.items() if hasattr(t, "shape")}
    if any(name.startswith("backbone.conv1.conv") for name in shapes):  # names of mmdet
        network = _around(AnisotropicResNet(), semantic=any(name.startswith("semantic_head.") for name in shapes))
        try:
            load_mmdet_checkpoint(file, network)
        except KeyError as error:
            raise ValueError(f"{file} does not fit the released network: {error.args[0]}") from error
        return network
    description = origin.get("network")
    described = isinstance(description, Mapping) and "encoder" in description
    built = rebuild_network(description) if described else recognised(file, shapes)  # type: ignore[arg-type]
    load_pretrained(built, file)
    return built


def recognised(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> AnatomicalEmbeddingNet:
    """The network around an `AnisotropicResNet` that has weights of these names and shapes."""
    smooth, stem = shapes.get(_TAIL), shapes.get("encoder.conv1.weight")
    if smooth is None or stem is None:
        raise ValueError(
            f"{file} holds no network that can be recognised: its keys begin with {list(shapes)[:2]}. Give model.pt of "
            "a SAM bundle, or a provenance whose entry network describes an AnatomicalEmbeddingNet with its encoder"
        )
    blocks = [
        len({name.split(".")[2] for name in shapes if name.startswith(f"encoder.layer{k}.")}) for k in range(1, 5)
    ]
    encoder = AnisotropicResNet(len(stem) - 2, stem[1], stem[0], blocks)
    widths = encoder.channels
    local = [shape[1] for name, shape in shapes.items() if name.startswith("local_head.lateral") and len(shape) > 1]
    coarse = shapes.get("global_head.lateral.0.weight", (0, 0))[1]
    if not set(local + [coarse]) <= set(widths):
        raise ValueError(f"{file}: heads for maps of {local} and {coarse} channels do not fit an encoder with {widths}")
    levels = [widths.index(width) for width in local]
    semantic = any(name.startswith("semantic_head.") for name in shapes)
    return _around(encoder, smooth[0], levels, widths.index(coarse), semantic)


def _around(
    encoder: AnisotropicResNet,
    embed_dim: int = 128,
    local_levels: list[int] | None = None,
    global_level: int = -1,
    semantic: bool = False,
) -> AnatomicalEmbeddingNet:
    levels = [0, 1, 2] if local_levels is None else local_levels
    return AnatomicalEmbeddingNet(
        encoder, encoder.channels, encoder.spatial_dims, embed_dim, levels, global_level, semantic
    )
