# SPDX-License-Identifier: Apache-2.0
"""Which slices of a batch attract and which repel (arXiv 2006.10511)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MODES", "slice_pairs"]

MODES = ("GR", "GD-", "GD")
_NEEDED = {"GR": (), "GD-": ("partition",), "GD": ("partition", "volume")}


def slice_pairs(
    mode: str, source: Tensor, partition: Tensor | None = None, volume: Tensor | None = None, view: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each item of a batch of slices, for the three global strategies.

    Source: G^R, G^D- and G^D of arXiv 2006.10511. Released code (`krishnabits001/domain_specific_cl`): G^D pairs go
    round a circle of partners, which may be the item's own volume; here all other volumes are partners.

    - "GR": other views of the same slice against views of all other slices.
    - "GD-": other views of the same slice against the other partitions, of the own volume too.
    - "GD": as "GD-", and the same view of the same partition of other volumes is a positive too.

    In the last two, items of the same partition that are no positives are neither.

    Args:
        mode: "GR", "GD-" or "GD".
        source: identity of the slice, (N,) integers.
        partition: number of its partition, (N,); for "GD-" and "GD".
        volume: identity of its scan, (N,); for "GD".
        view: number of the view, (N,); None: "GD" pairs all views of different volumes.

    Returns:
        positives and negatives, each (N, N) bool, True at [i, j] where j is one of anchor i.

    Raises:
        ValueError: unknown mode, an id that the mode needs is None, ids of different lengths or no integers.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    ids = {"source": source, "partition": partition, "volume": volume, "view": view}
    lacking = [name for name in _NEEDED[mode] if ids[name] is None]
    if lacking:
        raise ValueError(f"mode {mode!r} needs {' and '.join(lacking)}")
    _check_ids(ids)
    other = ~torch.eye(len(source), dtype=torch.bool, device=source.device)
    positives = _equal(source) & other
    if mode == "GR" or partition is None:
        return positives, ~_equal(source)
    together = _equal(partition)
    if mode == "GD" and volume is not None:
        partners = together & ~_equal(volume)
        positives = positives | (partners if view is None else partners & _equal(view))
    return positives, ~together


def _equal(ids: Tensor) -> Tensor:
    return ids[:, None] == ids[None]


def _check_ids(ids: dict[str, Tensor | None]) -> None:
    given = {name: x for name, x in ids.items() if x is not None}
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"ids must be (N,), all of one length, got {shapes}")
    floats = [name for name, x in given.items() if x.is_floating_point() or x.is_complex()]
    if floats:  # float32 cannot tell the identities of neighbouring slices apart
        raise ValueError(f"ids must be integers, got {', '.join(f'{name} of {given[name].dtype}' for name in floats)}")
