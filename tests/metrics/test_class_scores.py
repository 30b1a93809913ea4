# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from monai.metrics import ROCAUCMetric

from monai_ssl.metrics import ClassScoreMetric, balanced_accuracy, roc_auc_per_class

# what the network says of six cases; the classes are 0 0 0 1 1 2
PROBABILITIES = torch.tensor(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]
)
LABEL = torch.tensor([0, 0, 0, 1, 1, 2])


def test_balanced_accuracy_by_hand() -> None:
    """2 of 3, 1 of 2, 1 of 1; a class without cases does not count."""
    assert balanced_accuracy(PROBABILITIES, LABEL) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert balanced_accuracy(PROBABILITIES[:5], LABEL[:5]) == pytest.approx((2 / 3 + 1 / 2) / 2)


def auc_by_pairs(score: torch.Tensor, true: torch.Tensor) -> float:
    pairs = [(a > b).item() + 0.5 * (a == b).item() for a in score[true] for b in score[~true]]
    return sum(pairs) / len(pairs)


def test_area_is_the_share_of_pairs_in_order() -> None:
    expected = [auc_by_pairs(PROBABILITIES[:, k], k == LABEL) for k in range(3)]
    assert expected[0] == pytest.approx(7 / 9)
    assert roc_auc_per_class(PROBABILITIES, LABEL) == pytest.approx(expected)


def of_all(score: str, probabilities: torch.Tensor, label: torch.Tensor) -> float:
    """In two batches of logits, which are defined up to a constant."""
    metric = ClassScoreMetric(score)
    for part in (slice(0, 2), slice(2, None)):
        metric(probabilities[part].log() + 3, label[part])
    value = metric.aggregate()
    metric.reset()
    return value


def test_over_batches() -> None:
    assert of_all("balanced_accuracy", PROBABILITIES, LABEL) == pytest.approx(13 / 18)
    area = of_all("roc_auc", PROBABILITIES, LABEL)
    assert area == pytest.approx(sum(roc_auc_per_class(PROBABILITIES, LABEL)) / 3)
    monai = ROCAUCMetric()
    monai(PROBABILITIES, torch.nn.functional.one_hot(LABEL))
    assert area == pytest.approx(monai.aggregate())


def test_a_class_without_cases(caplog: pytest.LogCaptureFixture) -> None:
    """MONAI's mean is nan then; ours is that of the other classes, and the log says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai = ROCAUCMetric()
        monai(PROBABILITIES[:5], torch.nn.functional.one_hot(LABEL[:5], 3))
        assert math.isnan(monai.aggregate())
    areas = roc_auc_per_class(PROBABILITIES[:5], LABEL[:5])
    assert math.isnan(areas[2])
    assert of_all("roc_auc", PROBABILITIES[:5], LABEL[:5]) == pytest.approx(sum(areas[:2]) / 2)
    assert "5 evaluated cases have none of class 2: the area under the ROC curve is the mean over 2 of 3" in caplog.text


def test_one_class_only_does_not_stop_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert math.isnan(of_all("roc_auc", PROBABILITIES[:3], LABEL[:3]))
    assert "none of class 1, 2" in caplog.text
    assert of_all("balanced_accuracy", PROBABILITIES[:3], LABEL[:3]) == pytest.approx(2 / 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match="balanced_accuracy or roc_auc, got 'f1'"):
        ClassScoreMetric("f1")
    with pytest.raises(ValueError, match=r"\(6, 3\) must be \(B, K\) and classes \(5,\)"):
        ClassScoreMetric("roc_auc")(PROBABILITIES, LABEL[:5])
    with pytest.raises(ValueError, match="nothing to aggregate"):
        ClassScoreMetric("roc_auc").aggregate()
