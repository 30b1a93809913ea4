# SPDX-License-Identifier: Apache-2.0
"""Pairs of volumes, to register one with the other."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import strip_suffix

__all__ = ["held_out_pairs", "known_pairs", "paired_volumes", "read_registration_pairs", "registration_pairs"]

_PATHS = ("moving", "fixed", "moving_label", "fixed_label", "alignment")
_POINTS = ("moving_points", "fixed_points")
_PARTS = ("training", "validation", "test")


def registration_pairs(
    data: Mapping[str, Sequence[Mapping[str, Any]]], num_pairs: int | None = None, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of the volumes of a datalist, part by part.

    Training: all ordered pairs of different volumes, or `num_pairs` of them drawn at random. Other parts: each volume
    and the next one, the last with the first, so that every volume is moved once and is fixed once.

    Args:
        data: lists of items with "image" and perhaps "label", as :func:`build_datalist` gives them.
        num_pairs: of training; None: all, N (N - 1).
        seed: of the draw.

    Returns:
        "training", "validation", "test": items with "moving", "fixed", "name" and, where both volumes have labels,
        "moving_label" and "fixed_label".

    Raises:
        ValueError: one volume alone in the training part, or `num_pairs` below 1.
    """
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    parts = {part: list(data.get(part, ())) for part in _PARTS}
    volumes = parts["training"]
    if len(volumes) == 1:
        raise ValueError(f"training needs two volumes to make a pair, there is {volumes[0]['image']} alone: add scans")
    count = len(volumes) * (len(volumes) - 1)
    chosen = range(count) if num_pairs is None else random.Random(seed).sample(range(count), min(num_pairs, count))
    pairs = {"training": [_pair(*_pair_of(number, volumes)) for number in chosen]}
    for part in _PARTS[1:]:
        items = parts[part]
        pairs[part] = [_pair(item, other) for item, other in zip(items, items[1:] + items[:1]) if item is not other]
    return pairs


def held_out_pairs(parts: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The test pairs or, where there are none, those of validation.

    Args:
        parts: of :func:`registration_pairs` or :func:`read_registration_pairs`.

    Raises:
        ValueError: there are neither.
    """
    pairs = parts.get("test") or parts.get("validation")
    if not pairs:
        raise ValueError(
            "there is no pair of scans: it takes two in the folder, and two that are held out where a part is (raise "
            "val_fraction), or a file of pairs (--pairs)"
        )
    return pairs


def read_registration_pairs(file: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    """Pairs of a JSON file.

    Args:
        file: a list of pairs, which is then every part, or a mapping of "training", "validation" and "test" to lists.
            A pair: `moving` and `fixed`, files relative to the folder of this one; where wanted `name`, `moving_label`
            and `fixed_label`, label maps; `moving_points` and `fixed_points`, [[x, y, z], ..] of the same places in RAS
            mm; `alignment`, a file with what is known before, see `align_pairs`.

    Returns:
        see :func:`registration_pairs`.

    Raises:
        OSError: no such file, or a file that it names is not there.
        ValueError: no JSON, or an entry that is missing, unknown or of another form.
    """
    path = Path(file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"pairs file {path} is no JSON ({error})") from error
    if isinstance(content, list):
        content = dict.fromkeys(_PARTS, content)
    if not isinstance(content, dict) or not set(content) <= set(_PARTS) or not any(content.values()):
        raise ValueError(f"pairs file {path} must hold a list of pairs, or a mapping of {', '.join(_PARTS)} to lists")
    return {part: [_checked(pair, path) for pair in content.get(part, [])] for part in _PARTS}


def paired_volumes(pairs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The volumes of pairs, each once, as a datalist whose items can be checked and cached.

    Args:
        pairs: of :func:`registration_pairs` or :func:`read_registration_pairs`.
    """
    found = {}
    for part, entries in pairs.items():
        volumes: dict[str, dict[str, Any]] = {}
        for pair in entries:
            for role in ("moving", "fixed"):
                item = {"image": pair[role], "name": str(pair[role]), "label": pair.get(f"{role}_label")}
                volumes.setdefault(str(pair[role]), {k: v for k, v in item.items() if v is not None})
        found[part] = list(volumes.values())
    return found


def known_pairs(
    pairs: Mapping[str, Sequence[Mapping[str, Any]]], data: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The pairs whose two volumes are in a datalist, from which a check may have taken some.

    Args:
        pairs: of :func:`read_registration_pairs`.
        data: of :func:`paired_volumes`, checked.
    """
    left = {part: {str(item["image"]) for item in items} for part, items in data.items()}
    return {
        part: [dict(p) for p in entries if {str(p["moving"]), str(p["fixed"])} <= left[part]]
        for part, entries in pairs.items()
    }


def _pair_of(number: int, volumes: list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    moving, other = divmod(number, len(volumes) - 1)
    return volumes[moving], volumes[other + (other >= moving)]


def _pair(moving: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    names = [strip_suffix(Path(str(item.get("name", item["image"]))).name) for item in (moving, fixed)]
    pair = {"moving": moving["image"], "fixed": fixed["image"], "name": " to ".join(names)}
    if "label" in moving and "label" in fixed:
        pair |= {"moving_label": moving["label"], "fixed_label": fixed["label"]}
    return pair


def _checked(pair: Any, file: Path) -> dict[str, Any]:
    known = (*_PATHS, *_POINTS, "name")
    if not isinstance(pair, dict) or not {"moving", "fixed"} <= set(pair) or not set(pair) <= set(known):
        raise ValueError(f"{file}: a pair must have moving and fixed, and may have {', '.join(known[2:])}; got {pair}")
    if ("moving_label" in pair) != ("fixed_label" in pair):
        raise ValueError(f"{file}: a pair has a label map of one image alone: {pair}")
    found = dict(pair)
    for key in _PATHS:
        if key in pair:
            found[key] = str(file.parent / str(pair[key]))
            if not Path(found[key]).exists():
                raise FileNotFoundError(f"{file} names {key} {found[key]}, which does not exist")
    counts = [len(pair[key]) for key in _POINTS if key in pair]
    if counts and (len(counts) != 2 or counts[0] != counts[1] or not counts[0]):
        raise ValueError(f"{file}: moving_points and fixed_points must be the same places, got {counts} points: {pair}")
    return {
        **found,
        "name": str(pair.get("name") or _pair({"image": pair["moving"]}, {"image": pair["fixed"]})["name"]),
    }
