# SPDX-License-Identifier: Apache-2.0
"""Timing of alternatives side by side, so that the drift of a shared machine cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(alternatives: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Median seconds of each alternative; they take turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(repeats + 1):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
