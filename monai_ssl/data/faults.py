# SPDX-License-Identifier: Apache-2.0
"""Why a volume cannot be trained on, judged from its facts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from monai.utils import ensure_tuple_rep

from monai_ssl.data.facts import Facts


def image_fault(
    facts: Facts,
    pixdim: Any = None,
    min_size: Any = None,
    spatial_dims: int = 3,
    axcodes: str | None = "RAS",
    in_channels: int | None = None,
) -> str | None:
    """Why an image cannot be trained on, from its `volume_facts`; None if it can."""
    if "error" in facts:
        return f"cannot be read ({facts['error']})"
    shape = facts["shape"]
    if not all(shape):
        return "empty: no voxels"
    if len(shape) > 4:
        return f"{len(shape) - 1} axes besides the channel: {tuple(shape[1:])}"
    if spatial_dims == 2 and len(shape) == 4:
        return f"3D: {_times(shape[1:])} voxels, but spatial_dims is 2"
    if len(shape) < spatial_dims + 1 or min(shape[1:]) < 2:
        return f"{spatial_dims - 1}D only: {_times(shape[1:])} voxels"
    if in_channels is not None and shape[0] != in_channels:
        return f"{shape[0]} channels, where in_channels is {in_channels}"
    if facts["nonfinite"]:
        return f"{facts['nonfinite']} of {np.prod(shape)} voxels are NaN or infinite"
    if facts["constant"]:
        return "constant: all voxels have the same value"
    affine = np.asarray(facts["affine"])
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        return "the affine is singular or not finite"
    return None if min_size is None else _size_fault(shape, affine, pixdim, min_size, axcodes)


def _size_fault(shape: list[int], affine: np.ndarray, pixdim: Any, min_size: Any, axcodes: str | None) -> str | None:
    # MONAI's own lazy transforms tell the size that training will see; nothing is resampled
    volume: Any = MetaTensor(torch.zeros(1).expand(1, *shape[1:]), affine=torch.as_tensor(affine))
    axes = len(shape) - 1
    turned = axes == 3 and axcodes is not None
    if turned:
        volume = Orientation(axcodes, labels=None, lazy=True)(volume)
    if pixdim is not None:
        volume = Spacing(ensure_tuple_rep(pixdim, axes), lazy=True)(volume)
    size = [int(voxels) for voxels in volume.peek_pending_shape()]
    needed = ensure_tuple_rep(min_size, axes)
    if all(have >= need for have, need in zip(size, needed)):
        return None
    at = "" if pixdim is None else f" at {_times(ensure_tuple_rep(pixdim, axes))} mm"
    return (
        f"too small: {_times(size)} voxels{at}{f' ({axcodes})' if turned else ''}, {_times(needed)} needed: "
        "lower roi_size, num_partitions or pixdim, or pad with SpatialPadd"
    )


def label_fault(label: Facts, image: Facts | None = None, num_classes: int | None = None) -> str | None:
    """Why a label does not belong on its image, from the `volume_facts` of both; None if it does."""
    if "error" in label:
        return f"cannot be read ({label['error']})"
    if not all(label["shape"]):
        return "empty: no voxels"
    if label["nonfinite"]:
        return f"{label['nonfinite']} voxels are NaN or infinite"
    low, high = label["range"]
    if num_classes is not None and not 0 <= low <= high < num_classes:
        return f"values from {low:g} to {high:g}, where num_classes {num_classes} allows 0 to {num_classes - 1}"
    if image is None or len(image.get("shape", ())) not in (3, 4):
        return None  # nothing to compare with: the fault is the image's
    size = np.array(image["shape"][1:])
    if label["shape"][1:] != image["shape"][1:]:
        return f"label of {_times(label['shape'][1:])} voxels on an image of {_times(size)}"
    if len(size) == 2:
        return None  # pictures have no place in space
    corners = np.stack([*np.meshgrid(*[(0, n - 1) for n in size]), np.ones((2, 2, 2))]).reshape(4, 8)
    difference = (np.asarray(label["affine"]) - np.asarray(image["affine"])) @ corners
    distance = np.linalg.norm(difference[:3], axis=0).max()
    spacing = np.linalg.norm(np.asarray(image["affine"])[:3, :3], axis=0).min()
    if distance <= spacing / 2:
        return None
    return f"label lies up to {distance:.1f} mm off its image: their affines differ"


def _times(size: Any) -> str:
    return " x ".join(f"{value:g}" for value in size)
