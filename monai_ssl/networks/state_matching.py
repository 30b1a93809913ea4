# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a file belongs to which tensor of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["covering_prefixes", "inflate", "match_names", "names_beside", "reads_image", "shape_of", "tails", "under"]

# What wrappers and pretext networks put in front of all keys
_WRAPPERS = frozenset({"module", "_orig_mod", "encoder", "network", "backbone", "student", "teacher"})
_SWIN = {"swin_vit": "swinViT", "swinViT": "swin_vit"}  # two spellings in MONAI's history


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a name is one of the prefixes, or continues one after a dot."""
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def tails(key: str) -> Iterator[str]:
    """The key, then the key without one, two, .. leading wrapper names."""
    yield key
    head, _, rest = key.partition(".")
    if rest and head in _WRAPPERS:
        yield from tails(rest)


def match_names(keys: Iterable[str], own: Mapping[str, Any], exclude: Sequence[str]) -> dict[str, str]:
    """File key -> name in the network, without the excluded: of all readings the one with most names in common."""
    return max(_readings(keys, exclude), key=lambda names: sum(name in own for name in names.values()))


def _readings(keys: Iterable[str], exclude: Sequence[str]) -> Iterator[dict[str, str]]:
    """As is, then without a wrapper name that all keys share, and so on; each in both spellings of swinViT."""
    names = {key: key for key in keys}
    while True:
        names = {key: name for key, name in names.items() if not under(name, exclude)}
        yield names
        swapped = {key: ".".join(_SWIN.get(part, part) for part in name.split(".")) for key, name in names.items()}
        yield {key: name for key, name in swapped.items() if not under(name, exclude)}
        heads = {name.partition(".")[0] for name in names.values()}
        if len(heads) != 1 or not heads <= _WRAPPERS:
            return
        names = {key: name.partition(".")[2] for key, name in names.items()}


def names_beside(own: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Where the keys under one wrapper name are the network's: the other first names, e.g. head and teacher."""
    wanted = set(own)
    parts = [key.partition(".") for key in keys]
    for wrapper in sorted(_WRAPPERS):
        if wanted == {rest for head, _, rest in parts if head == wrapper}:
            return sorted({head for head, _, _ in parts} - {wrapper})
    return []


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Shape of a tensor; for anything else in a file, the name of its class."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def reads_image(network: nn.Module, differing: Mapping[str, Any]) -> bool:
    """Whether tensors of another shape are just the convolutions that read the image, for other input channels.

    They are when all differ in the input axis alone, in the same way, and the network's first convolution is one.
    """
    convolutions = {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    }
    if not differing or next(iter(convolutions), None) not in differing or not set(differing) <= set(convolutions):
        return False
    pairs = {(shape_of(value)[1:2], convolutions[name].shape[1]) for name, value in differing.items()}
    others = all(
        isinstance(value, torch.Tensor)
        and value.ndim == convolutions[name].ndim
        and value[:, :1].shape == convolutions[name][:, :1].shape
        for name, value in differing.items()
    )
    return others and len(pairs) == 1


def inflate(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """A convolution weight ``(out, old, *kernel)`` for other input channels: cyclic times old / new; to one: summed."""
    old = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_channels) % old] * (old / in_channels)


def covering_prefixes(names: Iterable[str], loaded: Iterable[str]) -> list[str]:
    """The shortest prefixes that hold the names and nothing that was loaded."""
    taken = {".".join(parts[:i]) for parts in (name.split(".") for name in loaded) for i in range(1, len(parts) + 1)}
    found: dict[str, None] = {}
    for parts in (name.split(".") for name in names):
        cuts = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        found[next((cut for cut in cuts if cut not in taken), ".".join(parts))] = None
    return list(found)
