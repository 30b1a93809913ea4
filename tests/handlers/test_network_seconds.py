# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import MetricsSaver
from torch import nn

from monai_ssl.handlers import NetworkSeconds, network_seconds


class Clock:
    now = 0.0


class Loader:
    """Two batches, each of which takes 100 seconds."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(len(self)):
            Clock.now += 100.0
            yield {"image": torch.zeros(1, 1, 2), "label": torch.zeros(1, 1, 2)}

    def __len__(self) -> int:
        return 2


class Slow(nn.Module):
    """The first pass takes 3 seconds, the others 1."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Clock.now += 1.0 if self.passes else 3.0
        self.passes += 1
        return x


def test_mean_of_the_forward_passes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_seconds.time, "perf_counter", lambda: Clock.now)

    def measured(data: Any) -> Any:
        Clock.now += 10.0
        return data

    evaluator = SupervisedEvaluator(
        torch.device("cpu"), Loader(), Slow(), postprocessing=measured,
        val_handlers=[NetworkSeconds(), MetricsSaver(str(tmp_path), metrics="*")],
    )  # fmt: skip
    evaluator.run()
    assert evaluator.state.metrics["seconds"] == 2.0
    assert "seconds,2.0" in (tmp_path / "metrics.csv").read_text().splitlines()
    evaluator.run(2)  # a further epoch is counted by itself
    assert evaluator.state.metrics["seconds"] == 1.0
