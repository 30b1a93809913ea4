# SPDX-License-Identifier: Apache-2.0
"""How far matched points lie from where they belong, in mm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

from monai_ssl.apps.point_matching import match_points
from monai_ssl.apps.registration.points import grid_points
from monai_ssl.transforms.view_geometry import spacing_of, transform_points

__all__ = [
    "MatchingErrorMetric",
    "center_point_matching",
    "matching_distance",
    "matching_summary",
    "view_matching_error",
]

DEFINITIONS = ("plain", "min_radius", "radius")


def matching_distance(pred: Any, true: Any, spacing: Any = 1.0) -> Tensor:
    """Euclidean distance of points.

    Args:
        pred: (..., n).
        true: (..., n).
        spacing: mm per unit of both, one number or one for each axis.

    Returns:
        (...) float64, mm.
    """
    pred, true, spacing = (torch.as_tensor(v, dtype=torch.float64) for v in (pred, true, spacing))
    return ((pred - true) * spacing).square().sum(-1).sqrt()


def center_point_matching(distance: Any, radius: Any = None, threshold: float = 10.0, *, definition: str) -> Tensor:
    """Share of lesions whose centre was found (CPM).

    Two definitions of CPM@10mm are published. They differ by 8 points on equal predictions, so one has to be named.

    - "plain": distance <= threshold, as in UAE (arXiv 2311.15111).
    - "min_radius": distance <= min(radius, threshold), the evaluation of the deep lesion tracking benchmark (DLT).
    - "radius": distance < radius, CPM@Radius of the same benchmark; no threshold.

    Args:
        distance: (P,), mm.
        radius: (P,), mm, half of the longer diameter of each lesion (RECIST); not needed for "plain".
        threshold: mm.
        definition: one of the above.

    Returns:
        0-dim float64 in [0, 1].

    Raises:
        ValueError: an unknown definition, no radius where one is needed, no point, or a distance that is NaN.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    distance = torch.as_tensor(distance, dtype=torch.float64)
    if not distance.numel() or distance.isnan().any():
        raise ValueError(f"center_point_matching needs distances without NaN, got {distance.numel()} values")
    if definition == "plain":
        return (distance <= threshold).double().mean()
    if radius is None:
        raise ValueError(f"definition {definition!r} needs the radius of each lesion in mm")
    radius = torch.as_tensor(radius, dtype=torch.float64)
    found = distance < radius if definition == "radius" else distance <= radius.clamp_max(threshold)
    return found.double().mean()


def matching_summary(
    pred: Any, true: Any, radius: Any = None, threshold: float = 10.0, spacing: Any = 1.0
) -> dict[str, float]:
    """The mean Euclidean distance (MED) and every definition of center point matching, by name.

    Args:
        pred: (P, n).
        true: (P, n).
        radius: (P,), mm; None: without what needs it.
        threshold: mm.
        spacing: mm per unit of the points, one number or one for each axis.

    Returns:
        `points`, their number; `MED_mm` and `MED_sd_mm`, mean and population standard deviation of the distance;
        `MED_<axis>_mm` with the mean along x, y, z; `CPM@10mm_plain`, and with radii `CPM@10mm_min_radius` and
        `CPM@Radius`.

    Raises:
        ValueError: no points, or another number of them.
    """
    pred, true, spacing = (torch.as_tensor(v, dtype=torch.float64) for v in (pred, true, spacing))
    if pred.shape != true.shape or not len(pred):
        raise ValueError(f"points {tuple(pred.shape)} and {tuple(true.shape)} must be equal, (P, n), and not no points")
    distance = matching_distance(pred, true, spacing)
    along = ((pred - true) * spacing).abs().mean(0).tolist()
    at = f"CPM@{threshold:g}mm"
    summary = {"points": float(len(distance)), "MED_mm": float(distance.mean())}
    summary["MED_sd_mm"] = float(distance.std(correction=0))
    summary |= {f"MED_{axis}_mm": value for axis, value in zip("xyz", along)}
    summary[f"{at}_plain"] = float(center_point_matching(distance, None, threshold, definition="plain"))
    if radius is not None:
        share = center_point_matching(distance, radius, threshold, definition="min_radius")
        summary[f"{at}_min_radius"] = float(share)
        summary["CPM@Radius"] = float(center_point_matching(distance, radius, definition="radius"))
    return summary


