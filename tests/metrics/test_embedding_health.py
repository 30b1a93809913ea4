# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from monai.metrics import compute_embedding_collapse

from monai_ssl.metrics import effective_rank, embedding_std, uniformity


def test_embedding_std_by_hand() -> None:
    # directions (1, 0), (0, 1), (1, 0), (0, 1): each coordinate is 1, 0, 1, 0 with sample variance 1/3
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.1], [1.0, 0.0], [0.0, 7.0]])
    assert float(embedding_std(embeddings)) == pytest.approx(math.sqrt(1 / 3), abs=1e-6)


def test_embedding_std_of_a_sphere_is_one_over_root_dimension() -> None:
    embeddings = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert float(embedding_std(embeddings)) == pytest.approx(1 / 4, rel=0.02)


@pytest.mark.parametrize(
    "rows, rank",
    [
        ([[1, 0], [-1, 0], [1, 0], [-1, 0]], 1.0),  # one direction
        ([[1, 0], [-1, 0], [0, 1], [0, -1]], 2.0),  # two equal directions
        ([[5, 7], [5, 7], [5, 7]], 0.0),  # one point
        # singular values in the ratio 3 : 1, p = (3/4, 1/4): exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
        ([[3, 0], [-3, 0], [0, 1], [0, -1]], 4 / 3**0.75),
    ],
)
def test_effective_rank_by_hand(rows: list[list[int]], rank: float) -> None:
    embeddings = torch.tensor(rows, dtype=torch.float32)
    assert float(effective_rank(embeddings)) == pytest.approx(rank, abs=1e-5)
    assert float(effective_rank(embeddings + 10.0)) == pytest.approx(rank, abs=1e-4)  # centred


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_effective_rank_agrees_with_monai(shape: tuple[int, int]) -> None:
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3
    score = compute_embedding_collapse(embeddings, include_indicators=["effective_rank"])["effective_rank_score"]
    largest = min(shape[0] - 1, shape[1])
    assert 1 - float(effective_rank(embeddings)) / largest == pytest.approx(float(score), abs=1e-6)


def test_equal_rows_up_to_rounding_fill_nothing() -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    embeddings = row + 1e-7 * noise
    assert float(compute_embedding_collapse(embeddings)["effective_rank_score"]) < 0.1  # MONAI's alone sees no collapse
    assert float(effective_rank(embeddings)) == 0.0
    assert float(embedding_std(embeddings)) < 1e-7


@pytest.mark.parametrize(
    "rows, t, value",
    [
        ([[2, 0], [0, 9]], 2.0, -4.0),  # a right angle: squared distance 2
        ([[1, 0], [-5, 0]], 2.0, -8.0),  # opposite: 4
        ([[1, 0], [-5, 0]], 0.5, -2.0),
        ([[1, 0], [1, 0]], 2.0, 0.0),
        # two right angles and one pair of opposites
        ([[1, 0], [0, 1], [-1, 0]], 2.0, math.log((2 * math.exp(-4) + math.exp(-8)) / 3)),
    ],
)
def test_uniformity_by_hand(rows: list[list[int]], t: float, value: float) -> None:
    assert float(uniformity(torch.tensor(rows, dtype=torch.float32), t)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("metric", [embedding_std, effective_rank, uniformity])
@pytest.mark.parametrize("shape", [(1, 5), (5,), (2, 3, 4)])
def test_shapes_are_refused(metric: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        metric(torch.zeros(shape))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_taken(dtype: torch.dtype) -> None:
    embeddings = torch.randn(8, 3, generator=torch.Generator().manual_seed(4)).to(dtype)
    for metric in (embedding_std, effective_rank, uniformity):
        assert float(metric(embeddings)) == pytest.approx(float(metric(embeddings.double())), abs=1e-4)
