# SPDX-License-Identifier: Apache-2.0
"""Images that carry their own answer, and the plain way to cut them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# anisotropic, rotated and shifted
AFFINE = torch.tensor([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)


def index_image(spatial: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    """Image whose voxel value is its index in the flattened volume, different in every channel."""
    return torch.arange(channels * int(np.prod(spatial)), dtype=torch.float32).reshape(channels, *spatial)


def crop(img: torch.Tensor, start: Any, size: Any) -> torch.Tensor:
    return img[(slice(None), *(slice(int(o), int(o) + s) for o, s in zip(start, size)))]


def crops(img: torch.Tensor, starts: Any, size: Any) -> torch.Tensor:
    return torch.stack([crop(img, start, size) for start in starts])


def drawn_starts(state: np.random.RandomState, lowest: torch.Tensor, jitter: tuple[int, ...]) -> list[list[int]]:
    """The starts as plain loops over patches and axes draw them."""
    return [[low + int(state.randint(0, j + 1)) for low, j in zip(row, jitter)] for row in lowest.tolist()]
