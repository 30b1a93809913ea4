# SPDX-License-Identifier: Apache-2.0
"""Images and maps at the places that a field leads to.

Normalised coordinates run from -1 at the centre of the first voxel of an axis to 1 at that of the last one; components
stand in array order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.transforms.normalised_fields import identity_field, sample_field

from ._precision import full_precision

_LINEAR = {2: "bilinear", 3: "trilinear"}


def normalised(field: Tensor) -> Tensor:
    """A displacement (B, n, *size) in voxels as one in normalised coordinates."""
    return _scaled(field, [2 / max(size - 1, 1) for size in field.shape[2:]])


def places_in_moving(displacement: Tensor, initial: Tensor | None = None) -> Tensor:
    """Where each voxel of the fixed image lies in the moving one, normalised.

    Args:
        displacement: in voxels of the fixed image, (B, n, *size); it is applied first.
        initial: the pre-alignment less the identity, normalised, (B, n, *nodes); None: the identity.
    """
    step = normalised(displacement)
    inner = identity_field(step.shape[2:], step) + step
    return inner if initial is None else inner + sample(initial, inner)


def sample(values: Tensor, places: Tensor, align_corners: bool = True) -> Tensor:
    """Values (B, C, *size) at normalised places (B, n, *out) in full precision; the border continues outwards."""
    return sample_field(full_precision(values).to(places.dtype), places, align_corners=align_corners)


def warped_map(values: Tensor, places: Tensor, cells: Sequence[int], moving_size: Sequence[int]) -> Tensor:
    """A map of the moving image at the centres of the cells of a map of the fixed one; maps fill their images.

    Args:
        values: (B, C, *map).
        places: of :func:`places_in_moving`, (B, n, *size).
        cells: size of the fixed image's map.
        moving_size: voxels of the moving image.
    """
    places = F.interpolate(places, size=tuple(cells), mode=_LINEAR[len(cells)], align_corners=False)
    borders = _scaled(places, [(size - 1) / size for size in moving_size])  # 1 is the border of the last voxel
    return sample(values, borders, align_corners=False)


def _scaled(field: Tensor, factors: Sequence[float]) -> Tensor:
    """Axis by axis, without copying the factors to the device."""
    return torch.stack([component * factor for component, factor in zip(field.unbind(1), factors)], 1)
