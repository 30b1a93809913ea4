# SPDX-License-Identifier: Apache-2.0
"""Abdomen of the torso phantom: bowel, stomach, liver, gallbladder, pancreas, spleen and kidneys."""

from __future__ import annotations

import numpy as np

from monai_ssl.data.phantom_chest import curve, diaphragm, organ_distance, shape_distance
from monai_ssl.data.phantom_space import Array, Labels, PhantomCanvas, smooth_max
from monai_ssl.data.phantom_subject import OrganShape, PhantomSubject

# Template points on the axis of the colon, from the right flank across the front to the left one.
COLON = [
    *((88, 8, -205), (94, 2, -178), (93, 8, -150), (84, 28, -124), (45, 50, -128), (0, 54, -136)),
    *((-45, 48, -118), (-80, 30, -104), (-94, 8, -108), (-99, -14, -132), (-98, -14, -160), (-88, -4, -205)),
]


def paint_bowel(canvas: PhantomCanvas, subject: PhantomSubject, labels: Labels, rng: np.random.Generator) -> None:
    """Colon as a frame with gas at the front, loops of small bowel inside it, and vessels of the mesentery."""
    hu, label = subject.tissue, labels["bowel"]
    forward = np.array((0, 1, 0))
    lines = []
    low, high = np.array((-72, -18, -225)), np.array((72, 50, -136))
    for _ in range(15):
        walk = rng.uniform(low, high) + np.cumsum(rng.normal(0, (20, 9, 12), (6, 3)), axis=0)
        loop = high - np.abs((walk - low) % (2 * (high - low)) - (high - low))  # reflected at the borders
        lines.append((curve(canvas, loop.tolist()), rng.uniform(8, 12), rng.random() < 0.25))
    for root in rng.uniform((-50, -5, -185), (50, 30, -120), (16, 3)):
        canvas.tube(canvas.warp.to_world([(0, -12, -105), root]), (2.5, 1.2), hu["venous"] * 0.8)
    for line, radius, _ in lines:
        canvas.tube(line, radius, hu["bowel"] + 25, label)
    for line, radius, gas in lines:
        canvas.tube(line, radius - 2.5, 18, texture=18)
        if gas:
            canvas.tube(line + 0.35 * radius * forward, 0.5 * radius, -930)
    knots = np.asarray(COLON) + rng.normal(0, 4, (len(COLON), 3))
    colon = curve(canvas, knots.tolist())
    radii = rng.uniform(14, 20, len(colon))
    canvas.tube(colon, radii, hu["bowel"] + 10, label)
    canvas.tube(colon, radii - 3, -20, texture=70)
    filled = 0.62 * radii * rng.uniform(0.5, 1, len(colon))
    canvas.tube(colon + 0.3 * radii[:, None] * forward, filled, -900, texture=30)


def paint_stomach(canvas: PhantomCanvas, subject: PhantomSubject, labels: Labels) -> None:
    """Stomach under the left dome: a wall, fluid, and gas at the front because the subject lies on the back."""
    shape = subject.organs["stomach"]
    box, distance = organ_distance(canvas, shape, bend=3.5)
    x, y, z = canvas.coordinates(box)
    distance = smooth_max(distance, z - diaphragm(subject, x, y) + 4, 8)
    canvas.paint(box, distance, subject.tissue["bowel"] + 20, labels["stomach"])
    canvas.paint(box, distance + 4, 22, texture=14)
    level = np.float32(shape.centre[1] + 0.3 * shape.radii[1])
    canvas.paint(box, np.maximum(distance + 4, level - y), -940)


def paint_liver(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """Liver under the right dome with its veins, and the gallbladder below it."""
    hu, shape = subject.tissue, subject.organs["liver"]
    box, distance = organ_distance(canvas, shape, bend=3.0)
    x, y, z = canvas.coordinates(box)
    low = -128 + (112 - x) * 0.62 - 0.45 * y + np.float32(shape.centre[2] + 42)
    for limit in (wall[box] + 3, z - diaphragm(subject, x, y) + 3, (low - z) * 0.85):
        distance = smooth_max(distance, limit, 12)
    canvas.paint(box, distance, hu["liver"], labels["liver"], texture=6)
    gate = (24.0, 8.0, -62.0)
    vein = hu["venous"] if hu["venous"] > 60 else 0.72 * hu["liver"]
    ends = ((58, 18, -50), (86, 30, -66), (82, -22, -58), (52, -34, -78), (4, 36, -48))
    for end in ends:
        middle = np.add(gate, end) / 2 + (0, 0, 6)
        canvas.tube(curve(canvas, [gate, tuple(middle), end]), 3.2, vein, within=labels["liver"])
    for end in ((92, 20, -36), (70, 44, -38), (30, 40, -34)):
        canvas.tube(canvas.warp.to_world([(24, -18, -18), end]), (4.5, 2.0), vein, within=labels["liver"])
    canvas.tube(curve(canvas, [(8, 6, -98), (14, 4, -82), gate]), 6.5, hu["venous"], labels["body"])
    canvas.paint(*organ_distance(canvas, subject.organs["gallbladder"]), 8, labels["body"])


def paint_upper_organs(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """Pancreas, spleen, kidneys with cortex, medulla and sinus, and the psoas muscles."""
    hu = subject.tissue
    pancreas = curve(canvas, [(34, 12, -112), (26, 16, -98), (0, 18, -90), (-30, 4, -80), (-62, -18, -70)])
    canvas.tube(pancreas, np.linspace(13, 8, len(pancreas)), hu["pancreas"], labels["body"], texture=16)
    box, distance = organ_distance(canvas, subject.organs["spleen"])
    x, y, z = canvas.coordinates(box)
    for limit in (wall[box] + 3, z - diaphragm(subject, x, y) + 3):
        distance = smooth_max(distance, limit, 8)
    canvas.paint(box, distance, hu["spleen"], labels["spleen"], texture=6)
    for side, name in ((1, "kidney_right"), (-1, "kidney_left")):
        psoas = curve(canvas, [(22.0 * side, -56, -88), (36.0 * side, -52, -140), (52.0 * side, -38, -215)])
        canvas.tube(psoas, np.linspace(7, 21, len(psoas)), hu["muscle"] + 4, labels["body"], texture=10)
        shape = subject.organs[name]
        box, distance = organ_distance(canvas, shape, bend=1.5)
        # the sinus opens towards the spine: local x is the shape's own lateral axis
        hollow = OrganShape(shape.at(-0.85 * side, 0.1, 0), shape.radii * (0.62, 0.45, 0.42), shape.rotation, 2.0)
        sinus = shape_distance(canvas, hollow, box)
        distance = smooth_max(distance, -sinus, 5)
        canvas.paint(box, distance - 7, hu["fat"], labels["body"], texture=8)
        canvas.paint(box, distance, hu["cortex"], labels[name], texture=6)
        pyramids = distance + 9 + 6 * canvas.fine[box].clip(-1, 1)
        canvas.paint(box, pyramids, hu["medulla"], texture=6)
        canvas.tube(curve(canvas, [tuple(hollow.centre), (14.0 * side, -32, -98)]), 3.5, hu["venous"], labels["body"])
