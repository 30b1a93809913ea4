# SPDX-License-Identifier: Apache-2.0
"""NT-Xent: find the other view of an item among all views of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._precision import no_autocast, unit_rows
from .gather import gather_rows

__all__ = ["NTXentLoss"]


class NTXentLoss(nn.Module):
    """Normalised, temperature-scaled cross-entropy of each view against all others, the other view being the class.

    Source: equation 1 of SimCLR (arXiv 2002.05709); here the loss of 3D-Exemplar (arXiv 2006.03829), whose paper and
    released code have a triplet loss. Same value as ``monai.losses.ContrastiveLoss``, by one matrix product. Candidates
    are the views of all processes, and the gradient is that of the joined batch. Chance level ln(2N - 1).

    Args:
        temperature: divides the cosines.

    Shapes:
        input and target ``(N, D)``, row i of one and of the other from the same item; 0-dim result in float32, also
        under autocast, or float64.

    Raises:
        ValueError: unequal shapes, other than two axes, fewer than two items over all processes, a temperature that is
            not positive, or different N on the processes.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.ndim != 2 or input.shape != target.shape:
            raise ValueError(f"input {tuple(input.shape)} and target {tuple(target.shape)} must be equal, (N, D)")
        with no_autocast(input):
            views = torch.cat([unit_rows(input), unit_rows(target)])  # (2 N, D)
            candidates, first = gather_rows(views)
            if len(candidates) < 4:
                raise ValueError(f"input {tuple(input.shape)}: at least two items are needed, one has no negatives")
            number = torch.arange(len(views), device=views.device)
            scores = views @ candidates.T / self.temperature  # (2 N, 2 N * processes)
            scores = scores.scatter(1, (first + number)[:, None], float("-inf"))  # not its own candidate
            return F.cross_entropy(scores, first + (number + len(input)) % len(views))
