# SPDX-License-Identifier: Apache-2.0
"""What is kept of an embedded image: its maps and where their cells lie in the patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_ssl.transforms.view_geometry import spacing_of, transform_points, voxel_index

from .point_matching import map_norms

__all__ = ["SPACES", "ImageEmbedding", "body_cells", "from_ras", "tensor_digest", "to_ras"]

SPACES = ("RAS", "LPS", "voxel")
_SMALL = 0.1  # parts of the mask below this share of the largest are no body, such as the table


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """Maps of one image with their place in the world.

    Args:
        maps: (C, *size) each, finest first.
        affine: index in the network's input -> RAS mm, (n + 1, n + 1) float64.
        size: voxels of the network's input, before it is padded.
        source_affine: index in the image as it was given -> RAS mm, (n + 1, n + 1) float64.
        source_size: voxels of the image as it was given; None: not known.
        padded_size: voxels that the maps cover; None: `size`.
        body: (*size of the finest map) bool, True for cells of the body; None: not known.
        norms: of :func:`map_norms`; None: computed here.

    Raises:
        ValueError: the padded size is no multiple of the size of the finest map.
    """

    maps: list[Tensor]
    affine: Tensor
    size: tuple[int, ...]
    source_affine: Tensor
    source_size: tuple[int, ...] | None = None
    padded_size: tuple[int, ...] | None = None
    body: Tensor | None = None
    norms: list[Tensor] | None = None

    def __post_init__(self) -> None:
        covered = tuple(self.size) if self.padded_size is None else tuple(self.padded_size)
        cells = tuple(self.maps[0].shape[1:])
        if len(covered) != len(cells) or any(v % c for v, c in zip(covered, cells)):
            raise ValueError(f"an input of {covered} voxels is no multiple of the map {cells}: give padded_size")
        object.__setattr__(self, "padded_size", covered)
        if self.norms is None:
            object.__setattr__(self, "norms", map_norms(self.maps))

    @property
    def stride(self) -> Tensor:
        """Voxels of the network's input per cell of the finest map, (n,) float64."""
        covered = torch.tensor(self.padded_size, dtype=torch.float64)
        return covered / torch.tensor(self.maps[0].shape[1:], dtype=torch.float64)

    def cells(self, points: Tensor) -> Tensor:
        """World points (P, n), RAS mm -> index on the finest map."""
        voxels = transform_points(torch.linalg.inv(self.affine.double()), points.double())
        return (voxels + 0.5) / self.stride - 0.5

    def world(self, cells: Tensor) -> Tensor:
        """Index on the finest map (P, n) -> RAS mm; what lies beyond the image is moved to its border."""
        voxels = (cells.cpu().double() + 0.5) * self.stride - 0.5
        last = torch.tensor(self.size, dtype=torch.float64) - 0.5
        return transform_points(self.affine.double(), torch.minimum(voxels.clamp_min(-0.5), last))

    def key_mask(self) -> Tensor:
        """(*size of the finest map) bool, True for cells that show some of the image and not padding alone."""
        mask = torch.ones(self.maps[0].shape[1:], dtype=torch.bool, device=self.maps[0].device)
        for axis, (length, stride) in enumerate(zip(self.size, self.stride.tolist())):
            mask.narrow(axis, -(-length // int(stride)), mask.shape[axis] + (-length // int(stride))).fill_(False)
        return mask

    def contains(self, points: Tensor) -> Tensor:
        """(P,) bool: world points (P, n) within the image as it was given, and within what is left after cropping."""
        slack = spacing_of(self.source_affine).max() / spacing_of(self.affine) / 2 + 1  # resampled grids end elsewhere
        inside = _within(self.affine, self.size, points, slack if self.source_size is not None else 1e-6)
        if self.source_size is None:
            return inside
        return inside & _within(self.source_affine, self.source_size, points, 1e-6)

    def extent(self, space: str = "RAS") -> tuple[Tensor, Tensor]:
        """Lowest and highest coordinates (n,) of the image in a space, at the outer borders of its voxels."""
        affine, size = (self.affine, self.size) if self.source_size is None else (self.source_affine, self.source_size)
        corners = voxel_index([2] * len(size)) * torch.tensor(size, dtype=torch.float64) - 0.5
        points = from_ras(transform_points(affine.double(), corners), space, self.source_affine)
        return points.amin(0), points.amax(0)

    def in_body(self, points: Tensor) -> Tensor:
        """(P,) bool: world points (P, n) in a cell of the body; all True where the body is not known."""
        if self.body is None:
            return torch.ones(len(points), dtype=torch.bool)
        last = torch.tensor(self.body.shape) - 1
        cell = torch.minimum(self.cells(points).round().long().clamp_min(0), last)
        return self.body.cpu()[tuple(cell.T)]


def to_ras(points: Tensor, space: str, source_affine: Tensor) -> Tensor:
    """Points (P, n) of a space as RAS mm, float64.

    Args:
        points: (P, n).
        space: "RAS"; "LPS", whose first two axes point the other way; "voxel", an index of the image as it was given.
        source_affine: of that image.

    Raises:
        ValueError: an unknown space.
    """
    if space == "voxel":
        return transform_points(source_affine.double(), points.double())
    return points.double() * _signs(space, points.shape[-1])


def from_ras(points: Tensor, space: str, source_affine: Tensor) -> Tensor:
    """The inverse of :func:`to_ras`."""
    if space == "voxel":
        return transform_points(torch.linalg.inv(source_affine.double()), points.double())
    return points.double() * _signs(space, points.shape[-1])


def body_cells(mask: Tensor, cells: Sequence[int], axis: int = 0) -> Tensor:
    """Cells of the finest map that show the body: a foreground mask with its holes, such as lungs, and one cell around.

    Holes are filled slice by slice, since airways and lungs reach the ends of most scans.

    Args:
        mask: foreground of the padded network's input, (*size) bool.
        cells: size of the finest map.
        axis: across which slices are taken in 3D.

    Returns:
        (*cells) bool.
    """
    blocks = [v for cell, length in zip(cells, mask.shape) for v in (cell, length // cell)]
    share = mask.cpu().float().reshape(blocks).mean(tuple(range(1, len(blocks), 2)))
    body = (share >= 0.5).numpy()
    if body.ndim == 3:
        planes = [ndimage.binary_fill_holes(body.take(at, axis)) for at in range(body.shape[axis])]
        body = np.stack(planes, axis)
    else:
        body = ndimage.binary_fill_holes(body)
    parts, number = ndimage.label(body)
    if number:
        counts = np.bincount(parts.ravel())
        counts[0] = 0
        body = (counts >= _SMALL * counts.max())[parts] & body
    return torch.from_numpy(ndimage.binary_dilation(body, np.ones([3] * body.ndim)))


def tensor_digest(*values: Any) -> str:
    """sha256 of tensors, bit by bit with type and shape, and of texts."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().as_subclass(Tensor).cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{value} ".encode())
    return digest.hexdigest()


def _signs(space: str, rank: int) -> Tensor:
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    flipped = -1.0 if space == "LPS" else 1.0
    return torch.tensor([flipped, flipped, 1.0][:rank], dtype=torch.float64)


def _within(affine: Tensor, size: Sequence[int], points: Tensor, slack: Tensor | float) -> Tensor:
    """Whether points lie in the box that the voxels fill, widened by some voxels."""
    voxels = transform_points(torch.linalg.inv(affine.double()), points.double())
    last = torch.tensor(size, dtype=torch.float64) - 0.5
    return ((voxels >= -0.5 - slack) & (voxels <= last + slack)).all(-1)
