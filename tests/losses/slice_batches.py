# SPDX-License-Identifier: Apache-2.0
"""Batches of slices: the identities of each item, volume-major, and views one after the other."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

VOLUME = 2**20  # sources of different volumes lie this far apart


def slice_ids(volumes: int | list[int], partitions: int, views: int) -> dict[str, Tensor]:
    """Ids of all items; a volume that is listed twice gives other slices the second time."""
    names = list(range(volumes)) if isinstance(volumes, int) else volumes
    rows = [
        (name * VOLUME + 10 * partition + number, partition, name, view)
        for (number, name), partition, view in product(enumerate(names), range(partitions), range(views))
    ]
    source, partition, volume, view = torch.tensor(rows).unbind(1)
    return {"source": source, "partition": partition, "volume": volume, "view": view}


def batch_a() -> dict[str, Tensor]:
    """2 volumes of 2 partitions in 2 views."""
    ids = slice_ids(2, 2, 2)
    return {**ids, "source": 10 * ids["volume"] + ids["partition"]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
