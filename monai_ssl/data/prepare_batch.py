# SPDX-License-Identifier: Apache-2.0
"""From a collated batch to plain tensors on the device, and to a batch of slices with their identities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import PrepareBatch

__all__ = ["PrepareSliceBatch", "plain_tensor"]

VOLUME_STEP = 2**20  # more than any volume has slices


def plain_tensor(
    batchdata: Mapping[str, Any],
    key: str,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """The tensor of a batch under a key, without meta data, on the device; further arguments are those of ``to``.

    Raises:
        KeyError: the key is absent.
        TypeError: its value is no tensor.
    """
    if key not in batchdata:
        raise KeyError(f"'{key}' is not in the batch, which has {sorted(batchdata)}.")
    value = batchdata[key]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"batch['{key}'] must be a tensor, got {type(value).__name__}.")
    value = value.as_tensor() if isinstance(value, MetaTensor) else value
    return value.to(device=device, non_blocking=non_blocking, **kwargs)


class PrepareSliceBatch(PrepareBatch):
    """Hand all views of all slices to the engine as one batch, and their identities as the loss function's target.

    Source: batches of arXiv 2006.10511, from `RandPartitionSlicesd` (`RandPartitionCropsd` for 3D crops), ``SplitDimd``
    and `RandViewsd`. The trainer takes them with ``loss_function: "$lambda z, ids: @loss(z, **ids)"``.

    Args:
        image_key: key of the slices, (N, V, C, *plane), or (N, C, *plane) for one view.
        spatial_dims: axes of the plane: 2 for slices, 3 for crops.

    Returns of a call:
        Images (N * V, C, *plane), the views of one slice side by side, and a dictionary of (N * V,) int64: `source`,
        the identity of the slice (volume * 2^20 + slice_index), `partition`, `volume` and `view`, 0 to V - 1.
    """

    def __init__(self, image_key: str = "image", spatial_dims: int = 2) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        self.image_key, self.spatial_dims = image_key, spatial_dims

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Raises ``KeyError`` when a key is absent, ``TypeError`` when a value is no tensor, ``ValueError`` when
        shapes do not fit."""
        image = plain_tensor(batchdata, self.image_key, device, non_blocking, **kwargs)
        if image.ndim not in (2 + self.spatial_dims, 3 + self.spatial_dims):
            raise ValueError(
                f"'{self.image_key}' {tuple(image.shape)} must be (N, V, C, *plane) or (N, C, *plane) with "
                f"{self.spatial_dims} axes of the plane (spatial_dims)"
            )
        image = image if image.ndim == 3 + self.spatial_dims else image[:, None]
        num, views = image.shape[:2]
        ids = {}
        for key in ("partition", "volume", "slice_index"):
            numbers = plain_tensor(batchdata, key, device, non_blocking)
            if numbers.numel() != num or numbers.is_floating_point():
                raise ValueError(
                    f"'{key}' {tuple(numbers.shape)} of {numbers.dtype} must be ({num},) integers, one for each slice "
                    f"of '{self.image_key}' {tuple(batchdata[self.image_key].shape)}"
                )
            ids[key] = numbers.reshape(num, 1).long().expand(-1, views).flatten()  # (N,) -> (N V,)
        target = {
            "source": ids["volume"] * VOLUME_STEP + ids["slice_index"],
            "partition": ids["partition"],
            "volume": ids["volume"],
            "view": torch.arange(views, device=image.device).expand(num, -1).flatten(),
        }
        return image.flatten(0, 1), target  # (N, V, C, *plane) -> (N V, C, *plane)
