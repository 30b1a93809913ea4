# SPDX-License-Identifier: Apache-2.0
"""Where the regions of a map lie, which of them repel each other, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "LATTICE_SIZES",
    "REGIONS",
    "check_regions",
    "published_regions",
    "region_negatives",
    "region_places",
    "region_starts",
    "region_vectors",
]

REGIONS = ("lattice", "published")
LATTICE_SIZES = {13: 2, 35: 3}  # number of places -> spatial axes

# row and column of each place; the last four are negatives only
_PUBLISHED = ("00", "0h", "0m", "h0", "hh", "hm", "m0", "mh", "mm", "qq", "qt", "tq", "tt", "hq", "ht", "qh", "th")
_PUBLISHED_NEGATIVES = (
    ("0h", "qq", "qh", "h0", "hq"),
    ("00", "0m", "qq", "qt", "hh"),
    ("0h", "qh", "qt", "ht", "hm"),
    ("00", "qq", "hh", "m0", "tq"),
    ("qq", "qt", "tq", "tt", "h0"),
    ("0m", "hh", "mm", "qt", "tt"),
    ("h0", "hq", "mh", "tq", "th"),
    ("hh", "m0", "mm", "tq", "tt"),
    ("ht", "hm", "mh", "tt", "th"),
    ("00", "0h", "h0", "hh", "qt"),
    ("0h", "0m", "qq", "hh", "hm"),
    ("h0", "hh", "m0", "mh", "tt"),
    ("hh", "hm", "mh", "mm", "tq"),
)


def region_starts(size: Sequence[int], region_size: int) -> Tensor:
    """First cell of each region: the corners, edges and middle of the map, then the points between them.

    Source: the places of the local loss of arXiv 2006.10511. With m = size - region_size along each axis, first the
    lattice {0, m // 2, m} in C order, then the points {m // 4, 3 m // 4}: 13 in 2D, 35 in 3D. The released code has
    m = size - 4, see :func:`published_regions`.

    Args:
        size: cells of the map along each axis, n in all.
        region_size: cells of a region along each axis.

    Returns:
        (R, n) int64.

    Raises:
        ValueError: the map is smaller than a region.
    """
    if region_size < 1 or min(size) < region_size:
        raise ValueError(f"regions of {region_size} cells do not fit into a map of {tuple(size)}")
    room = [length - region_size for length in size]
    lattice = product(*((0, m // 2, m) for m in room))
    between = product(*((m // 4, 3 * m // 4) for m in room))
    return torch.tensor([*lattice, *between])


def region_negatives(starts: Tensor, region_size: int) -> Tensor:
    """All other regions, for each of them.

    Args:
        starts: first cell of each region, (R, n), on the CPU.
        region_size: cells of a region along each axis.

    Returns:
        (R, R) bool, False on the diagonal only.

    Raises:
        ValueError: two regions overlap, so that they could not be told apart.
    """
    starts = torch.as_tensor(starts)
    negatives = ~torch.eye(len(starts), dtype=torch.bool)
    _check_apart(starts, negatives, region_size, 5 * region_size)
    return negatives


def published_regions(size: Sequence[int], num_negatives: int = 5) -> tuple[Tensor, Tensor]:
    """Places and negatives of the released code (`krishnabits001/domain_specific_cl`), for regions of 3 x 3.

    Source: released code of arXiv 2006.10511. With m = size - 4: 13 anchors, each against a few picked places, and four
    places that are negatives only. At the sides of small maps anchors overlap with their negatives.

    Args:
        size: cells of the map along its two axes.
        num_negatives: of each anchor, 1 to 5; the released code has 5 for L^R and 4 for L^D.

    Returns:
        starts (17, 2) int64 and negatives (17, 17) bool, whose last four rows are False.

    Raises:
        ValueError: not two axes, a map below 4 cells, or another number of negatives.
    """
    if len(size) != 2 or min(size) < 4:
        raise ValueError(f"the published regions need a map with two axes of at least 4 cells, got {tuple(size)}")
    if not 1 <= num_negatives <= 5:
        raise ValueError(f"num_negatives must be between 1 and 5, got {num_negatives}")
    row, column = ({"0": 0, "q": m // 4, "h": m // 2, "t": 3 * m // 4, "m": m} for m in (s - 4 for s in size))
    starts = torch.tensor([[row[place[0]], column[place[1]]] for place in _PUBLISHED])
    negatives = torch.zeros(len(starts), len(starts), dtype=torch.bool)
    for anchor, others in enumerate(_PUBLISHED_NEGATIVES):
        negatives[anchor, [_PUBLISHED.index(place) for place in others[:num_negatives]]] = True
    return starts, negatives


def region_vectors(features: Tensor, starts: Tensor, region_size: int) -> Tensor:
    """The flattened patch of a map at each place, and no patch anywhere else.

    Args:
        features: maps, (N, C, *size).
        starts: first cell of each region, (R, n), on the CPU.
        region_size: cells K of a region along each axis.

    Returns:
        (N, R, C * K^n), channel first, then the cells in C order, as ``torch.nn.functional.unfold`` has them.

    Raises:
        ValueError: a region leaves the map, or the numbers of axes differ.
    """
    size, starts = features.shape[2:], torch.as_tensor(starts)
    if starts.ndim != 2 or starts.shape[1] != len(size):
        raise ValueError(f"starts {tuple(starts.shape)} must be (R, {len(size)}) for maps {tuple(features.shape)}")
    places = starts.tolist()
    if any(a < 0 or a + region_size > length for place in places for a, length in zip(place, size)):
        raise ValueError(f"regions of {region_size} cells at {places} leave the map of {tuple(size)}")
    # (R, 1, n) + (K^n, n): cells of each region, then their numbers in the flattened map
    offsets = torch.tensor(list(product(range(region_size), repeat=len(size))))
    strides = torch.tensor([size[axis + 1 :].numel() for axis in range(len(size))])
    cells = ((starts[:, None] + offsets) * strides).sum(-1)
    # without waiting for the device
    taken = features.flatten(2).index_select(2, cells.flatten().to(features.device, non_blocking=True))
    return rearrange(taken, "n c (r k) -> n r (c k)", r=len(starts))


@lru_cache(maxsize=64)
def region_places(
    regions: str, size: tuple[int, ...], region_size: int, num_negatives: int = 5
) -> tuple[Tensor, Tensor]:
    """Starts (R, n) and negatives (R, R) of either set of regions on a map, on the CPU; not to be written into.

    Raises:
        ValueError: the map is too small: a region would overlap with one that it is contrasted with.
    """
    check_regions(regions, region_size, len(size))
    if regions == "published":
        starts, negatives = published_regions(size, num_negatives)
        _check_apart(starts, negatives, region_size, 16)
        return starts, negatives
    starts = region_starts(size, region_size)
    return starts, region_negatives(starts, region_size)


def check_regions(regions: str, region_size: int, num_axes: int = 2) -> None:
    """Raise on an unknown set of regions, or one that does not go with the other arguments."""
    if regions not in REGIONS:
        raise ValueError(f"regions must be one of {', '.join(REGIONS)}, got {regions!r}")
    if region_size < 1 or (regions == "published" and region_size != 3):
        raise ValueError(f"region_size must be at least 1, and 3 for published regions, got {region_size}")
    if num_axes not in ((2,) if regions == "published" else (2, 3)):
        raise ValueError(f"{regions} regions lie in maps with {'2' if regions == 'published' else '2 or 3'} axes, "
                         f"got {num_axes}")  # fmt: skip


def _check_apart(starts: Tensor, negatives: Tensor, region_size: int, smallest: int) -> None:
    distance = (starts[:, None] - starts[None]).abs().amax(-1)  # Chebyshev
    overlapping = sum(map(sum, (negatives & (distance < region_size)).tolist()))
    if overlapping:
        raise ValueError(
            f"{overlapping} pairs of regions of {region_size} cells, which are contrasted, overlap: a map needs at "
            f"least {smallest} cells along each axis, the last start here is {starts.amax(0).tolist()}"
        )
