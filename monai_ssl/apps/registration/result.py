# SPDX-License-Identifier: Apache-2.0
"""What every stage of registration returns: a transform of the world, and what it is good for (SAMReg)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

from ..preprocessing import affine_of, load_image
from .displacements import compose_displacement, invert_displacement, point_mapping, steps_on_grid
from .fields import compose, from_normalised, jacobian_determinant, to_ddf, to_normalised
from .transform_files import (
    FORMATS,
    check_formats,
    write_affine,
    write_composite,
    write_displacement,
    write_image,
    written_files,
)
from .voxel_sampling import resample

__all__ = ["Registration", "compose", "from_normalised", "jacobian_determinant", "to_ddf", "to_normalised"]

_ALL = tuple(FORMATS)

_PADDING = ("border", "zeros", "background")


@dataclass(frozen=True, eq=False)
class Registration:
    """A transform T(x) = A(x + d(x)) from points of the fixed image to those of the moving one, both RAS mm.

    Source: the result of SAME (arXiv 2109.11572), there in private units of a common grid. This is the direction that
    resampling needs, as in ITK, and so is the rule for d: linear between the nodes of its grid, the border value within
    the outer half voxel, 0 beyond. n is 2 or 3.

    Args:
        affine: A, fixed world -> moving world, (n + 1, n + 1), kept as float64.
        displacement: d in RAS mm at the nodes of the grid, (n, *grid_size), kept as float32 (float64 stays); None: 0.
        grid_affine: index in the grid -> fixed world, (n + 1, n + 1), kept as float64. The grid is that of the fixed
            image at the spacing of the network.
        grid_size: nodes along each axis.
        points: pairs of the matches that were kept, (P, 2, n) RAS mm, first fixed, then moving; P may be 0.
        scores: their similarity, (P,).
        report: counts, residuals, folding share and seconds.

    Raises:
        ValueError: shapes that do not fit, a matrix that cannot be inverted, or values that are not finite.
    """

    affine: Tensor
    displacement: Tensor | None
    grid_affine: Tensor
    grid_size: tuple[int, ...]
    points: Tensor
    scores: Tensor
    report: dict[str, Any]

    def __post_init__(self) -> None:
        size, n = tuple(int(length) for length in self.grid_size), len(self.grid_size)
        if n not in (2, 3) or min(size) < 1:
            raise ValueError(f"grid_size must be 2 or 3 positive numbers of nodes, got {self.grid_size}")
        object.__setattr__(self, "grid_size", size)
        for name in ("affine", "grid_affine", "points", "scores", "displacement"):
            if getattr(self, name) is not None:
                value = torch.as_tensor(getattr(self, name)).detach().as_subclass(Tensor)
                single = name in ("displacement", "scores") and value.dtype != torch.float64
                object.__setattr__(self, name, value.to(torch.float32 if single else torch.float64))
        _check_affine("affine", self.affine, n)
        _check_affine("grid_affine", self.grid_affine, n)
        d, shape = self.displacement, (n, *size)
        if d is not None and (tuple(d.shape) != shape or not d.isfinite().all()):
            raise ValueError(f"displacement must be {shape}, RAS mm, and finite, got {tuple(d.shape)}")
        if self.points.shape[1:] != (2, n) or self.scores.shape != self.points.shape[:1]:
            found = tuple(self.points.shape), tuple(self.scores.shape)
            raise ValueError(f"points must be (P, 2, {n}), fixed and moving, and scores (P,), got {found}")

    def map_points(self, points: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Where points of the fixed image lie in the moving one.

        Args:
            points: (..., n), RAS mm.

        Returns:
            T(points), (..., n) float64, RAS mm.
        """
        points = torch.as_tensor(points).as_subclass(Tensor).double()
        n = len(self.grid_size)
        if points.ndim < 1 or points.shape[-1] != n:
            raise ValueError(f"points must be (..., {n}), RAS mm, got {tuple(points.shape)}")
        return self._mapping(points.device)(points.reshape(-1, n)).reshape(points.shape)

    def then_inner(self, v: Tensor) -> Registration:
        """T after another displacement of the fixed side: x -> T(x + v(x)).

        Args:
            v: RAS mm on the grid, (n, *grid_size).

        Returns:
            the same but for its displacement d(x + v(x)) + v(x), in which d continues with its border value.
        """
        v = v.detach().as_subclass(Tensor)
        if tuple(v.shape) != (len(self.grid_size), *self.grid_size):
            raise ValueError(f"v must be {(len(self.grid_size), *self.grid_size)}, RAS mm, got {tuple(v.shape)}")
        d = v.float() if self.displacement is None else compose_displacement(self.displacement, v, self.grid_affine)
        return dataclasses.replace(self, displacement=d)

    def inverse(self) -> Registration:
        """The transform from the moving image to the fixed one.

        Its grid is this grid moved by A, with the shear that A has, so that only its affine may fit files of ITK.

        Returns:
            a registration with the same report and the points exchanged.

        Raises:
            ValueError: a displacement without an inverse that is found, see `invert_displacement`.
        """
        field = None
        if self.displacement is not None:
            inner = invert_displacement(self.displacement, self.grid_affine)
            # A^-1(y + e(y)) = x + inner(x) at y = A x, so e = (linear part of A) inner
            linear = self.affine[:-1, :-1].to(inner.device)
            field = torch.einsum("ij,j...->i...", linear, inner).to(self.displacement.dtype)
        return dataclasses.replace(
            self,
            affine=torch.linalg.inv(self.affine),
            displacement=field,
            grid_affine=self.affine @ self.grid_affine.to(self.affine.device),
            points=self.points.flip(1),
        )

    def ddf(self, like: Any = None) -> Tensor:
        """The transform for `monai.networks.blocks.Warp`, where both images lie on one grid of a common world.

        `Warp(mode="bilinear", padding_mode="border")(ResampleToMatch()(moving, like)[None], ddf)` loses what of the
        moving image lies outside the box of `like`; :meth:`warp` does not.

        Args:
            like: the image whose grid it is for, a file or a MetaTensor (C, *size); None: the grid of the result.

        Returns:
            T(x) - x in voxels of the grid, (1, n, *size) float32.
        """
        matrix, size = self._grid(None if like is None else load_image(like, len(self.grid_size)))
        return self._steps(matrix, size, torch.linalg.inv(matrix[:-1, :-1]))[None]

    def warp(self, moving: Any, like: Any = None, mode: str = "bilinear", padding_mode: str = "border") -> MetaTensor:
        """The moving image on the fixed grid, interpolated once, from its own resolution.

        The two images need no common world space.

        Args:
            moving: a file or a MetaTensor (C, *moving), whose device is used.
            like: the image whose grid and affine the result has, a file or a MetaTensor; None: the grid of the result.
            mode: "bilinear" (linear along each axis), or "nearest" for label maps, which keep their type.
            padding_mode: beyond the outer faces of the border voxels of the moving image, "border": their value,
                "zeros": 0, "background": the lowest value of each channel, such as air.

        Returns:
            (C, *size) with the affine of `like`; float32, or of the type of `moving` for "nearest".

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an image or a mode that cannot be used.
        """
        if mode not in ("bilinear", "nearest") or padding_mode not in _PADDING:
            raise ValueError(
                f"mode must be bilinear or nearest and padding_mode one of {', '.join(_PADDING)}, "
                f"got {mode!r}, {padding_mode!r}"
            )
        n = len(self.grid_size)
        image, target = load_image(moving, n), None if like is None else load_image(like, n)
        values, (matrix, size) = image.as_tensor(), self._grid(target)
        matrix, to_moving = matrix.to(values.device), torch.linalg.inv(affine_of(image)).to(values.device)
        mapped = self._mapping(values.device)

        def places(index: Tensor) -> Tensor:
            return transform_points(to_moving, mapped(transform_points(matrix, index)))

        out = resample(values, size, places, mode, padding_mode)
        return MetaTensor(out, affine=self.grid_affine if target is None else target.affine)

    def save(
        self,
        directory: str | PathLike[str],
        name: str,
        formats: Sequence[str] = _ALL,
        moving: Any = None,
        like: Any = None,
    ) -> list[Path]:
        """Write the transform for other programs, and the moving image on the fixed grid.

        Beyond its grid a displacement of ITK is the identity: with large translations give users "h5", whose affine
        still acts there, rather than "nifti".

        Args:
            directory: where to, made if absent; nothing is written outside. A file appears whole or not at all.
            name: how the file names begin.
            formats: "tfm": `<name>_affine.tfm`, the affine A as text. "h5": `<name>.h5`, a composite transform of ITK,
                first d, then A. "nifti": `<name>_displacement.nii.gz`, T(x) - x on the grid, LPS mm, float32, of the
                intent that ITK and SimpleITK read. "warped": `<name>_warped.nii.gz`, `warp(moving, like)`, which is
                left out where neither formats nor images are given.
            moving: for "warped", see :meth:`warp`.
            like: for "warped", the fixed image.

        Returns:
            the files, in the order of `formats`.

        Raises:
            FileNotFoundError: an image is not there.
            ValueError: formats or a name that cannot be used, images that are missing, 2D other than "warped", or axes
                of the grid that are not orthogonal.
        """
        if formats is _ALL and moving is None and like is None:
            formats = tuple(key for key in _ALL if key != "warped")
        check_formats(formats, self.grid_affine)
        if "warped" in formats and (moving is None or like is None):
            raise ValueError(
                'formats has "warped", which needs moving=... and like=..., the moving and the fixed image'
            )
        with written_files(directory, name, formats) as files:
            if "tfm" in files:
                write_affine(files["tfm"], self.affine)
            if "h5" in files:
                write_composite(files["h5"], self.affine, self.displacement, self.grid_affine)
            if "nifti" in files:
                total = self._steps(self.grid_affine, self.grid_size, torch.eye(3, dtype=torch.float64))
                write_displacement(files["nifti"], total, self.grid_affine)
            if "warped" in files:
                write_image(files["warped"], self.warp(moving, like))
        return [Path(directory) / file.name for file in files.values()]

    def _grid(self, image: MetaTensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """Index -> RAS mm, (n + 1, n + 1), and size of an image's grid, or of the grid of the result."""
        if image is None:
            return self.grid_affine, self.grid_size
        return affine_of(image), tuple(image.shape[1:])

    def _mapping(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """T, of points (P, n) float64 on a device."""
        return point_mapping(self.affine, self.displacement, self.grid_affine, device)

    def _steps(self, matrix: Tensor, size: tuple[int, ...], linear: Tensor) -> Tensor:
        """linear (T(x) - x) for x on a grid, (n, *size) float32."""
        device = self.affine.device if self.displacement is None else self.displacement.device
        return steps_on_grid(self._mapping(device), matrix, size, linear, device)


def _check_affine(name: str, matrix: Tensor, n: int) -> None:
    if matrix.shape != (n + 1, n + 1) or not matrix.isfinite().all():
        raise ValueError(
            f"{name} must be {(n + 1, n + 1)} and finite for {n} axes, got {tuple(matrix.shape)}: {matrix}"
        )
    bottom = torch.eye(n + 1, dtype=matrix.dtype, device=matrix.device)[-1]
    if not torch.equal(matrix[-1], bottom) or not torch.linalg.svdvals(matrix[:-1, :-1])[-1] > 0:
        raise ValueError(f"{name} must be an affine that can be inverted, with 0 and 1 in the last row, got {matrix}")
