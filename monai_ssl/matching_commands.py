# SPDX-License-Identifier: Apache-2.0
"""The commands ``match`` and ``track`` of ``python -m monai_ssl``."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_ssl.apps import PointMatcher, load_matcher, read_markups, track_lesions, tracking_summary
from monai_ssl.data.files import strip_suffix
from monai_ssl.visualize import plot_match

__all__ = ["add_matching_commands", "joined_points"]

MATCH = """Find points of a template scan in another scan, the query, by the embeddings of a trained SAM network:
  python -m monai_ssl match --model bundles/sam_resnet18_ct --template a.nii.gz --point 10,-20,35.5 --query b.nii.gz
Prints each answer, and writes tracking.csv, tracking.json, markups for 3D Slicer and a picture of each point."""

TRACK = """Find the lesions of baseline scans in their follow-up scans, from a JSON or CSV file of pairs:
  python -m monai_ssl track --model bundles/sam_resnet18_ct --pairs pairs.csv --output_dir tracked
CSV: a lesion per row with columns source,target,source_x,source_y,source_z and, where wanted, pair, lesion, space,
truth_x,truth_y,truth_z,radius_mm. JSON: a list of {"id", "source", "target", "points", "labels", "space", "truth",
"radius_mm"}. Writes tracking.csv, tracking.json and markups for 3D Slicer, and prints the metrics where truth is
given. Scans are relative to the folder of the file."""


def add_matching_commands(commands: Any) -> None:
    """Add both commands to a parser's subparsers."""
    text = argparse.RawDescriptionHelpFormatter
    summary = "find points of one scan in another"
    match = commands.add_parser("match", help=summary, description=MATCH, formatter_class=text)
    match.add_argument("--template", required=True, help="scan in which the points are known")
    match.add_argument("--query", required=True, help="scan to search")
    match.add_argument("--point", action="append", default=[], metavar="X,Y,Z", help="a point; may be given repeatedly")
    match.add_argument(
        "--points", metavar="FILE", help="points: .mrk.json of 3D Slicer, or .csv with columns x,y,z[,label]"
    )
    match.add_argument("--space", default="RAS", choices=["RAS", "LPS", "voxel"], help="of --point and a .csv; RAS")
    match.add_argument("--no_picture", action="store_true", help="write no pictures")
    _add_common(match, "match_output")
    match.set_defaults(run=_match)
    summary = "find the lesions of scans in their follow-up scans"
    track = commands.add_parser("track", help=summary, description=TRACK, formatter_class=text)
    track.add_argument("--pairs", required=True, metavar="FILE", help="pairs of scans with points, .json or .csv")
    _add_common(track, "track_output")
    track.set_defaults(run=_track)


