# SPDX-License-Identifier: Apache-2.0
"""Quarter turns of a cube, and which of them it was (Rotation)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, combinations, permutations
from math import hypot
from typing import Any, TypeAlias

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from ._one_draw import OneDraw, OneDrawd, with_meta_of
from .voco_crops import _plain_tensor

__all__ = [
    "RandCubeRotation",
    "RandCubeRotationD",
    "RandCubeRotationDict",
    "RandCubeRotationd",
    "rotation_matrix",
    "rotation_table",
]

Rotation: TypeAlias = tuple[tuple[int, ...], tuple[bool, ...]]  # axes to transpose to, then which of them to flip
CLASSES = {"axis10": 10, "cube24": 24, "plane4": 4, "half4": 4}
# quarter turns k and their plane, as in numpy.rot90, in the order of the released code
AXIS10 = [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (3, 1, 2), (2, 1, 2), (1, 1, 2), (3, 0, 2), (2, 0, 2), (1, 0, 2)]
HALF4 = [(0, 0, 1), (2, 0, 1), (2, 1, 2), (2, 0, 2)]


def rotation_table(
    group: str, spatial_dims: int = 3, plane: Sequence[int] = (0, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each class of rotations as a transposition and flips: output = flip(transpose(x, axes), axes with flips).

    Args:
        group: "axis10" (quarter and half turns about one axis), "cube24" (all rotations of the cube, the former first),
            "plane4" (k = 0..3 quarter turns in `plane`) or "half4" (identity and half turns about one axis).
        spatial_dims: 3, or 2 for "plane4".
        plane: the two axes of "plane4", turning from the first to the second as in `numpy.rot90`.

    Returns:
        Axes (N, spatial_dims) int64 and flips (N, spatial_dims) bool.

    Raises:
        ValueError: when the group is unknown or has no such dimension, or the plane is not two of its axes.
    """
    table = _rotations(group, spatial_dims, _checked_plane(plane))
    return torch.tensor([axes for axes, _ in table]), torch.tensor([flips for _, flips in table])


def rotation_matrix(axes: Sequence[int], flips: Sequence[bool], image_size: Sequence[int]) -> torch.Tensor:
    """Map from the index of an output voxel to the index of the same voxel in the input.

    Args:
        axes: transposition, as in `rotation_table`.
        flips: axes of the output that are flipped.
        image_size: spatial shape of the input, d axes.

    Returns:
        (d + 1, d + 1) float64, in voxels; the affine of the output is `affine @ matrix`.
    """
    matrix = torch.zeros(len(image_size) + 1, len(image_size) + 1, dtype=torch.float64)
    matrix[-1, -1] = 1
    for i, (axis, flip) in enumerate(zip(axes, flips)):
        matrix[int(axis), i] = -1 if flip else 1
        matrix[int(axis), -1] = image_size[int(axis)] - 1 if flip else 0
    return matrix


