# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from ignite.metrics import Accuracy

from monai_ssl.metrics import nearest_rows, retrieval_hits


def test_nearest_by_angle_not_by_length() -> None:
    rows = torch.tensor([[1.0, 0.1], [0.1, 5.0], [-1.0, -1.0]])
    others = torch.tensor([[0.0, 0.1], [9.0, 9.0], [0.2, 0.0]])
    assert nearest_rows(rows, others).tolist() == [2, 0, 0]  # of two equal ones the first


def test_hits_over_all_leading_axes() -> None:
    codes = torch.eye(12).reshape(2, 3, 2, 12)
    hits, ones = retrieval_hits(codes, codes)
    assert hits.tolist() == ones.tolist() == [1] * 12
    swapped = codes.flatten(0, 2)[[1, 0, *range(2, 12)]].reshape_as(codes)
    assert retrieval_hits(codes, swapped)[0].tolist() == [0, 0] + [1] * 10


def test_accuracy_over_batches_of_unequal_size() -> None:
    metric = Accuracy()
    metric.update(retrieval_hits(torch.eye(4), torch.eye(4)))
    metric.update(retrieval_hits(torch.eye(2), torch.eye(2).flip(0)))
    assert metric.compute() == pytest.approx(4 / 6)


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        nearest_rows(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 3\)"):
        retrieval_hits(torch.ones(2, 3), torch.ones(3, 3))
