# SPDX-License-Identifier: Apache-2.0
"""A procedural torso CT: subjects from a seed, on any voxel grid, with labels and landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_ssl.data.phantom_abdomen import paint_bowel, paint_liver, paint_stomach, paint_upper_organs
from monai_ssl.data.phantom_chest import (
    aorta_points,
    paint_heart,
    paint_lungs,
    paint_mediastinum,
    paint_neck,
    paint_vessels,
)
from monai_ssl.data.phantom_space import PhantomCanvas
from monai_ssl.data.phantom_subject import PHASES, PhantomSubject, draw_subject
from monai_ssl.data.phantom_trunk import (
    VERTEBRAE,
    paint_body,
    paint_plates,
    paint_ribs,
    paint_spine,
    paint_table,
    spine_axis,
    wall_distance,
)

PHANTOM_LABELS: dict[str, int] = {
    "background": 0,
    "body": 1,
    "lung_right": 2,
    "lung_left": 3,
    "heart": 4,
    "aorta": 5,
    "liver": 6,
    "spleen": 7,
    "kidney_right": 8,
    "kidney_left": 9,
    "stomach": 10,
    "bowel": 11,
    "spine": 12,
    "ribs": 13,
    "sternum": 14,
    "pelvis": 15,
}
PHANTOM_PHASES = PHASES
FIELD_OF_VIEW_MM = (384.0, 320.0, 384.0)


class PhantomVolume(NamedTuple):
    """One subject: image (X, Y, Z) in HU, label map (X, Y, Z), affine (4, 4) voxel -> RAS+ mm, landmarks in RAS+ mm."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    landmarks: dict[str, NDArray[np.float64]]


def torso_phantom(
    subject: int,
    size: int | Sequence[int] = (128, 128, 128),
    spacing: float | Sequence[float] | None = None,
    seed: int = 0,
) -> PhantomVolume:
    """CT of the torso of subject `subject`, from the neck to the upper pelvis, lying on a table.

    Anatomy is a function of `(seed, subject)` alone; size and spacing choose the grid on which it is sampled, and only
    the quantum noise belongs to the grid. Without a spacing any grid covers the same field of view, 384 x 320 x 384 mm
    around the world's origin; a smaller field may leave organs and landmarks outside. Values are whole HU in
    [-1024, 3071]. A landmark's name begins with the name of the label it lies in (`kidney_left`, `spine_T8`). A volume
    of 128^3 takes about 0.7 s on one core, one of 64^3 0.2 s.

    Args:
        subject: number of the subject, from 0.
        size: voxels per axis (x, y, z).
        spacing: mm per voxel and axis; None divides the field of view by the size.
        seed: of the whole population.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    size, step = phantom_grid(size, spacing)
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -0.5 * np.multiply(step, np.subtract(size, 1))
    drawn, textures, branches, noise = _generators(subject, seed)
    person = draw_subject(drawn)
    canvas = PhantomCanvas(affine, size, person.warp, textures)
    _paint(canvas, person, branches)
    return PhantomVolume(canvas.finish(person.noise_hu, noise), canvas.label, affine, _landmarks(person))


def phantom_phase(subject: int, seed: int = 0) -> str:
    """The contrast phase of a subject of `torso_phantom`, one of `PHANTOM_PHASES`: a class for the whole volume.

    Args:
        subject: number of the subject, from 0.
        seed: of the whole population.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    return draw_subject(_generators(subject, seed)[0]).phase


def _generators(subject: int, seed: int) -> list[np.random.Generator]:
    """Of the subject, its textures, its branches and the noise."""
    for name, value in (("subject", subject), ("seed", seed)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} must be a whole number from 0, got {value!r}.")
    return [np.random.default_rng(child) for child in np.random.SeedSequence([int(seed), int(subject)]).spawn(4)]


def phantom_grid(
    size: int | Sequence[int], spacing: float | Sequence[float] | None
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Size and spacing in full: three voxel counts and three distances in mm.

    Raises:
        ValueError: not one or three numbers, or one that is not positive.
    """
    counts = np.asarray(size)
    if counts.shape not in ((), (3,)) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise ValueError(f"size must be one or three whole numbers from 1, got {size!r}.")
    counts = np.broadcast_to(counts, 3)
    step = np.divide(FIELD_OF_VIEW_MM, counts) if spacing is None else np.asarray(spacing)
    if step.shape not in ((), (3,)) or step.dtype.kind not in "iuf" or not (np.isfinite(step) & (step > 0)).all():
        raise ValueError(f"spacing must be one or three positive numbers in mm or None, got {spacing!r}.")
    nx, ny, nz = counts.tolist()
    dx, dy, dz = np.broadcast_to(step.astype(float), 3).tolist()
    return (nx, ny, nz), (dx, dy, dz)


def _paint(canvas: PhantomCanvas, person: PhantomSubject, rng: np.random.Generator) -> None:
    """Paint from the outside in; what comes later covers what came before."""
    wall = wall_distance(person, *canvas.template)
    paint_table(canvas, person)
    paint_body(canvas, person, wall, PHANTOM_LABELS)
    paint_neck(canvas, person, wall, PHANTOM_LABELS)
    paint_lungs(canvas, person, wall, PHANTOM_LABELS, rng)
    paint_mediastinum(canvas, person, PHANTOM_LABELS["body"])
    paint_bowel(canvas, person, PHANTOM_LABELS, rng)
    paint_stomach(canvas, person, PHANTOM_LABELS)
    paint_liver(canvas, person, wall, PHANTOM_LABELS)
    paint_upper_organs(canvas, person, wall, PHANTOM_LABELS)
    paint_heart(canvas, person, PHANTOM_LABELS)
    paint_vessels(canvas, person, PHANTOM_LABELS)
    paint_ribs(canvas, person, wall, PHANTOM_LABELS)
    paint_plates(canvas, person, wall, PHANTOM_LABELS)
    paint_spine(canvas, person, PHANTOM_LABELS)


def _landmarks(person: PhantomSubject) -> dict[str, NDArray[np.float64]]:
    """World points inside the organ that their name begins with."""
    organs = person.organs
    inside = {  # offsets in radii, away from what else cuts into the organ
        "lung_right": (0.35, 0, 0.35),
        "lung_left": (-0.35, 0, 0.35),
        "heart": (0, 0, -0.2),
        "liver": (0.3, 0, 0),
        "spleen": (-0.15, 0.3, -0.15),
        "kidney_right": (0.25, 0, 0),
        "kidney_left": (-0.25, 0, 0),
        "stomach": (0, 0, 0),
    }
    points = {name: organs[name].at(*offset) for name, offset in inside.items()}
    points["aorta_descending"] = np.array(aorta_points(person)[6])
    for name in ("T2", "T4", "T6", "T8", "T10", "T12", "L1", "L2", "L3"):
        height = np.full(1, VERTEBRAE[name], dtype=np.float32)
        points[f"spine_{name}"] = np.concatenate([*spine_axis(person, height), height])
    world = person.warp.to_world(np.stack(list(points.values())))
    return dict(zip(points, world))