def joined_points(arguments: Sequence[str]) -> list[str]:
    """The command line with ``--point -1,2,3`` as ``--point=-1,2,3``: argparse takes such a value for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--point" and re.match(r"-[\d.]", argument):
            joined[-1] = f"--point={argument}"
        else:
            joined.append(argument)
    return joined


def _add_common(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--model", required=True, help="bundle folder, or file of weights such as models/model.pt")
    parser.add_argument("--provenance", metavar="JSON", help="of the weights; encoder.json beside them if there is one")
    parser.add_argument("--output_dir", default=output, metavar="DIR", help=f"folder for the results; {output}")
    parser.add_argument("--no_cycle", action="store_true", help="do not match answers back, saves half of the matching")
    parser.add_argument("--min_score", type=float, help="least mean cosine of an accepted answer, at most 1")
    parser.add_argument("--max_cycle_mm", type=float, help="largest error of an accepted answer when matched back")
    parser.add_argument("--spacing", type=float, metavar="MM", help="of the network's input; that of the training")
    parser.add_argument("--percentiles", type=float, nargs=2, metavar=("LOW", "HIGH"), help="for MR, e.g. 0.2 99.8")
    parser.add_argument("--cache_dir", metavar="DIR", help="keep embeddings, some 300 MB per scan, for later calls")
    parser.add_argument(
        "--slab_size", type=int, metavar="N", help="voxels along the body at a time, if memory is short"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU where there is one")


def _matcher(args: argparse.Namespace) -> PointMatcher:
    given = {"spacing": args.spacing, "percentiles": args.percentiles}
    preprocessing = {key: value for key, value in given.items() if value is not None}
    options = {"device": args.device, "cache_dir": args.cache_dir, "slab_size": args.slab_size}
    return load_matcher(args.model, preprocessing, args.provenance, **options)


def _match(args: argparse.Namespace) -> int:
    points, labels, space = _points(args)
    pair = {"id": "match", "source": args.template, "target": args.query, "points": points, "labels": labels}
    matcher = _matcher(args)
    try:
        rows = _tracked(matcher, [{**pair, "space": space}], args, progress=False)
    except (ValueError, OSError) as error:  # there is but one pair
        raise ValueError(str(error).removeprefix("pair match: ")) from error
    for row in rows:
        print(_sentence(row, args))
    if not args.no_picture:
        files = _pictures(matcher, args, rows)
        print(f"pictures: {', '.join(map(str, files))}")
    print(f"results in {args.output_dir}")
    return 0


def _track(args: argparse.Namespace) -> int:
    rows = _tracked(_matcher(args), args.pairs, args, progress=True)
    for name, value in tracking_summary(rows).items():
        print(f"{name}: {value:g}" if name in ("lesions", "accepted", "points") else f"{name}: {value:.3f}")
    print(f"results in {args.output_dir}")
    return 0


def _tracked(matcher: PointMatcher, pairs: Any, args: argparse.Namespace, progress: bool) -> list[dict[str, Any]]:
    filters = {"min_score": args.min_score, "max_cycle_mm": args.max_cycle_mm}
    return track_lesions(matcher, pairs, args.output_dir, not args.no_cycle, progress=progress, **filters)


def _points(args: argparse.Namespace) -> tuple[list[list[float]], list[str], str]:
    """Points, labels and space of the command line."""
    if bool(args.point) == bool(args.points):
        raise ValueError("give the points either by --point X,Y,Z, as often as needed, or by --points FILE")
    if args.point:
        return [_numbers(text, f"--point {text}") for text in args.point], _counted(len(args.point)), args.space
    if args.points.endswith(".json"):
        found, labels = read_markups(args.points)
        if not labels:
            raise ValueError(f"--points {args.points} holds no points")
        return found.tolist(), labels, "RAS"
    with Path(args.points).open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or any(axis not in rows[0] for axis in "xyz"):
        raise ValueError(
            f"--points {args.points} must be a .csv with columns x,y,z and a point per row, or a .mrk.json"
        )
    points = [
        _numbers(",".join(str(row[a]) for a in "xyz"), f"{args.points}, row {n}") for n, row in enumerate(rows, 1)
    ]
    return points, [row.get("label") or number for row, number in zip(rows, _counted(len(rows)))], args.space


def _numbers(text: str, place: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise ValueError(
            f"{place} is no point, expected three numbers such as 10,-20,35.5 (no spaces, '.' for decimals)"
        )
    return values


def _counted(number: int) -> list[str]:
    return [str(n) for n in range(1, number + 1)]


def _sentence(row: dict[str, Any], args: argparse.Namespace) -> str:
    ends = [", ".join(f"{row[f'{end}_{axis}']:.1f}" for axis in "xyz") for end in ("source", "target")]
    error = "" if row["cycle_error_mm"] is None else f", back within {row['cycle_error_mm']:.1f} mm"
    verdict = "accepted" if row["accepted"] else f"NOT accepted: {_reason(row, args)}"
    return f"{row['lesion']}: ({ends[0]}) -> ({ends[1]}) mm RAS, score {row['score']:.3f}{error}, {verdict}"


def _reason(row: dict[str, Any], args: argparse.Namespace) -> str:
    if args.min_score is not None and row["score"] < args.min_score:
        return "score too low"
    if args.max_cycle_mm is not None and row["cycle_error_mm"] > args.max_cycle_mm:
        return "comes back too far away"
    return "point or answer outside of the body"


def _pictures(matcher: PointMatcher, args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[Path]:
    scans = [matcher.prepare(scan) for scan in (args.template, args.query)]
    template, query = (matcher.embed(scan) for scan in (args.template, args.query))
    files = []
    for number, row in enumerate(rows, start=1):
        known, found = ([row[f"{end}_{axis}"] for axis in "xyz"] for end in ("source", "target"))
        heat = matcher.similarity_map(template, query, [known])
        names = [strip_suffix(Path(scan).name) for scan in (args.template, args.query)]
        file = Path(args.output_dir) / f"match_{number}.png"
        title = f"{names[0]} -> {names[1]}\n{_sentence(row, args)}"
        plot_match(scans[0], scans[1], known, found, heat, title, file)
        files.append(file)
    return files
