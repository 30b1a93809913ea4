# SPDX-License-Identifier: Apache-2.0
"""Losses are computed in float32 or better, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def no_autocast(like: Tensor) -> torch.autocast:
    """A context in which operations on the device of `like` keep their dtype."""
    return torch.autocast(device_type=like.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Rows divided by their length, or by eps where that is larger, so that a zero row stays zero."""
    return F.normalize(full_precision(x), dim=-1, eps=eps)
