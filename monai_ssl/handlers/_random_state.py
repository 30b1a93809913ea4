# SPDX-License-Identifier: Apache-2.0
"""Random states of this process in a form that ``torch.load(weights_only=True)`` accepts."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def get_random_state(device: torch.device) -> dict[str, Any]:
    """States of torch (CPU, and the device if it is a GPU), numpy and python."""
    _, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of ``get_random_state``."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
