# SPDX-License-Identifier: Apache-2.0
"""Space of the torso phantom: smooth random fields, the subject's deformation, and the canvas for its shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

Array = NDArray[np.floating]
Box = tuple[slice, slice, slice]
Labels = dict[str, int]
WHOLE: Box = (slice(None), slice(None), slice(None))
# Random fields repeat after this distance, so that they exist for every field of view.
PERIOD_MM = 768.0


def smooth_max(first: Array, second: Array | float, radius: float) -> Array:
    """Larger of two distances, with the edge where they meet rounded: the intersection of two shapes."""
    difference = first - second
    blend = np.maximum(radius - np.abs(difference), 0)
    return np.maximum(first, second) + blend * blend / (4 * radius)


def cubic_weights(positions: NDArray[np.floating], num_nodes: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Nodes (..., 4) of a periodic cubic B-spline lattice that reach positions (...) in mm, and their weights."""
    scaled = np.asarray(positions, dtype=np.float64) * (num_nodes / PERIOD_MM)
    cell = np.floor(scaled).astype(np.intp)
    t = scaled - cell
    weights = np.stack(((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3), axis=-1) / 6
    return (cell[..., None] + np.arange(-1, 3)) % num_nodes, weights


def spline_on_grid(lattice: Array, axes: Sequence[Array]) -> Array:
    """Values (X, Y, Z) of a lattice (M, M, M) on the grid spanned by three axes in mm."""
    bases = []
    for axis in axes:
        nodes, weights = cubic_weights(axis, lattice.shape[0])
        basis = np.zeros((len(axis), lattice.shape[0]), dtype=np.float32)
        np.put_along_axis(basis, nodes, weights.astype(np.float32), axis=1)
        bases.append(basis)
    rows = np.tensordot(bases[0], lattice, axes=(1, 0))  # (X, M, M)
    return np.matmul(bases[1], rows) @ bases[2].T  # (X, Y, M) @ (M, Z)


def spline_at(lattice: Array, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (N, C) of lattices (C, M, M, M) at points (N, 3) in mm."""
    nodes, weights = cubic_weights(points, lattice.shape[-1])  # (N, 3, 4)
    i, j, k = nodes[:, 0, :, None, None], nodes[:, 1, None, :, None], nodes[:, 2, None, None, :]
    near = lattice[:, i, j, k]  # (C, N, 4, 4, 4)
    share = weights[:, 0, :, None, None] * weights[:, 1, None, :, None] * weights[:, 2, None, None, :]
    return (near * share).sum(axis=(2, 3, 4)).T


class PhantomWarp:
    """Map between the world and the template in which anatomy is described: pose, scale and a smooth displacement.

    Args:
        rng: source of the pose and of the displacement.
        scale: size of this subject relative to the template, per axis.
    """

    num_nodes = 12  # one per 64 mm

    def __init__(self, rng: np.random.Generator, scale: Sequence[float] | NDArray[np.floating]) -> None:
        self.scale = np.asarray(scale, dtype=np.float64)
        self.rotation = Rotation.from_euler("xyz", rng.uniform((-2, -2.5, -5), (2, 2.5, 5)), degrees=True).as_matrix()
        self.shift = rng.uniform((-8, 8, -6), (8, 14, 6))
        lattice = np.clip(rng.standard_normal((3, *3 * (self.num_nodes,))), -2, 2)
        # mm; at a node a cubic spline keeps about a third of the spread of its coefficients
        self.lattice = (lattice * np.reshape((13, 11, 13), (3, 1, 1, 1))).astype(np.float32)

    def to_template(self, axes: Sequence[Array]) -> Array:
        """Template coordinates (3, X, Y, Z) in mm of the grid spanned by three world axes in mm."""
        matrix = self.rotation.T / self.scale[:, None]
        out = np.stack([spline_on_grid(lattice, axes) for lattice in self.lattice])
        for row in range(3):
            for column, axis in enumerate(axes):
                term = matrix[row, column] * (axis.astype(np.float64) - self.shift[column])
                out[row] += term.astype(np.float32).reshape([-1 if i == column else 1 for i in range(3)])
        return out

    def to_world(self, points: NDArray[np.floating] | Sequence[Sequence[float]]) -> NDArray[np.float64]:
        """World coordinates (N, 3) in mm of template points (N, 3), by fixed-point iteration."""
        template = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        world = template * self.scale @ self.rotation.T + self.shift
        for _ in range(40):
            before = world
            world = (template - spline_at(self.lattice, world)) * self.scale @ self.rotation.T + self.shift
            if np.abs(world - before).max() < 3e-3:
                break
        return world


class PhantomCanvas:
    """Image and label map on one voxel grid, painted shape by shape with partial volume at every edge.

    Args:
        affine: voxel index -> world mm, with a positive diagonal.
        size: voxels per axis.
        warp: the subject's map between world and template.
        rng: source of the textures; the draws do not depend on the grid.
    """

    def __init__(
        self, affine: NDArray[np.float64], size: Sequence[int], warp: PhantomWarp, rng: np.random.Generator
    ) -> None:
        self.spacing = np.diag(affine)[:3]
        self.origin = affine[:3, 3]
        self.warp = warp
        self.axes = [(self.origin[i] + self.spacing[i] * np.arange(size[i])).astype(np.float32) for i in range(3)]
        self.template = warp.to_template(self.axes)
        self.image = np.full(tuple(size), -1000, dtype=np.float32)
        self.label = np.zeros(tuple(size), dtype=np.uint8)
        # mm over which an edge fades: the scanner's own resolution and the voxel
        self.edge = float(np.hypot(1.5, self.spacing.mean()))
        fine, coarse = (rng.standard_normal(3 * (nodes,), dtype=np.float32) for nodes in (72, 24))
        self.fine = spline_on_grid(fine, self.axes) / 0.35  # texture, unit spread, cells of 11 mm
        self.coarse = spline_on_grid(coarse, self.axes) / 0.35  # bends boundaries, cells of 32 mm

    def box(self, points: NDArray[np.floating], margin: float, world: bool = False) -> Box:
        """Smallest box of voxels around template (or world) points (N, 3) plus a margin in mm."""
        corners = np.asarray(points) if world else self.warp.to_world(points)
        low = np.floor((corners.min(axis=0) - margin - self.origin) / self.spacing).astype(int)
        high = np.ceil((corners.max(axis=0) + margin - self.origin) / self.spacing).astype(int) + 1
        size = self.image.shape
        x, y, z = (slice(max(0, low[i]), min(max(0, high[i]), size[i])) for i in range(3))
        return x, y, z

    def coordinates(self, box: Box) -> Array:
        """Template coordinates (3, ...) in mm of a box of voxels."""
        return self.template[:, box[0], box[1], box[2]]

    def paint(
        self,
        box: Box,
        distance: Array,
        hu: float | Array,
        label: int | None = None,
        texture: float = 0.0,
        within: int = 0,
        opacity: float | Array = 1.0,
    ) -> None:
        """Fill where the distance in mm is negative; the edge blends into what was there.

        Args:
            box: voxels that the distance describes.
            distance: signed distance to the shape's surface in mm, negative inside.
            hu: value inside.
            label: written where the voxel's centre is inside; None leaves the label map as it is.
            texture: spread in HU of the smooth texture added to the value.
            within: paint only where the label map has this value; 0 paints everywhere.
            opacity: factor of the share that the shape takes of a voxel.
        """
        if not distance.size:
            return
        share = np.clip(0.5 - distance / self.edge, 0, 1) * opacity
        if within:
            share *= self.label[box] == within
        value = hu + texture * self.fine[box] if texture else hu
        image = self.image[box]
        image += share * (value - image)
        if label is not None:
            self.label[box][distance < 0] = label

    def tube(
        self,
        points: NDArray[np.float64],
        radii: Sequence[float] | NDArray[np.floating] | float,
        hu: float,
        label: int | None = None,
        texture: float = 0.0,
        within: int = 0,
    ) -> None:
        """Paint capsules along a line of world points (N, 3), with one radius in mm per point or for all."""
        width = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(points))
        for (start, end), (first, last) in zip(zip(points[:-1], points[1:]), zip(width[:-1], width[1:])):
            box = self.box(np.stack([start, end]), max(first, last) + self.edge, world=True)
            delta = [
                (self.axes[i][box[i]] - np.float32(start[i])).reshape([-1 if i == j else 1 for j in range(3)])
                for i in range(3)
            ]
            line = (end - start).astype(np.float32)
            along = sum(d * v for d, v in zip(delta, line)) / max(float(line @ line), 1e-6)
            along = np.clip(along, 0, 1)
            squared = sum((d - along * v) ** 2 for d, v in zip(delta, line))
            radius = (first + along * (last - first)).astype(np.float32)
            # a vessel thinner than the edge fills only part of a voxel
            opacity = np.minimum(2 * radius / self.edge, 1)
            self.paint(box, np.sqrt(squared) - radius, hu, label, texture, within, opacity)

    def finish(self, noise_hu: float, rng: np.random.Generator) -> Array:
        """The image with quantum noise (mildly correlated in plane), clipped to a scanner's range and rounded."""
        noise = gaussian_filter(rng.standard_normal(self.image.shape, dtype=np.float32), (0.7, 0.7, 0), mode="wrap")
        noise *= noise_hu / max(float(noise.std()), 1e-6)
        return np.rint(np.clip(self.image + noise, -1024, 3071))
