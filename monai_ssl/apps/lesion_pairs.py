# SPDX-License-Identifier: Apache-2.0
"""Which lesions are to be found in which follow-up scan: from a list, a JSON file or a CSV file."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .image_embedding import SPACES

__all__ = ["read_pairs"]

_NEEDED = ("source", "target", "points")
_KNOWN = ("id", *_NEEDED, "labels", "space", "truth", "radius_mm")
_XYZ = ("x", "y", "z")


def read_pairs(pairs: Any) -> list[dict[str, Any]]:
    """Pairs of scans in full, checked.

    Args:
        pairs: mappings, or a JSON file with a list of them: `source` and `target`, the scans; `points` [[x, y, z], ..]
            of lesions in the source; and, where wanted, `id`, `labels`, `space` ("RAS", "LPS" or "voxel"), `truth`, the
            points in the target, with None for unknown ones, and `radius_mm`, one number or one per lesion. Or a CSV
            file with one lesion per row and columns source, target, source_x, source_y, source_z and, where wanted,
            pair, lesion, space, truth_x, truth_y, truth_z, radius_mm: those of `tracking.csv`. Scans in files are
            relative to the folder of the file.

    Returns:
        the pairs with all entries: `id` a text, `labels` a list of texts, `truth` and `radius_mm` lists or None.

    Raises:
        OSError: there is no such file.
        ValueError: an entry is missing, unknown or of another form; the message names the pair and the entry.
    """
    folder = None
    if isinstance(pairs, (str, os.PathLike)):
        file = Path(pairs)
        entries, folder = (_from_csv(file) if file.suffix.lower() == ".csv" else _from_json(file)), file.parent
    else:
        entries = list(pairs)
    if not entries:
        raise ValueError("there are no pairs to track")
    checked = [_checked(entry, str(number), folder) for number, entry in enumerate(entries, start=1)]
    names = [pair["id"] for pair in checked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each pair needs an id of its own, these appear more than once: {', '.join(twice)}")
    return checked


def _checked(entry: Any, number: str, folder: Path | None) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"pair {number} must be a mapping with {', '.join(_NEEDED)}, got {type(entry).__name__}")
    name = str(entry.get("id", number))
    missing, unknown = [key for key in _NEEDED if entry.get(key) is None], [key for key in entry if key not in _KNOWN]
    if missing or unknown:
        raise ValueError(f"pair {name}: missing {missing}, unknown {unknown}; entries are {', '.join(_KNOWN)}")
    if not re.fullmatch(r"[\w.+=-][\w .+=-]*", name):
        raise ValueError(f"pair {name!r}: the id names files, use letters, digits, '.', '_' and '-'")
    space = entry.get("space") or "RAS"
    if space not in SPACES:
        raise ValueError(f"pair {name}: space must be one of {', '.join(SPACES)}, got {space!r}")
    points = [_point(point, name, "points") for point in _rows(entry["points"], name, "points")]
    count = len(points)
    if not count:
        raise ValueError(f"pair {name}: no points")
    labels = entry.get("labels")
    labels = range(1, count + 1) if labels is None else _rows(labels, name, "labels", count)
    truth, radius = entry.get("truth"), entry.get("radius_mm")
    if truth is not None:
        truth = [None if t is None else _point(t, name, "truth") for t in _rows(truth, name, "truth", count)]
    if radius is not None:
        radius = [radius] * count if isinstance(radius, (int, float)) else _rows(radius, name, "radius_mm", count)
        radius = [None if r is None else _number(r, name, "radius_mm") for r in radius]
    pair = {"id": name, "labels": [str(label) for label in labels], "space": space, "points": points}
    scans = {key: _scan(entry[key], folder) for key in ("source", "target")}
    return {**pair, **scans, "truth": truth, "radius_mm": radius}


def _scan(scan: Any, folder: Path | None) -> Any:
    return str(folder / scan) if folder is not None and isinstance(scan, (str, os.PathLike)) else scan


def _rows(value: Any, name: str, key: str, count: int | None = None) -> list[Any]:
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, (list, tuple)) or (count is not None and len(rows) != count):
        wanted = "a list" if count is None else f"a list of {count}, one for each point"
        raise ValueError(f"pair {name}: {key} must be {wanted}, got {value!r}")
    return list(rows)


def _point(value: Any, name: str, key: str) -> list[float]:
    point = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(point, (list, tuple)) or len(point) != 3:
        raise ValueError(f"pair {name}: {key} must be [[x, y, z], ..], got {value!r}")
    return [_number(v, name, key) for v in point]


def _number(value: Any, name: str, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"pair {name}: {key} holds {value!r}, which is no number")
    return number


def _from_json(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file ({error}); other files of pairs end in .csv") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} must hold a list of pairs, got {type(content).__name__}")
    return content


def _from_csv(file: Path) -> list[Any]:
    """Rows of one pair need not follow each other."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        needed = ["source", "target", *(f"source_{a}" for a in _XYZ)]
        missing = [column for column in needed if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}")
        found: dict[Any, dict[str, Any]] = {}
        for row in reader:
            place = (row["source"], row["target"])
            key = row.get("pair") or place
            pair = found.setdefault(key, {"source": place[0], "target": place[1], "space": row.get("space")})
            if (pair["source"], pair["target"]) != place or pair["space"] != row.get("space"):
                raise ValueError(f"{file}: rows of pair {key} have other scans or another space than its first")
            if row.get("pair"):
                pair["id"] = row["pair"]
            _add(pair, row)
    return [_tidy(pair) for pair in found.values()]


def _add(pair: dict[str, Any], row: Mapping[str, Any]) -> None:
    truth = _filled(row.get(f"truth_{a}") for a in _XYZ)
    for key, value in (
        ("points", [row[f"source_{a}"] for a in _XYZ]),
        ("labels", row.get("lesion") or None),
        ("truth", truth),
        ("radius_mm", row.get("radius_mm") or None),
    ):
        pair.setdefault(key, []).append(value)


def _filled(values: Iterable[Any]) -> list[Any] | None:
    entries = list(values)
    return entries if any(entries) else None


def _tidy(pair: dict[str, Any]) -> dict[str, Any]:
    """Without lists that say nothing."""
    labels = [label or number for number, label in enumerate(pair["labels"], start=1)]
    lists = {key: pair[key] if any(v is not None for v in pair[key]) else None for key in ("truth", "radius_mm")}
    return {**pair, **lists, "labels": labels}
