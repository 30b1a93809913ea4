# SPDX-License-Identifier: Apache-2.0
"""Several pretext tasks that train one encoder together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["MultiTaskNet"]


class MultiTaskNet(nn.Module):
    """Run each task's pretext network on its own images; all of them hold the same encoder object.

    Source: one trunk with a head for each self-supervised task, arXiv 1708.07860. Here every step trains all
    tasks, on images made of the same crop.

    The encoder is called once per task. The state dict holds it once, as ``encoder``, so that loading a part of it, as
    federated learning does, cannot put old weights beside new ones.

    Args:
        encoder: kept as ``encoder``, the product of the training.
        tasks: name -> pretext network that was built around ``encoder`` and has it as its attribute ``encoder``.
        inputs: name -> keys of the images that go into that task's ``forward``, in the order of its arguments.

    Raises:
        ValueError: no task, a task with another encoder object or without one, or names of ``tasks`` and ``inputs``
            that differ.
    """

    def __init__(self, encoder: nn.Module, tasks: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        if not tasks or set(tasks) != set(inputs):
            raise ValueError(
                f"tasks {sorted(tasks)} and inputs {sorted(inputs)} must have the same names, at least one"
            )
        for name, task in tasks.items():
            if getattr(task, "encoder", None) is not encoder:
                raise ValueError(
                    f"task '{name}' ({type(task).__name__}) does not hold the shared encoder: build it around it"
                )
        if any(isinstance(keys, str) or not keys for keys in inputs.values()):
            raise ValueError(f"inputs must name a list of keys for each task, got {dict(inputs)}")
        self.inputs = {name: tuple(keys) for name, keys in inputs.items()}
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)
        self.register_state_dict_post_hook(_drop_copies)
        self.register_load_state_dict_pre_hook(_restore_copies)

    def forward(self, images: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Name of each task -> what its network gives.

        Args:
            images: tensors under the keys that ``inputs`` names; others are left alone.

        Raises:
            KeyError: a key of ``inputs`` is absent.
        """
        lacking = sorted({key for keys in self.inputs.values() for key in keys} - set(images))
        if lacking:
            raise KeyError(f"images {lacking} are not among {sorted(images)}")
        return {name: task(*(images[key] for key in self.inputs[name])) for name, task in self.tasks.items()}

    def update_teacher(self, momentum: float = 0.9) -> None:
        """Move the teachers of the tasks that have one; ``momentum`` is the share of them that is kept."""
        for task in self.tasks.values():
            if hasattr(task, "update_teacher"):
                task.update_teacher(momentum)


def _drop_copies(net: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    copies = tuple(f"{prefix}tasks.{name}.encoder." for name in net.tasks)
    for key in [key for key in state if key.startswith(copies)]:
        del state[key]


def _restore_copies(net: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    own = f"{prefix}encoder."
    for key in [key for key in state if key.startswith(own)]:
        for name in net.tasks:
            state[f"{prefix}tasks.{name}.encoder.{key.removeprefix(own)}"] = state[key]
