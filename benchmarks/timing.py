# SPDX-License-Identifier: Apache-2.0
"""Timing of alternatives side by side, so that the drift of a shared machine cancels."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable


def interleaved(alternatives: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Median seconds of each alternative; they take turns in random order, after one round that is not counted.

    In a fixed order an alternative would always pay for the caches and the heap that the one before it leaves behind.
    """
    order, shuffle = list(alternatives.items()), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(repeats + 1):
        shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
