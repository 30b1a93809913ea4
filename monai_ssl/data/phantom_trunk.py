# SPDX-License-Identifier: Apache-2.0
"""Trunk of the torso phantom: table, body wall, spine, ribs, sternum, shoulder blades and pelvis."""

from __future__ import annotations

import numpy as np

from monai_ssl.data.phantom_space import WHOLE, Array, Labels, PhantomCanvas, smooth_max
from monai_ssl.data.phantom_subject import PhantomSubject

# Height in mm of the middle of each vertebra in the template, from the fifth lumbar one up.
VERTEBRAE: dict[str, float] = {f"L{k}": -90.0 - 25.5 * (k - 1) for k in range(5, 0, -1)}
VERTEBRAE |= {f"T{k}": 160.0 - 20.5 * (k - 1) for k in range(12, 0, -1)}
VERTEBRAE |= {"C7": 179.0, "C6": 196.0, "C5": 212.0}
RIB_PITCH = 20.5  # mm, as the thoracic vertebrae
# Ribs 8 to 12 end before they reach the breastbone: y of the end in mm, template.
RIB_ENDS = np.array([200] * 7 + [52, 42, 28, -15, -45], dtype=np.float32)


def smooth_step(values: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def wall_distance(subject: PhantomSubject, x: Array, y: Array, z: Array) -> Array:
    """Distance in mm from the inner surface of the trunk's wall, negative in the cavity: a superellipse per height."""
    narrow = 1 - 0.26 * smooth_step(z, 40, 200) + 0.02 * smooth_step(-z, 0, 190)
    a, b = subject.half_axes
    rho = np.hypot(x, y)
    q = ((np.abs(x) / a) ** 2.8 + (np.abs(y) / b) ** 2.8) ** np.float32(1 / 2.8)
    return rho - rho * narrow / np.maximum(q, 1e-4)


def spine_axis(subject: PhantomSubject, z: Array) -> tuple[Array, Array]:
    """Template x and y in mm of the vertebral bodies' axis at height z: slight scoliosis, kyphosis and lordosis."""
    sway, depth = subject.curvature
    return sway * np.sin(z * np.float32(np.pi / 190)), -50 - depth * np.cos((z - 40) * np.float32(np.pi / 190))


def back_plane(subject: PhantomSubject) -> float:
    """Template y in mm to which the back is flattened by lying on it."""
    return -subject.half_axes[1] - 17 - 0.8 * subject.fat_mm


def paint_table(canvas: PhantomCanvas, subject: PhantomSubject) -> None:
    """A hollow curved table with a mattress under the subject's back, fixed to the scanner and not to the subject."""
    back = subject.warp.to_world([[0, back_plane(subject), z] for z in (-60, 0, 60)])[:, 1].mean()
    x, y = canvas.axes[0][:, None, None], canvas.axes[1][None, :, None]
    top = np.float32(back - 5) + x * x / 1500  # (X, 1, 1)
    sides = np.abs(x) - 202
    mattress = np.maximum(np.abs(y - top) - 5, sides + 6)
    shell = np.maximum(np.maximum(y - top + 5, top - 34 - y + x * x / 5000), sides)
    depth = canvas.image.shape[2]
    for distance, hu in ((mattress, -920), (shell, 40), (shell + 4.5, -965)):
        canvas.paint(WHOLE, np.repeat(distance, depth, axis=2), hu)


def paint_body(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """Skin, subcutaneous fat, the muscular wall and the fat that fills the cavity."""
    x, y, z = canvas.template
    upper = smooth_step(z, 30, 130)
    back = smooth_step(-y, 20, 80)
    muscle = 12 + 15 * upper + 5 * back + 1.5 * canvas.coarse
    flank = 0.75 + 0.35 * back - 0.3 * upper
    fat = np.maximum(subject.fat_mm * flank + 1.5 * canvas.coarse, 3)
    skin = smooth_max(wall - muscle - fat - 2, np.float32(back_plane(subject)) - y, 25)
    hu = subject.tissue
    canvas.paint(WHOLE, skin, 10, labels["body"])
    canvas.paint(WHOLE, skin + 2, hu["fat"], texture=7)
    canvas.paint(WHOLE, smooth_max(wall - muscle, skin + 4, 10), hu["muscle"], texture=11)
    # thin fat parts the layers of the abdominal wall and the muscles of the shoulder
    low, high = np.abs(wall - 7) + smooth_step(z, -40, -15), np.abs(wall - 13) + smooth_step(-z, -95, -65)
    parting = np.minimum(low, high)
    canvas.paint(WHOLE, parting - 0.8, hu["fat"], opacity=0.7)
    canvas.paint(WHOLE, wall, hu["fat"] + 4, texture=14)


def paint_ribs(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """Twelve pairs of ribs as oblique rings in the wall, with cartilage from the upper seven to the breastbone."""
    x, y, z = canvas.template
    raised = (VERTEBRAE["T1"] - (z + subject.rib_slope * (y + 70))) / RIB_PITCH  # 0 at the first rib
    number = np.clip(np.rint(raised), 0, 11)
    ring = (np.hypot((wall - 5.5) / 3.7, (raised - number) * RIB_PITCH / 6.2) - 1) * 4.2
    aside = np.abs(x)
    ring = np.maximum(ring, np.where(y < 0, 25 - aside, -9))
    ring = np.maximum(ring, y - RIB_ENDS[number.astype(np.intp)])
    front = np.where(y > 0, 52 - aside, -9)
    canvas.paint(WHOLE, np.maximum(ring, -front), 105, labels["body"], texture=15)
    bone = np.maximum(ring, front)
    canvas.paint(WHOLE, bone, subject.tissue["cortical"] * 0.85, labels["ribs"])
    canvas.paint(WHOLE, bone + 2.2, subject.tissue["spongy"] + 60, texture=30)


def paint_plates(canvas: PhantomCanvas, subject: PhantomSubject, wall: Array, labels: Labels) -> None:
    """Breastbone, shoulder blades and the wings of the pelvis: plates that follow the wall."""
    x, y, z = canvas.template
    aside = np.abs(x)
    breast = np.maximum(np.abs(wall - 4) - 5, np.abs(z - 42) - 62)
    breast = smooth_max(np.maximum(breast, -y), aside - 15 - 9 * smooth_step(z, 70, 90), 4)
    blade = (np.hypot((aside - 88) / 36, (z - 108) / 50) - 1) * 36
    blade = np.maximum(smooth_max(np.abs(wall - 15) - 2.6, blade, 3), y)
    crest = z + 138 + ((y + 22) / 58) ** 2 * 42
    wing = smooth_max(np.abs(wall + 9) - 4.5 - 3 * smooth_step(crest, -22, 0), np.maximum(crest, 62 - aside), 4)
    hu = subject.tissue
    for distance, name, shell in ((breast, "sternum", 2.2), (blade, "body", 2.2), (wing, "pelvis", 2.5)):
        canvas.paint(WHOLE, distance, hu["cortical"] * 0.75, labels[name])
        canvas.paint(WHOLE, distance + shell, hu["spongy"], texture=30)


def paint_spine(canvas: PhantomCanvas, subject: PhantomSubject, labels: Labels) -> None:
    """Vertebral bodies with discs between, the spinal canal, arches and processes, and the muscles beside them."""
    heights = np.array(list(VERTEBRAE.values()))
    column = [[x, y, z] for x in (-40, 40) for y in (-125, -30) for z in np.linspace(-260, 260, 9)]
    box = canvas.box(np.array(column), 6)
    x, y, z = canvas.coordinates(box)
    if not z.size:
        return
    centre_x, centre_y = spine_axis(subject, z)
    x, y = np.abs(x - centre_x), y - centre_y
    size = 0.92 + 0.22 * smooth_step(-z, -120, 140)

    def within_level(height: Array) -> tuple[Array, Array]:
        """Distance in mm from the middle of the nearest vertebra, and half the height of its body."""
        index = np.interp(height, heights, np.arange(len(heights))).astype(np.float32)
        pitch = np.where(height < -78, np.float32(25.5), np.float32(RIB_PITCH))
        return np.abs(index - np.rint(index)) * pitch, pitch / 2 - 2.6

    hu, label = subject.tissue, labels["spine"]
    muscle = (np.hypot((x - 26) / 23, (y + 32) / 16) - 1) * 18
    canvas.paint(box, muscle, hu["muscle"] + 4, labels["body"], texture=14)
    away, half = within_level(z)
    waist = size * (0.93 + 0.07 * (away / half) ** 2)
    rim = (np.hypot(x / (20 * waist), y / (15.5 * waist)) - 1) * 16
    canvas.paint(box, rim + 1, 85, label, texture=8)
    body = smooth_max(rim, away - half, 2)
    canvas.paint(box, body, hu["cortical"], label)
    canvas.paint(box, body + 1.4, hu["spongy"], texture=28)
    hole = np.hypot(x, y + 23 * size)
    slanted, half = within_level(z - 0.45 * np.minimum(y + 28, 0))
    arch = np.maximum(np.abs(hole - 11.5) - 2.6, slanted - half + 1)
    spinous = smooth_max(
        smooth_max(x - 1.5 - 0.25 * (y + 52).clip(0, 9), slanted - half + 2, 2), np.abs(y + 41) - 11, 3
    )
    transverse = smooth_max((np.hypot(y + 21 + 0.35 * x, slanted) - 4.8).astype(np.float32), x - 30 * size, 4)
    for distance in (arch, spinous, transverse):
        canvas.paint(box, distance, hu["cortical"] * 0.75, label, texture=30)
    canvas.paint(box, hole - 8.5, 22, labels["body"])
    canvas.paint(box, hole - 4.5, 42)
