# SPDX-License-Identifier: Apache-2.0
"""A network from the description of it that travels with its weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["rebuild_network"]

_PLACES = ("monai_ssl.networks", "monai.networks.nets")  # where classes are looked up, by name


def rebuild_network(description: Mapping[str, Any]) -> nn.Module:
    """Build the network that a provenance describes, untrained.

    A file of weights must not decide what is executed: only networks of this package and of MONAI can be named, and
    arguments are taken as they are, unlike the expressions of a bundle.

    Args:
        description: the entry `network` of a provenance: class name under `_target_`, and arguments, which may be such
            mappings again. `attribute`, the part that the weights belong to, is left out.

    Raises:
        ValueError: a class that is not known, or arguments that it does not take.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("_target_"), str):
        raise ValueError(f"a network is described by a mapping with _target_ and arguments, got {description!r}")
    target = description["_target_"]
    network = _class(target)
    arguments = {key: _built(value) for key, value in description.items() if key not in ("_target_", "attribute")}
    try:
        return network(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{target} cannot be built as described: {error}") from error


def _class(target: str) -> type[nn.Module]:
    place, _, name = target.rpartition(".")
    for known in _PLACES:
        found = getattr(importlib.import_module(known), name, None)
        named = not place or f"{place}.".startswith(f"{known}.")  # short, or by the submodule that defines it
        if named and isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(f"{target} is no network of {' or '.join(_PLACES)}")


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return rebuild_network(value) if "_target_" in value else {key: _built(v) for key, v in value.items()}
    return [_built(v) for v in value] if isinstance(value, list) else value
