# SPDX-License-Identifier: Apache-2.0
"""A smooth displacement on a coarse grid, fitted to pairs of points (SAM-coarse)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

from .fields import identity_field, sample_field

__all__ = ["compose_affine", "fit_coarse_field"]

_EXACT = 1e-20  # rounding errors, which Adam would turn into steps: it divides by their size


def compose_affine(affine: Tensor, disp: Tensor, extrapolate: bool = True) -> Tensor:
    """The affine after (id + disp): where the nodes of a grid end up.

    Args:
        affine: between normalised coordinates, (n + 1, n + 1).
        disp: normalised displacement on a grid, (1, n, *size); it is applied first.
        extrapolate: False as in the released code of SAME: the affine is known as a displacement on the grid, 0 beyond
            it, so that nodes near the border are pulled to where they come from.

    Returns:
        absolute normalised coordinates, (1, n, *size), of the type of `disp`.
    """
    size = disp.shape[2:]
    places = identity_field(size, disp) + disp
    if extrapolate:
        return _transformed(affine, places)
    nodes = identity_field(size, disp)
    return places + sample_field(_transformed(affine, nodes) - nodes, places, padding_mode="zeros")


def fit_coarse_field(
    source: Tensor,
    target: Tensor,
    affine: Tensor,
    size: Sequence[int],
    steps: int = 100,
    lr: float = 0.05,
    smoothness: float = 0.04,
    extrapolate: bool = True,
) -> tuple[Tensor, Tensor]:
    """The field phi = affine(id + disp) that takes fixed points to the moving points that match them.

    Source: SAM-coarse (arXiv 2109.11572). Minimises, with Adam from disp = 0, the mean squared distance of phi(target)
    from source, plus the squared forward differences of disp, summed over axes, averaged over nodes and components and
    weighted by smoothness / n. In float64, and no further than to its rounding errors.

    Args:
        source: points of the moving image, normalised by its grid, (P, n).
        target: the points of the fixed image that match, normalised by its grid, (P, n); those beyond it count as on
            its border.
        affine: normalised fixed -> normalised moving, (n + 1, n + 1).
        size: nodes along each axis, at least 2; they span the fixed grid from its first voxel to its last.
        steps: of Adam.
        lr: its learning rate.
        smoothness: the higher, the less of the noise of the matches is followed.
        extrapolate: see :func:`compose_affine`.

    Returns:
        phi and disp, (1, n, *size) each, normalised, of the type of `source`.

    Raises:
        ValueError: shapes or numbers that cannot be used.
    """
    size = tuple(int(length) for length in size)
    _check(source, target, affine, size, steps, lr, smoothness)
    n = len(size)
    with torch.inference_mode(False), torch.enable_grad():
        goal, places, matrix = (
            values.detach().to(source.device, torch.float64, copy=True) for values in (source, target, affine)
        )
        places = places.T.reshape(1, n, *[1] * (n - 1), -1)  # (1, n, 1.., P)
        disp = torch.zeros(1, n, *size, dtype=torch.float64, device=source.device, requires_grad=True)
        optimizer = torch.optim.Adam([disp], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            found = sample_field(compose_affine(matrix, disp, extrapolate), places).reshape(n, -1).T
            loss = (found - goal).square().sum(1).mean() + smoothness / n * _roughness(disp)
            if loss < _EXACT:
                break
            loss.backward()
            optimizer.step()
        disp = disp.detach()
        phi = compose_affine(matrix, disp, extrapolate)
    return phi.to(source.dtype), disp.to(source.dtype)


def _roughness(disp: Tensor) -> Tensor:
    """Mean squared forward difference along each axis, on the interior [:-1] of the others; summed over axes."""
    every = (slice(None), slice(None))
    inner = (slice(-1),) * (disp.ndim - 2)
    total = disp.new_zeros(())
    for axis in range(len(inner)):
        ahead = (*every, *inner[:axis], slice(1, None), *inner[axis + 1 :])
        total = total + (disp[ahead] - disp[every + inner]).square().mean()
    return total


def _transformed(affine: Tensor, places: Tensor) -> Tensor:
    """(1, n, *size) -> the same."""
    points = transform_points(affine.to(places), places.flatten(2).mT)  # (1, V, n)
    return points.mT.reshape(places.shape)


def _check(
    source: Tensor, target: Tensor, affine: Tensor, size: tuple[int, ...], steps: int, lr: float, smoothness: float
) -> None:
    n = len(size)
    if source.ndim != 2 or source.shape != target.shape or source.shape[1] != n or not len(source):
        raise ValueError(
            f"source and target must be (P, {n}) for a grid of {size} nodes, got {tuple(source.shape)} and "
            f"{tuple(target.shape)}"
        )
    if not source.is_floating_point() or not (source.isfinite().all() and target.isfinite().all()):
        raise ValueError("source and target must be finite, normalised coordinates in floating point")
    if tuple(affine.shape) != (n + 1, n + 1):
        raise ValueError(f"affine must be ({n + 1}, {n + 1}), got {tuple(affine.shape)}")
    if min(size) < 2:
        raise ValueError(f"size must have at least 2 nodes along each axis, got {size}")
    if steps < 0 or not lr > 0 or not smoothness >= 0:
        raise ValueError(
            f"steps and smoothness must not be negative and lr positive, got {steps}, {smoothness} and {lr}"
        )
