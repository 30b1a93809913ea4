# SPDX-License-Identifier: Apache-2.0
"""Affine transforms fitted to pairs of points, plainly or with outliers among them (SAM-affine)."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_ssl.transforms.view_geometry import transform_points

__all__ = ["FIT_METHODS", "fit_affine"]

FIT_METHODS = ("lstsq", "huber", "ransac")
_FLAT = 1e-5  # extent across a set of points, relative to that along it, below which it is flat: float32 at 1 m
_ROUNDS = 50  # of reweighting
_BLOCK = 2**22  # residuals of trials that are in memory at a time


def fit_affine(
    source: Tensor,
    target: Tensor,
    method: str = "lstsq",
    weights: Tensor | None = None,
    threshold: float = 10.0,
    num_trials: int = 500,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The affine M with target = M source as nearly as possible: n (n + 1) degrees of freedom, solved in float64.

    Source: SAME++ (arXiv 2311.14986), whose released code knows the plain fit alone. Noise is expected in the target.

    Args:
        source: (P, n), of any floating type, on any device.
        target: (P, n), in mm for the robust methods.
        method: "lstsq": least squares. "huber": reweighted with min(1, d / r), r the residual of a pair and d 1.345
            robust standard deviations of all residuals, but at least 1e-3: for some outliers. "ransac": least squares
            on the largest set of pairs that agree with an affine through n + 1 of them: for up to half outliers and
            more.
        weights: of the pairs, (P,), not negative; pairs of weight 0 are left out. They do not count in the vote of
            "ransac", only in the fit that follows.
        threshold: residual below which a pair agrees, in mm, for "ransac".
        num_trials: sets of n + 1 pairs that are tried by "ransac".
        generator: of the trials, on the CPU; None: torch's own.

    Returns:
        (n + 1, n + 1) float64, on the CPU.

    Raises:
        ValueError: shapes, values or a method that cannot be used; points that are fewer than n + 1 or lie in one plane
            (one line in 2D); or, for "ransac", no set that agrees.
    """
    x, y, w = _checked(source, target, weights)
    if method == "lstsq":
        return _least_squares(x, y, w)
    if method == "huber":
        return _huber(x, y, w)
    if method == "ransac":
        if not threshold > 0 or num_trials < 1:
            raise ValueError(f"threshold must be above 0 mm and num_trials at least 1, got {threshold}, {num_trials}")
        return _ransac(x, y, w, threshold, num_trials, generator)
    raise ValueError(f"method must be one of {', '.join(FIT_METHODS)}, got {method!r}")


def _checked(source: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that count, float64 on the CPU."""
    if source.ndim != 2 or source.shape != target.shape:
        raise ValueError(f"source and target must be (P, n) both, got {tuple(source.shape)} and {tuple(target.shape)}")
    x, y = (points.detach().cpu().double() for points in (source, target))
    w = torch.ones(len(x), dtype=x.dtype) if weights is None else weights.detach().cpu().double()
    if w.shape != x.shape[:1] or not (w >= 0).all():
        raise ValueError(f"weights must be ({len(x)},), one for each pair, and not negative, got {tuple(w.shape)}")
    if not (x.isfinite().all() and y.isfinite().all() and w.isfinite().all()):
        raise ValueError("source, target and weights must be finite")
    used = w > 0
    if used.sum() <= x.shape[1]:
        raise ValueError(f"an affine in {x.shape[1]}D needs at least {x.shape[1] + 1} pairs, got {int(used.sum())}")
    return x[used], y[used], w[used]


def _least_squares(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    share = w / w.sum()
    middle, goal = share @ x, share @ y
    root = share.sqrt()[:, None]
    scale = (root * (x - middle)).norm().clamp_min(1e-300)
    u, extent, axes = torch.linalg.svd(root * (x - middle) / scale, full_matrices=False)
    if not extent[-1] > _FLAT * extent[0]:
        shape = {1: "in one point", 2: "on one line"}.get(x.shape[1], "in one plane")
        raise ValueError(f"the {len(x)} source points lie {shape}: no affine follows from them, give points around it")
    matrix = torch.eye(x.shape[1] + 1, dtype=x.dtype)
    matrix[:-1, :-1] = (root * (y - goal)).T @ u @ (axes / extent[:, None]) / scale
    matrix[:-1, -1] = goal - matrix[:-1, :-1] @ middle
    return matrix


def _huber(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    matrix = _least_squares(x, y, w)
    for _ in range(_ROUNDS):
        residual = _residual(matrix, x, y)
        delta = (1.345 * 1.4826 * residual.median()).clamp_min(1e-3)
        before, matrix = matrix, _least_squares(x, y, w * (delta / residual).clamp_max(1))
        if (matrix - before).abs().max() < 1e-8:
            break
    return matrix


def _ransac(
    x: Tensor, y: Tensor, w: Tensor, threshold: float, num_trials: int, generator: torch.Generator | None
) -> Tensor:
    _least_squares(x, y, w)  # refuses points in one plane, where no trial could succeed
    number, n = x.shape
    rows = torch.rand(num_trials, number, generator=generator).topk(n + 1).indices  # (T, n + 1)
    near, far = x - x.mean(0), y - y.mean(0)
    one = torch.ones(number, 1, dtype=x.dtype)
    models = torch.linalg.solve_ex(torch.cat([near, one], 1)[rows], far[rows]).result.mT  # (T, n, n + 1)
    bottom = torch.eye(n + 1, dtype=x.dtype)[-1:].expand(num_trials, 1, n + 1)
    agrees = torch.cat(
        [
            _residual(part, near, far) < threshold
            for part in torch.cat([models, bottom], 1).split(max(1, _BLOCK // (number * n)))
        ]
    )  # (T, P); a sample on one plane gives infinite or wild models, with which no pair agrees
    best = agrees[agrees.sum(1).argmax()]
    if best.sum() < min(number, n + 2):
        raise ValueError(
            f"no {n + 2} of {number} pairs agree on an affine within {threshold} mm in {num_trials} trials: "
            "most are outliers; give a higher threshold or num_trials, or better matches"
        )
    return _least_squares(x[best], y[best], w[best])


def _residual(matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(..., P), of affines (..., n + 1, n + 1)."""
    return (transform_points(matrix, x) - y).norm(dim=-1)
