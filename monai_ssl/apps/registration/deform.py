# SPDX-License-Identifier: Apache-2.0
"""Registration of two images by a trained network (SAM-VoxelMorph)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.utils import eval_mode
from torch import Tensor, nn

from monai_ssl.networks import EmbeddingRegistrationNet, RegistrationUNet

from ..network_maps import total_stride
from ..preprocessing import affine_of, embedding_transform, image_name, load_image
from .inner_step import after_inner_step, on_grid
from .result import Registration

__all__ = ["register_deform"]


def register_deform(
    network: nn.Module,
    moving: Any,
    fixed: Any,
    initial: Registration | None = None,
    *,
    transform: Callable[..., Any] | None = None,
    window: Sequence[float] | None = (-36.05, 38.67),
) -> Registration:
    """Refine a registration by what a network sees in the fixed and the moved image.

    Source: SAM-VoxelMorph (arXiv 2109.11572). The network is shown the moving image where `initial` puts it, both
    padded by their last voxels to a size that it takes; its displacement is composed on the fixed side of `initial`.

    Args:
        network: `EmbeddingRegistrationNet`, or as the baseline a `RegistrationUNet` without features; with
            `integration_steps` above 0. It works on its own device and stays there.
        moving: a file, a folder with a DICOM series, or a MetaTensor (C, *size) as MONAI loads it.
        fixed: likewise.
        initial: of the steps before; None: both images lie in one world.
        transform: of images to the spacing and intensity of the embedder, see `embedding_transform`; None: its default
            for CT.
        window: for a `RegistrationUNet`, the range of the transformed image that becomes [-1, 1]: the same that
            `EmbeddingRegistrationNet` applies by itself. None: `transform` does all.

    Returns:
        Its `report` has the entries of `initial` with `folding_share`, residuals of the matches and `seconds` anew.

    Raises:
        FileNotFoundError: an image that is not there.
        TypeError: another network.
        ValueError: images that cannot be used, or a network that gives a velocity or needs features of its own.
    """
    unet = _checked(network)
    start, n = time.perf_counter(), unet.spatial_dims
    transform = embedding_transform(None, n) if transform is None else transform
    device = next(network.parameters()).device
    target, source = (_prepared(image, transform, n).to(device) for image in (fixed, moving))
    placed = on_grid(initial, affine_of(target), target.shape[1:])
    pair = torch.cat([placed.warp(source).as_tensor(), target.as_tensor()])
    if unet is network and window is not None:
        low, high = window
        pair = ((pair - low) * (2 / (high - low)) - 1).clamp(-1, 1)
    with eval_mode(network):
        field = network(_padded(pair, _multiples(network, unet, pair[:1]))[None])[0]
    return after_inner_step(placed, field, "deform", start)


def _checked(network: nn.Module) -> RegistrationUNet:
    """Its U-Net."""
    unet = network.unet if isinstance(network, EmbeddingRegistrationNet) else network
    if not isinstance(unet, RegistrationUNet):
        raise TypeError(f"network must be EmbeddingRegistrationNet or RegistrationUNet, got {type(network).__name__}")
    if unet is network and unet.feature_channels:
        raise ValueError("network needs features of an embedding: give it as part of an EmbeddingRegistrationNet")
    if not unet.integration_steps:
        raise ValueError(
            "network gives a velocity, as in training: build it with integration_steps=7, the state dict is the same"
        )
    return unet


def _prepared(image: Any, transform: Callable[..., Any], n: int) -> MetaTensor:
    """The network's input, (1, *size) float32."""
    prepared = transform(load_image(image, n))
    if not isinstance(prepared, MetaTensor) or len(prepared) != 1:
        raise ValueError(
            f"transform must give {image_name(image)} as a MetaTensor (1, *size), "
            f"got {type(prepared).__name__} {tuple(prepared.shape)}"
        )
    if not prepared.isfinite().all():
        raise ValueError(f"{image_name(image)} holds NaN or infinite values: repair it")
    return prepared.float()


def _multiples(network: nn.Module, unet: RegistrationUNet, image: Tensor) -> list[int]:
    """Of which the sizes must be multiples, along each axis."""
    if unet is network:
        return [unet.multiple] * unet.spatial_dims
    return [math.lcm(unet.multiple, stride) for stride in total_stride(network.embedder, image)]


def _padded(image: Tensor, multiples: Sequence[int]) -> Tensor:
    """(C, *size) with its last voxels repeated."""
    ends = [n for length, m in zip(image.shape[:0:-1], multiples[::-1]) for n in (0, -length % m)]
    return F.pad(image[None], ends, mode="replicate")[0]
