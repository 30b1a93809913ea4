# SPDX-License-Identifier: Apache-2.0
"""A copy of a network that follows it slowly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ["MomentumTeacher"]


class MomentumTeacher(nn.Module):
    """A deep copy without gradients whose weights are a moving average of the student's (BYOL, arXiv 2006.07733).

    It is a submodule of the pretext network, so that checkpoints and federated exchange hold it; train and eval mode
    follow the parent. It moves only in ``update``, which a handler calls.

    Args:
        module: the student; copied to the attribute ``module``, buffers included.
        init: "copy" starts equal to the student, "random" draws every layer anew by its ``reset_parameters``.

    Raises:
        ValueError: unknown ``init``, or a layer with parameters of its own that cannot be drawn anew.
    """

    def __init__(self, module: nn.Module, init: str = "copy") -> None:
        super().__init__()
        if init not in ("copy", "random"):
            raise ValueError(f"init must be 'copy' or 'random', got {init!r}")
        self.module = deepcopy(module).requires_grad_(False)
        if init == "random":
            _reset(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Parameters t <- momentum * t + (1 - momentum) * s, matched by name; buffers take the student's values.

        Args:
            student: a module with at least the names of the copy.
            momentum: the share of the teacher that is kept, from 0 to 1.

        Raises:
            KeyError: the student lacks a parameter or buffer; nothing has moved then.
            ValueError: ``momentum`` outside [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum is the share of the teacher that is kept, from 0 to 1, got {momentum}")
        parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
        own, own_buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        lacking = [name for name in own if name not in parameters] + [n for n in own_buffers if n not in buffers]
        if lacking:
            raise KeyError(f"{type(student).__name__} lacks {lacking[:3]} and has not the layout of its teacher")
        if own:  # the foreach kernel refuses empty lists
            torch._foreach_lerp_(list(own.values()), [parameters[name] for name in own], 1.0 - momentum)
        for name, buffer in own_buffers.items():
            buffer.copy_(buffers[name])  # in place: assignment would take over a subclass such as MetaTensor


def _reset(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"init='random': layer {name!r} ({type(layer).__name__}) has parameters but no reset_parameters(); "
                "use init='copy'"
            )
