# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run need of each other; one process alone needs nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine


def gather(item: Any) -> list[Any]:
    """The item of every process, in order; a point where all wait for each other."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def device_of(engine: Engine) -> torch.device:
    """Device of the engine, CPU where it has none."""
    return getattr(engine.state, "device", None) or torch.device("cpu")
