# SPDX-License-Identifier: Apache-2.0
"""What each of several pretext tasks shows the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .panels import Panel

__all__ = ["multi_task_panels"]


def multi_task_panels(
    batch: Mapping[str, Any], tasks: Mapping[str, Callable[[Mapping[str, Any]], Sequence[Panel]]]
) -> list[Panel]:
    """The panels of one task after the other; the first of each bears the task's name and begins a group.

    Args:
        batch: collated, with the images and labels of all tasks.
        tasks: name -> function that draws the task's panels from the batch, such as ``rotation_panels`` with its keys
            given.
    """
    panels: list[Panel] = []
    for name, draw in tasks.items():
        first, *others = draw(batch)
        panels += [first._replace(caption=f"{name}: {first.caption}", lead=True), *others]
    return panels
