# SPDX-License-Identifier: Apache-2.0
"""What makes one subject of the torso phantom differ from the next: habitus, organs and contrast phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from monai_ssl.data.phantom_space import PhantomWarp

Vector = NDArray[np.float64]
PHASES = ("plain", "arterial", "venous")  # of contrast: none, arterial, portal venous

# Superellipsoids of the template: centre and radii in mm (RAS+, origin inside the body), rotation in degrees, power.
ORGANS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]] = {
    "lung_right": ((73, -6, 18), (66, 88, 142), (0, 0, 0), 2.6),
    "lung_left": ((-73, -8, 18), (63, 87, 142), (0, 0, 0), 2.6),
    "heart": ((-17, 24, 24), (50, 40, 56), (20, 35, 25), 2.2),
    "liver": ((58, 4, -42), (95, 84, 74), (0, 8, 0), 2.4),
    "spleen": ((-88, -28, -74), (26, 45, 46), (15, -15, 18), 2.2),
    "stomach": ((-52, 24, -50), (42, 36, 56), (-15, -28, 0), 2.2),
    "kidney_right": ((60, -42, -107), (27, 24, 48), (8, -12, -25), 2.1),
    "kidney_left": ((-60, -44, -96), (27, 24, 50), (8, 12, 25), 2.1),
    "gallbladder": ((47, 42, -92), (13, 14, 26), (30, 0, 0), 2.0),
}


@dataclass(frozen=True)
class OrganShape:
    """A superellipsoid of the template: centre and radii in mm, rotation matrix (columns are its axes) and power."""

    centre: Vector
    radii: Vector
    rotation: Vector
    power: float

    def corners(self) -> Vector:
        """Corners (8, 3) of a box that holds the shape."""
        reach = np.abs(self.rotation) @ self.radii
        signs = np.stack(np.meshgrid(*3 * ((-1, 1),), indexing="ij"), axis=-1).reshape(-1, 3)
        return self.centre + signs * reach

    def at(self, *offset: float) -> Vector:
        """Template point at an offset given in radii along the shape's own axes."""
        return self.centre + self.rotation @ (np.asarray(offset) * self.radii)


@dataclass(frozen=True)
class PhantomSubject:
    """All random choices of one subject that do not depend on the voxel grid.

    Lengths are in mm of the template, values in HU. `half_axes` are those of the trunk's inner wall, `tissue` maps a
    material to its HU under this subject's contrast `phase`, one of `PHASES`.
    """

    warp: PhantomWarp
    organs: dict[str, OrganShape]
    half_axes: tuple[float, float]
    fat_mm: float
    diaphragm: tuple[float, float]
    rib_slope: float
    curvature: tuple[float, float]
    tissue: dict[str, float]
    phase: str
    noise_hu: float


def draw_subject(rng: np.random.Generator) -> PhantomSubject:
    """Draw one subject."""
    size = float(np.clip(rng.normal(1, 0.04), 0.92, 1.06))
    warp = PhantomWarp(rng, size * np.clip(rng.normal(1, 0.03, 3), 0.95, 1.04))
    organs = {name: _draw_organ(rng, *shape) for name, shape in ORGANS.items()}
    return PhantomSubject(
        warp=warp,
        organs=organs,
        half_axes=(float(rng.uniform(126, 138)), float(rng.uniform(78, 90))),
        fat_mm=float(rng.triangular(5, 11, 24)),
        diaphragm=(float(rng.uniform(-12, 12)), float(rng.uniform(-12, 8))),
        rib_slope=float(rng.uniform(0.36, 0.52)),
        curvature=(float(rng.uniform(-5, 5)), float(rng.uniform(4, 12))),
        **_draw_tissue(rng),
        noise_hu=float(rng.uniform(8, 18)),
    )


def _draw_organ(
    rng: np.random.Generator,
    centre: tuple[float, ...],
    radii: tuple[float, ...],
    angles: tuple[float, ...],
    power: float,
) -> OrganShape:
    """Vary place, size and direction of an organ; large ones move less than their size would allow."""
    # a volume's spread is three times that of the common factor
    factor = np.clip(rng.normal(1, 0.05), 0.9, 1.1) * np.clip(rng.normal(1, 0.04, 3), 0.92, 1.08)
    shift = np.clip(rng.normal(0, 3.5, 3), -7, 7)
    turn = Rotation.from_euler("xyz", np.asarray(angles) + rng.uniform(-8, 8, 3), degrees=True)
    return OrganShape(np.asarray(centre) + shift, np.asarray(radii) * factor, turn.as_matrix(), power)


def _draw_tissue(rng: np.random.Generator) -> dict[str, Any]:
    """HU per material and the phase: no contrast agent, arterial or portal venous, each with its own strength."""
    phase = rng.choice(len(PHASES), p=(0.2, 0.3, 0.5))
    strength = float(rng.uniform(0.7, 1.2))
    gain = {  # HU added by the agent without, in the arterial and in the portal venous phase
        "arterial": (0, 260, 120),
        "venous": (0, 60, 110),
        "myocardium": (0, 60, 55),
        "liver": (0, 20, 55),
        "spleen": (0, 70, 70),
        "pancreas": (0, 55, 50),
        "cortex": (0, 150, 140),
        "medulla": (0, 30, 120),
        "bowel": (0, 25, 40),
        "muscle": (0, 5, 12),
    }
    plain = {"arterial": 42, "venous": 42, "myocardium": 45, "liver": 57, "spleen": 47, "pancreas": 38}
    plain |= {"cortex": 33, "medulla": 30, "bowel": 38, "muscle": 48}
    tissue = {name: value + strength * gain[name][phase] + float(rng.normal(0, 4)) for name, value in plain.items()}
    tissue["liver"] -= float(rng.choice((0, 0, 0, 18)))  # a quarter of the livers hold fat
    tissue["fat"] = float(rng.uniform(-112, -95))
    tissue["lung"] = float(rng.uniform(-865, -780))
    tissue["spongy"] = float(rng.uniform(110, 200))
    tissue["cortical"] = float(rng.uniform(480, 720))
    return {"tissue": tissue, "phase": PHASES[phase]}
