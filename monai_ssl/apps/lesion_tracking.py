# SPDX-License-Identifier: Apache-2.0
"""Lesions found again in follow-up scans, with tables and markups."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from monai_ssl.data.files import atomic_path
from monai_ssl.metrics.matching_error import matching_distance, matching_summary

from .image_embedding import ImageEmbedding, to_ras
from .lesion_pairs import read_pairs
from .markups import write_markups
from .point_matcher import PointMatcher, check_filters
from .preprocessing import image_name

__all__ = ["track_lesions", "tracking_summary"]

_COLUMNS = ["pair", "lesion", "source", "target"]
_COLUMNS += [f"{end}_{axis}" for end in ("source", "target") for axis in "xyz"]
_COLUMNS += ["score", "cycle_error_mm", "accepted"]
_TRUTH_COLUMNS = [*(f"truth_{axis}" for axis in "xyz"), "radius_mm", "distance_mm"]


def track_lesions(
    matcher: PointMatcher,
    pairs: Any,
    output_dir: str | Path,
    cycle: bool = True,
    min_score: float | None = None,
    max_cycle_mm: float | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Find lesions of one scan in another, for any number of pairs of scans; each scan is embedded once.

    Source: lesion tracking with SAM (arXiv 2012.02383). Writes `tracking.csv`, `tracking.json` (the same rows, the
    sha256 of the network's weights, and metrics over the lesions whose truth is known), and for 3D Slicer
    `<id>_source.mrk.json` and `<id>_target.mrk.json`. Positions are in RAS mm, but those of the markups in LPS, as 3D
    Slicer writes them. Embeddings are dropped after the last pair that needs them.

    Args:
        matcher: of 3D scans.
        pairs: see :func:`read_pairs`; scans as `PointMatcher.embed` takes them.
        output_dir: folder for the files, made if absent; files of the same names are replaced.
        cycle: match each answer back.
        min_score: see `PointMatcher.match`.
        max_cycle_mm: see `PointMatcher.match`.
        progress: show a bar over the pairs.

    Returns:
        one row for each lesion: pair, lesion, source, target, source_x, .., target_z, score, cycle_error_mm (None
        without `cycle`), accepted; and, where there is a truth, truth_x, .., radius_mm (or None), distance_mm.

    Raises:
        OSError: a scan or the file of pairs is absent.
        ValueError: pairs in another form, or points outside of their scan; the message names the pair.
    """
    check_filters(min_score, max_cycle_mm)
    checked, output = read_pairs(pairs), Path(output_dir)
    uses = Counter(_key(pair[end]) for pair in checked for end in ("source", "target"))
    embeddings: dict[Any, ImageEmbedding] = {}
    rows: list[dict[str, Any]] = []
    for pair in tqdm(checked, desc="Tracking", disable=not progress):
        try:
            ends = []
            for end in ("source", "target"):
                key = _key(pair[end])
                if key not in embeddings:
                    embeddings[key] = matcher.embedding(pair[end])
                ends.append(embeddings[key])
            rows += _track(matcher, pair, ends[0], ends[1], cycle, min_score, max_cycle_mm)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"pair {pair['id']}: {error}") from error
        except ValueError as error:
            raise ValueError(f"pair {pair['id']}: {error}") from error
        for end in ("source", "target"):
            key = _key(pair[end])
            uses[key] -= 1
            if not uses[key]:
                del embeddings[key]
    _write(output, checked, rows, matcher.weights_sha256)
    return rows


def tracking_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of lesions and, over those whose truth is known, the metrics of :func:`matching_summary`.

    Args:
        rows: of :func:`track_lesions`. Metrics that need a radius are left out unless all lesions with truth have one.
    """
    summary = {"lesions": float(len(rows)), "accepted": float(sum(bool(row["accepted"]) for row in rows))}
    known = [row for row in rows if row.get("distance_mm") is not None]
    if not known:
        return summary
    found, true = ([[row[f"{end}_{axis}"] for axis in "xyz"] for row in known] for end in ("target", "truth"))
    radius = [row["radius_mm"] for row in known]
    return summary | matching_summary(found, true, None if None in radius else radius)


def _track(
    matcher: PointMatcher,
    pair: Mapping[str, Any],
    source: ImageEmbedding,
    target: ImageEmbedding,
    cycle: bool,
    min_score: float | None,
    max_cycle_mm: float | None,
) -> list[dict[str, Any]]:
    if len(source.size) != 3:
        raise ValueError(f"lesions are tracked in volumes, got an image of {source.size} pixels")
    matches = matcher.match(source, target, pair["points"], pair["space"], cycle, min_score, max_cycle_mm)
    points = torch.tensor(pair["points"], dtype=torch.float64)
    known = to_ras(points, pair["space"], source.source_affine)
    found = to_ras(matches.points, pair["space"], target.source_affine)
    error = [None] * len(known) if matches.cycle_error_mm is None else matches.cycle_error_mm.tolist()
    rows = []
    for i, label in enumerate(pair["labels"]):
        row = {"pair": pair["id"], "lesion": label}
        row |= {end: image_name(pair[end]) for end in ("source", "target")}
        row |= _coordinates("source", known[i]) | _coordinates("target", found[i])
        row |= {"score": float(matches.score[i]), "cycle_error_mm": error[i], "accepted": bool(matches.accepted[i])}
        rows.append(row | _truth(pair, i, found[i], target))
    return rows


def _truth(pair: Mapping[str, Any], i: int, found: Tensor, target: ImageEmbedding) -> dict[str, Any]:
    if pair["truth"] is None or pair["truth"][i] is None:
        return {}
    true = torch.tensor([pair["truth"][i]], dtype=torch.float64)
    true = to_ras(true, pair["space"], target.source_affine)[0]
    radius = None if pair["radius_mm"] is None else pair["radius_mm"][i]
    return _coordinates("truth", true) | {"radius_mm": radius, "distance_mm": float(matching_distance(found, true))}


def _coordinates(end: str, point: Tensor) -> dict[str, float]:
    return {f"{end}_{axis}": value for axis, value in zip("xyz", point.tolist())}


def _key(scan: Any) -> Any:
    return scan if isinstance(scan, str) else id(scan)


def _write(output: Path, pairs: Sequence[Mapping[str, Any]], rows: list[dict[str, Any]], sha256: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    columns = _COLUMNS + (_TRUTH_COLUMNS if any("distance_mm" in row for row in rows) else [])
    with atomic_path(output / "tracking.csv") as file, file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    content = {"space": "RAS", "weights_sha256": sha256, "summary": tracking_summary(rows), "rows": rows}
    with atomic_path(output / "tracking.json") as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for pair in pairs:
        own = [row for row in rows if row["pair"] == pair["id"]]
        for end in ("source", "target"):
            write_markups(
                output / f"{pair['id']}_{end}.mrk.json",
                [[row[f"{end}_{axis}"] for axis in "xyz"] for row in own],
                [row["lesion"] for row in own],
                [f"{row['score']:.4f}" for row in own],
                [row["accepted"] for row in own],
            )
