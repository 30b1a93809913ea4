# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from monai_ssl.visualize import Panel, draw_panels, multi_task_panels


def test_each_task_begins_a_group_with_its_name() -> None:
    batch = {"image_a": torch.zeros(1, 5, 6), "image_b": torch.ones(1, 5, 6)}
    tasks = {
        "turned": lambda batch: [Panel(batch["image_a"], "class 3"), Panel(batch["image_a"], "class 4")],
        "shuffled": lambda batch: [Panel(batch["image_b"], "permutation 1", lead=True)],
    }
    panels = multi_task_panels(batch, tasks)
    assert [(panel.caption, panel.lead) for panel in panels] == [
        ("turned: class 3", True),
        ("class 4", False),
        ("shuffled: permutation 1", True),
    ]
    assert panels[1].image is batch["image_a"]
    assert panels[2].image is batch["image_b"]
    draw_panels(panels)
