# SPDX-License-Identifier: Apache-2.0
"""From the weights of a bundle to what registers images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_ssl.networks import EmbeddingRegistrationNet, RegistrationUNet, load_pretrained
from monai_ssl.networks.rebuild import rebuild_network
from monai_ssl.networks.state_file import read_state_dict

from ..model_file import known_origin, load_matcher, matcher_around, recognised, weights_file
from ..point_matcher import PointMatcher

__all__ = ["load_registration"]

_EMBEDDER, _UNET = "embedder.", "unet."
_INTEGRATION_STEPS = 7


def load_registration(
    model: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: str | Path | None = None,
    **matcher_options: Any,
) -> tuple[PointMatcher, EmbeddingRegistrationNet | None]:
    """The matcher and, if there is one, the registration network that a file of weights holds.

    Args:
        model: a bundle, then its `models/model.pt`, or a file of weights: of an `EmbeddingRegistrationNet` (bundle
            samreg_unet_ct), whose sizes are read off the weights unless its provenance describes it, and whose embedder
            is the matcher's network; or of an embedding network alone, see :func:`load_matcher`.
        preprocessing: see :func:`load_matcher`.
        provenance: see :func:`load_matcher`.
        matcher_options: of :class:`PointMatcher`, but for `network` and `transform`.

    Returns:
        the matcher, and the network on the matcher's device, which gives displacements; None for an embedding alone.

    Raises:
        OSError: there is no such file.
        ValueError: the file holds no network of this kind, or its provenance cannot be used.
    """
    file = weights_file(model)
    shapes = _shapes(file)
    if {"flow.weight", "down.0.conv.weight"} <= set(shapes):
        raise ValueError(
            f"{file} holds a RegistrationUNet without an embedding (voxelmorph.yaml): give model.pt of train.yaml of "
            "bundle samreg_unet_ct, or of a SAM bundle"
        )
    if not any(name.startswith(_EMBEDDER) for name in shapes):
        return load_matcher(file, preprocessing, provenance, **matcher_options), None
    origin = known_origin(file, provenance)
    network = _network(file, shapes, origin)
    load_pretrained(network, file)
    matcher = matcher_around(network.embedder, origin, preprocessing, **matcher_options)
    return matcher, network.to(matcher.device).eval()


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    state = read_state_dict(file)
    return {name.removeprefix("module."): tuple(t.shape) for name, t in state.items() if hasattr(t, "shape")}


def _network(file: Path, shapes: Mapping[str, tuple[int, ...]], origin: Mapping[str, Any]) -> EmbeddingRegistrationNet:
    """Of the sizes of the file, untrained."""
    description = origin.get("network")
    if isinstance(description, Mapping) and {"embedder", "unet"} <= set(description):
        built = rebuild_network(description)
        if not isinstance(built, EmbeddingRegistrationNet):
            raise ValueError(f"the provenance of {file} describes {type(built).__name__}, not EmbeddingRegistrationNet")
        built.unet.integration_steps = built.unet.integration_steps or _INTEGRATION_STEPS  # 0 in training
        return built
    embedder = recognised(file, _part(shapes, _EMBEDDER))
    unet, radius = _unet(file, _part(shapes, _UNET))
    return EmbeddingRegistrationNet(embedder, unet, radius=radius)


def _part(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unet(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[RegistrationUNet, int]:
    """The U-Net of these weights, and the radius of the correlation that it takes."""
    down, up, full = (_convolutions(shapes, part) for part in ("down", "up", "full"))
    if not down or len(up) != len(down):
        raise ValueError(f"{file} holds an embedding, but its other keys are not those of a U-Net: {list(shapes)[:2]}")
    spatial_dims, channels = len(down[0]) - 2, [shape[0] for shape in down]
    added = [shape[1] - before for shape, before in zip(down, [2, *channels])]  # by the features, beside the images
    features = max(added)
    radius = next((r for r in range(10) if (2 * r + 1) ** spatial_dims == features), None)
    if radius is None or sum(map(bool, added)) != 1:
        raise ValueError(
            f"{file}: the U-Net takes {added} features besides those of its levels, expected (2 radius + 1)^"
            f"{spatial_dims} correlations at one level"
        )
    up_channels = [shape[0] for shape in [*up, *full]]
    unet = RegistrationUNet(spatial_dims, 2, features, added.index(features), channels, up_channels, _INTEGRATION_STEPS)
    return unet, radius


def _convolutions(shapes: Mapping[str, tuple[int, ...]], part: str) -> list[tuple[int, ...]]:
    """Shapes of the weights of a list of convolutions."""
    names = [name for name in shapes if name.startswith(f"{part}.") and name.endswith(".conv.weight")]
    return [shapes[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))]