def view_matching_error(
    maps: Sequence[Tensor], view_affine: Tensor, roi_size: Sequence[int], stride: int = 8
) -> Tensor:
    """Mean error of points of view 1 that are matched in view 2 of the same volume, where the truth is known.

    A measure of SAM (arXiv 2012.02383) without labels: a grid of voxels of view 1 (:func:`grid_points`) that lie in
    view 2. It shows less than landmarks of different patients would.

    Args:
        maps: (2 B, C, *size) each, finest first, row v B + b for view v of volume b.
        view_affine: index of each view -> mm, (B, 2, n + 1, n + 1).
        roi_size: voxels of a view along each axis.
        stride: voxels from point to point of the grid.

    Returns:
        0-dim float64, mm, over the points of all volumes; NaN if no point of view 1 lies in view 2.

    Raises:
        ValueError: rows that are not twice the matrices.
    """
    total, count = _errors(maps, view_affine, roi_size, stride).sum(0)
    return total / count


class MatchingErrorMetric(CumulativeIterationMetric):
    """:func:`view_matching_error` over all points of a validation, in mm; lower is better.

    With `IgniteMetricHandler` and the output of `AnatomicalEmbeddingNet`: `output_transform` is
    `lambda o: (o["pred"], o["label"])`.

    Args:
        roi_size: voxels of a view along each axis.
        stride: voxels from point to point of the grid.

    Shapes:
        called with the list of maps (2 B, C, *size) and either `view_affine` (B, 2, n + 1, n + 1) or a mapping that
        holds it; `aggregate()` is a 0-dim tensor over all points since `reset()`, of all processes, NaN without any.

    Raises:
        ValueError: on rows that are not twice the matrices, or `aggregate` without any volume.
    """

    def __init__(self, roi_size: Sequence[int], stride: int = 8) -> None:
        super().__init__()
        self.roi_size = tuple(int(s) for s in roi_size)
        self.stride = stride

    def __call__(self, y_pred: Sequence[Tensor], y: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """One row (sum of errors, points) for each volume, (B, 2)."""
        rows = self._compute_tensor(y_pred, y)  # MONAI would take the maps for a list of cases
        self.extend(rows)
        return rows

    def _compute_tensor(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Tensor:
        affine = y["view_affine"] if isinstance(y, Mapping) else y
        return _errors(y_pred, affine, self.roi_size, self.stride)

    def aggregate(self) -> Tensor:
        """Mean error in mm."""
        rows = self.get_buffer()
        if rows is None:
            raise ValueError("nothing to aggregate: the metric was not called since the last reset")
        total, count = rows.sum(0)
        return total / count


def _errors(maps: Sequence[Tensor], view_affine: Tensor, roi_size: Sequence[int], stride: int) -> Tensor:
    """(B, 2) float64: sum of the errors of a pair and its number of points."""
    volumes = len(view_affine)
    if view_affine.ndim != 4 or any(len(m) != 2 * volumes for m in maps):
        raise ValueError(
            f"maps of {[len(m) for m in maps]} rows do not belong to view_affine {tuple(view_affine.shape)}: "
            "two rows for each volume"
        )
    points = grid_points(roi_size, stride).double()
    rows = []
    for number, (first, second) in enumerate(view_affine.double().cpu()):
        true = transform_points(torch.linalg.inv(second) @ first, points)
        own, other = ([m[row].detach() for m in maps] for row in (number, volumes + number))
        rows.append(matched_errors(own, other, points, true, roi_size, spacing_of(second)))
    return torch.stack(rows).to(maps[0].device)


def matched_errors(
    own: Sequence[Tensor],
    other: Sequence[Tensor],
    points: Tensor,
    true: Tensor,
    roi_size: Sequence[int],
    spacing: Tensor,
) -> Tensor:
    """Errors of points of one view that are searched in another, where that shows them.

    Args:
        own: maps (C, *size) of the view of the points, finest first.
        other: of the view to search.
        points: voxels of the view, (P, n) float64.
        true: where they lie in the other view, likewise.
        roi_size: voxels of either view.
        spacing: of the other view, mm, (n,).

    Returns:
        sum of the errors in mm and number of the points, (2,) float64 on the CPU.
    """
    size = torch.tensor(list(roi_size), dtype=torch.float64)
    step = size / torch.tensor(other[0].shape[1:])
    shared = ((true >= 0) & (true <= size - 1)).all(1)
    cells, _score = match_points(own, other, (points[shared] + 0.5) / step - 0.5)
    found = (cells.cpu() + 0.5) * step - 0.5
    error = matching_distance(found, true[shared], spacing)
    return torch.stack([error.sum(), torch.tensor(float(len(error)), dtype=torch.float64)])
