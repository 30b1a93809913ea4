# SPDX-License-Identifier: Apache-2.0
"""Chest of the torso phantom: lungs with vessels, heart, airway and the great vessels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from monai_ssl.data.phantom_space import WHOLE, Array, Box, Labels, PhantomCanvas, smooth_max
from monai_ssl.data.phantom_subject import OrganShape, PhantomSubject
from monai_ssl.data.phantom_trunk import smooth_step, spine_axis

Points = Sequence[Sequence[float]] | NDArray[np.floating]


def shape_distance(canvas: PhantomCanvas, shape: OrganShape, box: Box) -> Array:
    """Distance in mm from the surface of a superellipsoid, negative inside, on a box of voxels."""
    offset = canvas.coordinates(box) - shape.centre.astype(np.float32)[:, None, None, None]
    own = np.tensordot((shape.rotation / shape.radii).T.astype(np.float32), offset, axes=1)  # (3, ...) in radii
    q = (np.abs(own) ** np.float32(shape.power)).sum(axis=0) ** np.float32(1 / shape.power)
    length = np.sqrt((offset * offset).sum(axis=0))
    return length - length / np.maximum(q, 1e-4)


def organ_distance(canvas: PhantomCanvas, shape: OrganShape, bend: float = 2.0) -> tuple[Box, Array]:
    """Box of an organ and the distance in mm from its surface, which the coarse texture bends by `bend` mm."""
    box = canvas.box(shape.corners(), 12)
    return box, shape_distance(canvas, shape, box) + bend * canvas.coarse[box]


def curve(canvas: PhantomCanvas, points: Points, step_mm: float = 12) -> NDArray[np.float64]:
    """World points (N, 3) on a smooth line through template points."""
    knots = np.asarray(points, dtype=np.float64)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    places = np.linspace(0, length[-1], max(2, round(length[-1] / step_mm) + 1))
    return canvas.warp.to_world(PchipInterpolator(length, knots)(places))


def diaphragm(subject: PhantomSubject, x: Array, y: Array) -> Array:
    """Height in mm of the diaphragm: two domes, the right one higher, that fall to the wall, most at the back."""
    right, left = subject.diaphragm
    share = (1 + np.tanh(x / 35)) / 2
    a, b = subject.half_axes
    falls = 38 + 24 * smooth_step(-y, -30, 60) - 16 * smooth_step(y, 10, 70)
    return left - 16 + share * (right - left + 14) - falls * ((x / a) ** 2 + (y / b) ** 2) ** 1.5


def paint_lungs(
    canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels, rng: np.random.Generator
) -> None:
    """Both lungs, denser towards the back, with a tree of vessels in each."""
    for name, side in (("lung_right", 1), ("lung_left", -1)):
        box, distance = organ_distance(canvas, subject.organs[name], bend=1.0)
        x, y, z = canvas.coordinates(box)
        distance = smooth_max(distance, wall[box] + 2, 6)
        distance = smooth_max(distance, diaphragm(subject, x, y) - z, 4)
        canvas.paint(box, distance, subject.tissue["lung"] - 0.45 * y, labels[name], texture=22)
        grow_vessels(canvas, np.array((34.0 * side, -10, 60)), side, labels[name], rng)


def grow_vessels(
    canvas: PhantomCanvas, root: NDArray[np.float64], side: int, label: int, rng: np.random.Generator
) -> None:
    """Branches from the root of a lung that part into thinner and shorter ones."""
    first = rng.normal((0.5 * side, -0.15, -0.2), (0.4, 0.85, 1.1), (12, 3))
    front = [(root, d / np.linalg.norm(d)) for d in first]
    radius, length = 4.2, 38.0
    lines, radii = [], []
    for children in (3, 2, 3, 0):
        following = []
        for start, direction in front:
            end = start + direction * length * rng.uniform(0.8, 1.2)
            lines += [start, end]
            radii.append((radius, radius * 0.8))
            for turned in direction + rng.normal(0, 0.5, (children, 3)):
                following.append((end, turned / np.linalg.norm(turned)))
        front, radius, length = following, radius * 0.74, length * 0.82
    for ends, width in zip(canvas.warp.to_world(np.array(lines)).reshape(-1, 2, 3), radii):
        canvas.tube(ends, width, 10, within=label)


def paint_mediastinum(canvas: PhantomCanvas, subject: PhantomSubject, label: int) -> None:
    """What lies between the lungs but for the heart and the aorta: veins, lung arteries, gullet and windpipe."""
    blood = subject.tissue["venous"]
    for points, radius, hu in (
        ([(-3, -36, 250), (-6, -36, 90), (-16, -28, 10), (-24, -5, -30)], 7.0, 40.0),
        ([(22, 8, 20), (22, 6, 70), (19, 8, 130)], 9.0, blood),
        ([(-16, 40, 40), (-16, 30, 70), (-14, 14, 78)], 12.0, blood),
        ([(-14, 14, 78), (8, 0, 72), (38, -8, 62)], 9.5, blood),
        ([(-14, 14, 78), (-26, -4, 76), (-40, -14, 66)], 9.5, blood),
    ):
        canvas.tube(curve(canvas, points), radius, hu, label, texture=4)
    airways = (
        (curve(canvas, [(2, -14, 250), (1, -20, 92)]), 8.0),
        (curve(canvas, [(1, -20, 92), (20, -20, 76), (40, -18, 60)]), 6.0),
        (curve(canvas, [(1, -20, 92), (-20, -22, 76), (-40, -20, 62)]), 5.5),
    )
    for line, radius in airways:
        canvas.tube(line, radius + 2, 35, label)
    for line, radius in airways:
        canvas.tube(line, radius, -985)


def paint_heart(canvas: PhantomCanvas, subject: PhantomSubject, labels: Labels) -> None:
    """Heart on the diaphragm, with four chambers, in its fat."""
    hu, shape = subject.tissue, subject.organs["heart"]
    box, distance = organ_distance(canvas, shape)
    x, y, z = canvas.coordinates(box)
    distance = smooth_max(distance, diaphragm(subject, x, y) - 9 - z, 8)
    canvas.paint(box, distance - 3, hu["fat"] + 10, labels["body"], texture=10)
    canvas.paint(box, distance, hu["myocardium"], labels["heart"], texture=5)
    for offset, radii, blood in (
        ((-0.3, 0.15, -0.25), (0.42, 0.42, 0.52), "arterial"),
        ((0.35, 0.3, -0.1), (0.34, 0.4, 0.6), "venous"),
        ((-0.15, -0.5, 0.4), (0.5, 0.3, 0.3), "arterial"),
        ((0.55, -0.2, 0.35), (0.28, 0.4, 0.4), "venous"),
    ):
        inner = OrganShape(shape.at(*offset), shape.radii * radii, shape.rotation, 2.3)
        canvas.paint(*organ_distance(canvas, inner, bend=1.5), hu[blood], texture=4)


def paint_neck(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """What fills the upper opening of the chest: muscles parted by fat, vessels to the head, and the collar bones."""
    hu, label = subject.tissue, labels["body"]
    muscle = 2 - 18 * np.abs(canvas.coarse)  # clefts of fat where the texture changes its sign
    canvas.paint(WHOLE, np.maximum(np.maximum(muscle, wall + 1), 138 - canvas.template[2]), hu["muscle"], texture=8)
    for side in (1, -1):
        artery = [(5 * side, 8, 106), (17 * side, 4, 140), (21 * side, 2, 250)]
        canvas.tube(curve(canvas, artery), 4.5, hu["arterial"], label)
        vein = [(18, 9, 120), (26 * side, 14, 150), (30 * side, 12, 250)]
        canvas.tube(curve(canvas, vein), 6, hu["venous"], label)
        collar = [(20 * side, 72, 112), (60 * side, 62, 134), (104 * side, 26, 158), (125 * side, 10, 165)]
        canvas.tube(curve(canvas, collar), 6, hu["cortical"] * 0.8, label)
        canvas.tube(curve(canvas, collar), 3.5, hu["spongy"])


def aorta_points(subject: PhantomSubject) -> list[tuple[float, float, float]]:
    """Template points on the axis of the aorta from the heart to its fork; below the arch it follows the spine."""
    arch = [(-4.0, 20.0, 48.0), (10.0, 22.0, 76.0), (6.0, 12.0, 100.0), (-8.0, -10.0, 110.0), (-19.0, -32.0, 100.0)]
    heights = np.array((70, 20, -30, -80, -120, -148), dtype=np.float32)
    x, y = spine_axis(subject, heights)
    beside = (-22, -20, -12, -7, -5, -4)
    return arch + [(float(a + d), float(b + 28), float(h)) for a, b, d, h in zip(x, y, beside, heights)]


def paint_vessels(canvas: PhantomCanvas, subject: PhantomSubject, labels: Labels) -> None:
    """Aorta with its fork, and the inferior vena cava."""
    hu = subject.tissue
    aorta = curve(canvas, aorta_points(subject))
    canvas.tube(aorta, np.linspace(14.5, 8.5, len(aorta)), hu["arterial"], labels["aorta"], texture=4)
    fork = aorta_points(subject)[-1]
    heights = np.array((-152, -100, -50), dtype=np.float32)
    x, y = spine_axis(subject, heights)
    cava = [(float(a + 19), float(b + 24), float(h)) for a, b, h in zip(x, y, heights)]
    body = labels["body"]
    canvas.tube(curve(canvas, [*cava, (22, -12, -12), (22, 2, 12)]), 10, hu["venous"], body, texture=4)
    for side in (1, -1):
        leg = [(34.0 * side, fork[1] + 2, -196.0), (46.0 * side, fork[1] + 8, -250.0)]
        canvas.tube(curve(canvas, [fork, *leg]), 6.5, hu["arterial"], body)
        canvas.tube(curve(canvas, [cava[0], *[(a, b - 11, c) for a, b, c in leg]]), 7, hu["venous"], body)
