# SPDX-License-Identifier: Apache-2.0
"""What VoCo's prediction term is for predictors that look at nothing, exact over all starts of a random crop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_ssl.losses import VoCoLoss
from monai_ssl.metrics import constant_prediction_loss
from monai_ssl.transforms import overlap_fractions

EPS = 1e-6
V2, V1, CVPR = ("overlap", "log"), ("overlap", "square"), ("binary", "square")


def all_labels(roi: int, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Labels of one random crop (N, 1, K) for starts in the first half of every axis, and their shares of all starts.

    Mirrored starts have mirrored labels, so that a start which is not in the middle of an axis stands for two.
    """
    lasts = [(g - 1) * roi for g in grid]
    starts = torch.cartesian_prod(*(torch.arange(last // 2 + 1) for last in lasts))
    copies = torch.where(2 * starts == torch.tensor(lasts), 1, 2).prod(-1)
    share = copies.double() / math.prod(last + 1 for last in lasts)
    assert share.sum().item() == pytest.approx(1, abs=1e-12)
    return overlap_fractions(starts, roi, grid, dtype=torch.float64)[:, None], share


def mirrored(cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Mean over the mirror images of each cell, (K, ...): what all starts give in place of the first half."""
    values = cells.reshape(*grid, -1)
    for axis in range(len(grid)):
        values = (values + values.flip(axis)) / 2
    return values.reshape(cells.shape)


def minimum(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Smallest value over constants in [0, 1], for each row of loss(constants) (..., S)."""
    constants = torch.linspace(0, 1, 11, dtype=torch.float64)
    best = constants[loss(constants).argmin(-1)].reshape(-1).unique()
    for step in (0.025, 0.00625):
        around = best[:, None] + step * torch.arange(-4, 5, dtype=torch.float64)
        constants = around.clamp(0, 1).flatten().unique()
        values = loss(constants)
        best = constants[values.argmin(-1)].reshape(-1).unique()
    return values.amin(-1)


def cell_losses(labels: Tensor, share: Tensor, variant: tuple[str, str], constants: Tensor) -> Tensor:
    """Contribution of each cell to pos + neg when it is predicted by a constant of its own, (K, S)."""
    y = labels[:, 0]  # (N, K)
    weight = (y > 0).double() if variant[0] == "binary" else y
    weight = share[:, None] * weight / (weight.sum(-1, keepdim=True) + EPS)
    empty = (y == 0).double()
    empty = share @ (empty / (empty.sum(-1, keepdim=True) + EPS))
    values = []
    for c in constants:
        miss = -torch.log(1 - c + EPS) if variant[1] == "log" else c**2
        values.append((weight * -torch.log(1 - (y - c).abs() + EPS)).sum(0) + empty * miss)
    return torch.stack(values, dim=-1)


@pytest.mark.parametrize(
    "roi, grid, variant, at_zero, constant, per_cell, accuracy",
    [
        (64, (3, 3, 1), V2, 0.7277, 0.5892, 0.5155, 0.2539),
        (64, (3, 3, 1), V1, 0.7277, 0.3649, 0.3465, 0.2539),
        (64, (3, 3, 1), CVPR, 0.3862, 0.2564, 0.2520, 0.2539),
        (96, (4, 4, 1), V1, 0.7175, 0.3625, 0.3521, 0.1127),
        (96, (4, 4, 1), CVPR, 0.3718, 0.2513, 0.2488, 0.1127),
        (64, (4, 4, 1), V2, 0.7226, 0.5872, 0.5461, 0.1134),
        (16, (3, 3, 1), V2, 0.8458, 0.6098, 0.5533, 0.2654),
        (12, (3, 3, 1), V2, 0.9288, 0.6199, 0.5697, 0.2704),
        (16, (2, 3, 2), V2, 0.4678, 0.4131, 0.3608, 0.1444),
        (16, (2, 2, 2), V2, 0.4820, 0.2972, 0.2972, 0.1484),
    ],
)
def test_chance_levels(
    roi: int, grid: Any, variant: Any, at_zero: float, constant: float, per_cell: float, accuracy: float
) -> None:
    labels, share = all_labels(roi, grid)
    overall = lambda c: share @ constant_prediction_loss(labels, c, *variant)
    assert overall(torch.zeros(1)).item() == pytest.approx(at_zero, abs=1e-4)
    assert minimum(overall).item() == pytest.approx(constant, abs=1e-4)
    cells = minimum(lambda c: mirrored(cell_losses(labels, share, variant, c), grid)).sum()
    assert cells.item() == pytest.approx(per_cell, abs=1e-4)
    y = labels[:, 0]
    highest = mirrored((share @ (y == y.amax(-1, keepdim=True)).double())[:, None], grid)
    assert highest.max().item() == pytest.approx(accuracy, abs=1e-4)
    assert (share @ y.mean(-1)).item() == pytest.approx(1 / math.prod(grid), abs=1e-12)  # error of the constant 0


@pytest.mark.parametrize("roi, grid", [(4, (3, 2, 1)), (3, (2, 3)), (3, (2, 2, 2))])
def test_half_of_the_starts_stands_for_all(roi: int, grid: Any) -> None:
    labels, share = all_labels(roi, grid)
    full = torch.cartesian_prod(*(torch.arange((g - 1) * roi + 1) for g in grid))
    full = overlap_fractions(full, roi, grid, dtype=torch.float64)[:, None]
    each = torch.full((len(full),), 1 / len(full), dtype=torch.float64)
    constants = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    for variant in (V2, V1, CVPR):
        a, b = (s @ constant_prediction_loss(y, constants, *variant) for y, s in ((labels, share), (full, each)))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        cells = mirrored(cell_losses(labels, share, variant, constants), grid)
        torch.testing.assert_close(cells, cell_losses(full, each, variant, constants), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "roi, grid, variant, at_zero, constant",
    [(64, (3, 3, 1), V2, 0.7129, 0.5832), (96, (4, 4, 1), V1, 0.7113, 0.3607)],
)
def test_chance_levels_of_the_released_range(
    roi: int, grid: Any, variant: Any, at_zero: float, constant: float
) -> None:
    side = torch.arange((grid[0] - 1) * roi)
    labels = overlap_fractions(torch.cartesian_prod(side, side, torch.arange(1)), roi, grid, dtype=torch.float64)
    overall = lambda c: constant_prediction_loss(labels[:, None], c, *variant).mean(0)
    assert overall(torch.zeros(1)).item() == pytest.approx(at_zero, abs=1e-4)
    best = {V2: 0.188, V1: 0.308}[variant]
    nearby = best + torch.arange(-3, 4, dtype=torch.float64) / 100
    assert overall(nearby).min().item() == pytest.approx(constant, abs=1e-4)


@pytest.mark.parametrize(
    "roi, grid, variant, best",
    [(64, (3, 3, 1), V2, 0.188), (96, (4, 4, 1), V1, 0.308), (96, (4, 4, 1), CVPR, 0.161), (64, (4, 4, 1), V2, 0.187)],
)
def test_best_constants(roi: int, grid: Any, variant: Any, best: float) -> None:
    labels, share = all_labels(roi, grid)
    constants = best + torch.arange(-5, 6, dtype=torch.float64) / 1000
    values = share @ constant_prediction_loss(labels, constants, *variant)
    assert constants[values.argmin()].item() == pytest.approx(best, abs=6e-4)


def test_orthogonal_projections_are_the_trivial_solution() -> None:
    labels, _ = all_labels(12, (3, 3, 1))
    label = labels[:40].reshape(20, 2, 9)
    eye = torch.eye(11, dtype=torch.float64).expand(20, 11, 11)
    terms = VoCoLoss().terms((eye, eye), label)
    at_zero = constant_prediction_loss(label, torch.zeros(1)).mean().item()
    assert (terms["pos"] + terms["neg"]).item() == pytest.approx(at_zero, abs=1e-12)
    assert terms["inter"].item() == pytest.approx(0, abs=2e-6)
    assert terms["reg"].item() == 0
