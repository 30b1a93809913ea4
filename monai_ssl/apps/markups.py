# SPDX-License-Identifier: Apache-2.0
"""Points as 3D Slicer keeps them, in files `.mrk.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from monai_ssl.data.files import atomic_path

__all__ = ["read_markups", "write_markups"]

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
_TO_RAS = {"RAS": (1.0, 1.0, 1.0), "0": (1.0, 1.0, 1.0), "LPS": (-1.0, -1.0, 1.0), "1": (-1.0, -1.0, 1.0)}


def write_markups(
    file: str | Path,
    points: Any,
    labels: Sequence[str],
    descriptions: Sequence[str] | None = None,
    selected: Sequence[bool] | None = None,
) -> Path:
    """Write points as one list of fiducials, which 3D Slicer opens over the scan.

    Args:
        file: ending in `.mrk.json`; its folder is made.
        points: (P, 3), RAS mm; the file holds LPS.
        labels: one name for each.
        descriptions: one text for each; None: empty.
        selected: one for each; None: all.

    Raises:
        ValueError: points that are not (P, 3) and finite, or lists of another length.
    """
    rows = torch.as_tensor(points, dtype=torch.float64)
    descriptions = [""] * len(rows) if descriptions is None else descriptions
    selected = [True] * len(rows) if selected is None else selected
    if rows.ndim != 2 or rows.shape[1] != 3 or not all(map(math.isfinite, rows.flatten().tolist())):
        raise ValueError(f"markups need finite points (P, 3), got {tuple(rows.shape)}")
    if not len(rows) == len(labels) == len(descriptions) == len(selected):
        raise ValueError(f"{len(rows)} points, {len(labels)} labels, {len(descriptions)} descriptions")
    control_points = [
        {
            "id": str(number),
            "label": str(label),
            "description": str(text),
            "position": [-x, -y, z],
            "selected": bool(chosen),
            "positionStatus": "defined",
        }
        for number, ((x, y, z), label, text, chosen) in enumerate(
            zip(rows.tolist(), labels, descriptions, selected), start=1
        )
    ]
    markup = {
        "type": "Fiducial",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "controlPoints": control_points,
    }
    with atomic_path(Path(file)) as temporary:
        temporary.write_text(json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=2) + "\n", encoding="utf-8")
    return Path(file)


def read_markups(file: str | Path) -> tuple[torch.Tensor, list[str]]:
    """The defined points of a `.mrk.json` of 3D Slicer, of any kind of markup.

    Args:
        file: its coordinate system may be LPS or RAS; LPS if the file does not say.

    Returns:
        (P, 3) float64, RAS mm, and their labels.

    Raises:
        OSError: there is no such file.
        ValueError: it is no file of markups, or has coordinates other than mm.
    """
    points: list[list[float]] = []
    labels: list[str] = []
    try:
        for markup in json.loads(Path(file).read_text(encoding="utf-8"))["markups"]:
            signs = _TO_RAS[str(markup.get("coordinateSystem", "LPS"))]
            if markup.get("coordinateUnits", "mm") != "mm":
                raise ValueError(f"coordinates in {markup['coordinateUnits']!r}, expected mm")
            for point in markup.get("controlPoints", ()):
                if point.get("positionStatus", "defined") == "defined":
                    points.append([s * float(v) for s, v in zip(signs, point["position"], strict=True)])
                    labels.append(str(point.get("label", len(labels) + 1)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of markups of 3D Slicer ({type(error).__name__}: {error})") from error
    return torch.tensor(points, dtype=torch.float64).reshape(-1, 3), labels
