# SPDX-License-Identifier: Apache-2.0
"""Maps of an image of any size: padding to what the network takes, and slabs for what the memory does not hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from monai.networks.utils import eval_mode
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from monai_ssl.networks.encoder_adapter import EncoderAdapter

__all__ = ["network_maps", "slab_halo", "total_stride"]

_PROBE = 64  # voxels along each axis of the image that shows a network's stride
_LONGEST = 1024  # voxels along the first axis of the image that shows how far a network sees


def network_maps(
    network: nn.Module, image: Tensor, slab_size: int | None = None, halo: int | None = None
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The maps of one image in eval mode, its last voxels repeated at the ends up to the network's total stride.

    A coarse map reaches far from there, and an edge that no scan has would disturb it. With `slab_size` the image goes
    through the network in parts along its first axis, each with as many voxels more on either side as the network sees,
    which are cut off again: the result is that of the whole image.

    Args:
        network: gives a list of maps (1, C, *size), finest first.
        image: (C, *size), plain tensor.
        slab_size: voxels along the first axis, a multiple of the total stride; None: all at once.
        halo: of :func:`slab_halo`, where it is known.

    Returns:
        maps (C, *size) and the padded size that they cover.

    Raises:
        ValueError: an image the network does not take, maps that do not divide it, or slabs that cannot be exact.
    """
    size = tuple(image.shape[1:])
    if slab_size is None and _known_stride(network, len(size)) is None:
        maps = _unpadded(network, image)
        if maps is not None:
            return maps, size
    stride = total_stride(network, image)
    padded = tuple(-(-length // s) * s for length, s in zip(size, stride))
    ends = [n for length, whole in zip(size[::-1], padded[::-1]) for n in (0, whole - length)]
    batch = F.pad(image[None], ends, mode="replicate")
    if slab_size is not None and (len(size) != 3 or slab_size % stride[0]):
        raise ValueError(f"slab_size {slab_size} needs volumes, and must be a multiple of the stride {stride[0]}")
    if slab_size is None or padded[0] <= slab_size:
        maps = _run(network, batch)
    else:
        maps = _slabs(network, batch, slab_size, slab_halo(network, image, stride) if halo is None else halo)
    if not _divide(maps, padded):
        raise ValueError(f"maps {[tuple(m.shape[1:]) for m in maps]} do not divide an image of {padded} voxels")
    return maps, padded


def total_stride(network: nn.Module, image: Tensor) -> tuple[int, ...]:
    """Voxels along each axis that an image must have, or multiples.

    Read from `network.encoder.strides` or from an encoder of this package; of other networks found by running them.

    Args:
        network: see :func:`network_maps`.
        image: (C, *size).

    Raises:
        ValueError: the network does not tell it.
    """
    rank = image.ndim - 1
    known = _known_stride(network, rank)
    if known is not None:
        return known
    probe = image.new_zeros(1, len(image), *[_PROBE] * rank)
    sizes = [tuple(m.shape[1:]) for m in _run(network, probe)]
    if any(_PROBE % cells for size in sizes for cells in size):
        raise ValueError(
            f"the stride of {type(network).__name__} is not known: {_PROBE} voxels give maps of {sizes}; "
            "give its encoder an attribute strides, one entry per map"
        )
    return tuple(math.lcm(*(_PROBE // cells for cells in axis)) for axis in zip(*sizes))


def slab_halo(network: nn.Module, image: Tensor, stride: Sequence[int]) -> int:
    """Voxels along the first axis that cells may see beyond their own, a multiple of the stride.

    Found by what a plane of NaN spoils: every sum that it enters, whatever the weights.

    Args:
        network: see :func:`network_maps`.
        image: (C, *size); its channels, type and device count.
        stride: of :func:`total_stride`.

    Raises:
        ValueError: the network sees everything, as with attention or instance normalisation.
    """
    length, step = 32 * stride[0], stride[0]
    while length <= max(_LONGEST, 32 * stride[0]):
        reach = 0
        for plane in range(length // 2, length // 2 + step):
            probe = image.new_zeros(1, len(image), length, *stride[1:])
            probe[:, :, plane] = float("nan")
            reach = max(reach, *(_spoiled(m, length // m.shape[1], plane) for m in _run(network, probe)))
            if reach >= length // 2 - step:
                break
        if reach < length // 2 - step:
            return -(-reach // step) * step
        length *= 2
    raise ValueError(
        f"{type(network).__name__} sees the whole first axis at once, as with attention or instance normalisation: "
        "slabs would change the result, use slab_size=None"
    )


def _known_stride(network: nn.Module, rank: int) -> tuple[int, ...] | None:
    strides = getattr(getattr(network, "encoder", None), "strides", None)
    if strides is not None:
        each = [ensure_tuple_rep(stride, rank) for stride in strides]
        return tuple(math.lcm(*axis) for axis in zip(*each))
    adapters = (module for module in network.modules() if isinstance(module, EncoderAdapter))
    adapter = next(adapters, None)
    return None if adapter is None else tuple(adapter._stride)


def _unpadded(network: nn.Module, image: Tensor) -> list[Tensor] | None:
    """Maps of the image as it is, where the network takes it and they fill it beyond doubt."""
    try:
        maps = _run(network, image[None])
    except (RuntimeError, ValueError):  # networks refuse sizes in many ways
        return None
    if not _divide(maps, image.shape[1:]):
        return None
    # 10 voxels in 2 cells are cells of 5, or cells of 4 without the rest; only powers of two are taken at their word
    strides = [v // c for m in maps for v, c in zip(image.shape[1:], m.shape[1:])]
    return maps if all(s & (s - 1) == 0 for s in strides) else None


def _divide(maps: Sequence[Tensor], size: Sequence[int]) -> bool:
    return all(len(size) == m.ndim - 1 and not any(v % c for v, c in zip(size, m.shape[1:])) for m in maps)


def _spoiled(values: Tensor, stride: int, plane: int) -> int:
    """How far a cell that a plane spoils lies from it, in voxels beyond the cell's own."""
    cells = values.isnan().movedim(1, 0).flatten(1).any(1).nonzero().flatten()
    if not len(cells):
        return 0
    below, above = int(cells[-1]) * stride - plane, plane - int(cells[0]) * stride - stride + 1
    return max(below, above, 0)


def _slabs(network: nn.Module, image: Tensor, slab: int, halo: int) -> list[Tensor]:
    length = image.shape[2]
    whole: list[Tensor] = []
    for start in range(0, length, slab):
        stop = min(start + slab, length)
        first, last = max(start - halo, 0), min(stop + halo, length)
        parts = _run(network, image[:, :, first:last])
        strides = [(last - first) // part.shape[1] for part in parts]
        if not whole:
            whole = [p.new_empty(p.shape[0], length // s, *p.shape[2:]) for p, s in zip(parts, strides)]
        for values, part, s in zip(whole, parts, strides):
            values[:, start // s : stop // s] = part[:, (start - first) // s : (stop - first) // s]
    return whole


def _run(network: nn.Module, image: Tensor) -> list[Tensor]:
    with eval_mode(network):
        maps = network(image)
    if isinstance(maps, Tensor) or not isinstance(maps, Sequence):
        maps = [maps]
    return [m[0].as_subclass(Tensor) for m in maps]