class RandCubeRotation(OneDraw):
    """Turn an image by a random rotation of a group that maps the voxel grid to itself, with its number as label.

    Source: 3D Rotation (arXiv 2006.03829). "axis10" has the ten classes of the released code in its order; before April
    2021 its class 9 was the identity, which is not offered. Axes are permuted and flipped, nothing is interpolated.
    The last draw stays in `label` () int64.

    Args:
        group: see `rotation_table`; in 2D "plane4".
        plane: the two axes of "plane4".
        max_anisotropy: largest ratio of voxel sizes along axes that the group exchanges, since the direction of thick
            slices gives the class away; None switches the check off. Images without an affine are not checked.

    Shapes: (C, *spatial) -> the same, contiguous, of the image's dtype; axes that the group exchanges must be equally
    long. With meta tracking it carries the rotated affine, so that every voxel keeps its place in the world.

    Raises:
        ValueError: when the group is unknown or does not suit the number of axes, the axes that it exchanges differ in
            length or spacing, or the label given is out of range.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("label",)

    def __init__(
        self, group: str = "axis10", plane: Sequence[int] = (0, 1), max_anisotropy: float | None = 1.1
    ) -> None:
        if group not in CLASSES:
            raise ValueError(f"unknown group '{group}', choose one of {sorted(CLASSES)}")
        if max_anisotropy is not None and not max_anisotropy >= 1:
            raise ValueError(f"max_anisotropy must be at least 1, or None, got {max_anisotropy}")
        self.group, self.plane, self.max_anisotropy = group, _checked_plane(plane), max_anisotropy
        self.label: torch.Tensor | None = None

    def randomize(self, image_size: Sequence[int] | None = None) -> None:
        """Draw the number of the rotation."""
        self.label = torch.tensor(int(self.R.randint(CLASSES[self.group])))

    def check(self, img: NdarrayOrTensor, name: str = "img") -> None:
        """Raise a ValueError when the shape or the spacing of the image would give the rotation away."""
        size = tuple(img.shape[1:])
        exchanged = _exchanged(self.group, len(size), self.plane)
        if len({size[i] for i in exchanged}) > 1:
            raise ValueError(
                f"'{name}' has spatial shape {size}, which would tell how '{self.group}' turned axes {exchanged}; "
                "crop a cube first, or use half4"
            )
        if self.max_anisotropy is None or not exchanged or not isinstance(img, MetaTensor):
            return
        rows = img.affine.tolist()[:-1]
        spacing = [hypot(*(row[i] for row in rows)) for i in exchanged]  # as img.pixdim, faster
        if max(spacing) > self.max_anisotropy * min(spacing):
            raise ValueError(
                f"'{name}' has voxels of {spacing} along axes {exchanged}, unequal by more than max_anisotropy "
                f"{self.max_anisotropy}, which would tell the rotation; use Spacingd first, or plane4 or half4"
            )

    def apply(self, img: NdarrayOrTensor, label: torch.Tensor | int) -> torch.Tensor:
        """Turn the image by rotation number `label`, without any draw: (C, *spatial), a copy."""
        self.check(img)
        image = _plain_tensor(img)
        table = _rotations(self.group, image.ndim - 1, self.plane)
        if not 0 <= int(label) < len(table):
            raise ValueError(f"label must be between 0 and {len(table) - 1}, got {int(label)}")
        axes, flips = table[int(label)]
        turned = image.permute(0, *(a + 1 for a in axes))
        dims = [i + 1 for i, flip in enumerate(flips) if flip]
        # a flip copies
        turned = turned.flip(dims).contiguous() if dims else turned.clone(memory_format=torch.contiguous_format)
        if not isinstance(img, MetaTensor):
            return with_meta_of(img, turned)
        matrix = _matrix(axes, flips, tuple(image.shape[1:]), len(img.affine) - 1)
        return with_meta_of(img, turned, img.affine @ matrix.to(img.affine))


class RandCubeRotationd(OneDrawd):
    """Dictionary form of `RandCubeRotation`; one draw for all keys, which stay aligned.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, the rotated image `<key>` (C, *spatial), and once
    `label_key`, the number of the rotation () int64, a plain tensor.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        group: see `RandCubeRotation`.
        plane: see `RandCubeRotation`.
        max_anisotropy: see `RandCubeRotation`.
        label_key: key of the label that is written.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandCubeRotation`; or when keys differ in spatial shape, or one key would be written twice.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    def __init__(
        self,
        keys: KeysCollection,
        group: str = "axis10",
        plane: Sequence[int] = (0, 1),
        max_anisotropy: float | None = 1.1,
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandCubeRotation(group, plane, max_anisotropy)
        super().__init__(keys, transform, label_key, False, allow_missing_keys)


RandCubeRotationD = RandCubeRotationDict = RandCubeRotationd


@lru_cache
def _rotations(group: str, d: int, plane: tuple[int, int]) -> tuple[Rotation, ...]:
    """The classes of a group in d dimensions."""
    if group not in CLASSES:
        raise ValueError(f"unknown group '{group}', choose one of {sorted(CLASSES)}")
    if d not in (2, 3) or (d == 2 and group != "plane4"):
        raise ValueError(f"group '{group}' does not suit {d} spatial axes; in 2D use plane4")
    if group == "plane4":
        if max(plane) >= d:
            raise ValueError(f"plane {plane} must be two different axes below {d}")
        return tuple(_turn(d, k, *plane) for k in range(4))
    if group == "half4":
        return tuple(_turn(d, *turn) for turn in HALF4)
    first = tuple(_turn(d, *turn) for turn in AXIS10)
    return first if group == "axis10" else first + tuple(r for r in _cube() if r not in first)


@lru_cache
def _exchanged(group: str, d: int, plane: tuple[int, int]) -> list[int]:
    """The axes that some class of the group moves."""
    return [i for i in range(d) if any(axes[i] != i for axes, _ in _rotations(group, d, plane))]


@lru_cache(maxsize=256)
def _matrix(axes: tuple[int, ...], flips: tuple[bool, ...], size: tuple[int, ...], rank: int) -> torch.Tensor:
    """`rotation_matrix` for an affine of `rank` axes: MONAI keeps a 4 x 4 one for 2D images too."""
    return torch.as_tensor(to_affine_nd(rank, rotation_matrix(axes, flips, size)))


def _turn(d: int, k: int, a: int, b: int) -> Rotation:
    """k quarter turns from axis a to axis b, as numpy.rot90."""
    axes = list(range(d))
    if k % 2:
        axes[a], axes[b] = b, a
    flipped = [(), (a,), (a, b), (b,)][k]
    return tuple(axes), tuple(i in flipped for i in range(d))


def _cube() -> list[Rotation]:
    """All 24 rotations: axes in lexicographic order, flips by number, then in lexicographic order."""
    flip_sets = chain.from_iterable(combinations(range(3), n) for n in range(4))
    signs = [tuple(i in flipped for i in range(3)) for flipped in flip_sets]
    signed = [(axes, flips) for axes in permutations(range(3)) for flips in signs]
    return [(a, f) for a, f in signed if np.linalg.det(rotation_matrix(a, f, (1, 1, 1)).numpy()) > 0]


def _checked_plane(plane: Any) -> tuple[int, int]:
    axes = tuple(int(axis) for axis in plane)
    if len(axes) != 2 or axes[0] == axes[1] or min(axes) < 0 or max(axes) > 2:
        raise ValueError(f"plane {plane} must be two different axes out of 0, 1 and 2")
    return axes[0], axes[1]
