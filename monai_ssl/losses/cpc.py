# SPDX-License-Identifier: Apache-2.0
"""Losses of contrastive predictive coding: tell the code that comes next from other codes.

Source: arXiv 2006.03829 (3D-CPC) and arXiv 1807.03748 (InfoNCE). The paper prints a softmax whose denominator has the
sum over negatives inside the exponent; its released code (`HealthML/self-supervised-3d-tasks`) has a binary loss with
one negative per column. All three are here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._precision import full_precision, no_autocast, unit_rows
from .gather import gather_rows

__all__ = ["CPCLoss", "binary", "binary_scores", "infonce", "sum_exponent"]

MODES = ("infonce", "paper", "bce")


def infonce(positive: Tensor, negative: Tensor) -> Tensor:
    """Cross-entropy of the positive among its negatives: logsumexp([s+, s_1 .. s_N]) - s+.

    Source: equation 4 of arXiv 1807.03748.

    Args:
        positive: scores s+, (M,).
        negative: scores s_n, (M, N).

    Returns:
        (M,).

    Raises:
        ValueError: when the shapes do not fit.
    """
    with no_autocast(positive):
        positive, negative = _scores(positive, negative)
        return torch.logsumexp(torch.cat([positive[..., None], negative], -1), -1) - positive


def sum_exponent(positive: Tensor, negative: Tensor) -> Tensor:
    """The equation of arXiv 2006.03829 as printed: ln(1 + exp(sum of s_n - s+)), the sum inside the exponent.

    Equal to :func:`infonce` for one negative; for many it saturates.

    Args:
        positive: scores s+, (M,).
        negative: scores s_n, (M, N).

    Returns:
        (M,).

    Raises:
        ValueError: when the shapes do not fit.
    """
    with no_autocast(positive):
        positive, negative = _scores(positive, negative)
        return F.softplus(negative.sum(-1) - positive)


def binary_scores(prediction: Tensor, target: Tensor) -> Tensor:
    """One logit per column: the product, averaged over steps and dimensions.

    Source: released code of arXiv 2006.03829.

    Args:
        prediction: (..., K, D).
        target: (..., K, D).

    Returns:
        (...).
    """
    with no_autocast(prediction):
        return (full_precision(prediction) * full_precision(target)).mean((-2, -1))


def binary(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of the binary cross-entropies of a positive and a negative logit.

    Source: released code of arXiv 2006.03829.

    Args:
        positive: logits l+, (...).
        negative: logits l-, (...).

    Returns:
        (softplus(-l+) + softplus(l-)) / 2, (...).
    """
    with no_autocast(positive):
        return (F.softplus(-full_precision(positive)) + F.softplus(full_precision(negative))) / 2


class CPCLoss(nn.Module):
    """Each predicted code must be nearest to its own target among the codes of the batch.

    Source: 3D-CPC, arXiv 2006.03829. Three modes:

    - "infonce": mean of :func:`infonce` over rows, our default; neither the equation as printed nor the released code.
    - "paper": mean of :func:`sum_exponent` over rows, the equation as printed.
    - "bce": mean of :func:`binary` over columns, as released: logits from :func:`binary_scores` over all steps, one
      negative per column, ``temperature`` and ``normalize`` unused. Our negatives may come from another volume.

    Rows are the M = B * Q * K pairs of prediction and target in C order, scores their products over the temperature.
    Negatives are all other targets of the batch, of the same volume and of others; under several processes those of all
    processes, and the gradient is that of the joined batch. Chance level of "infonce": ln M.

    Args:
        mode: "infonce", "paper" or "bce".
        temperature: divides the scores.
        normalize: scores are cosines.
        num_negatives: negatives drawn for each row, uniformly with replacement; None for all others ("bce": one).

    Shapes:
        input (predictions) and target (codes) ``(B, Q, K, D)``; 0-dim result, float32 also under autocast, or float64.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, ``num_negatives`` below 1 or other than one for
            "bce", shapes that differ or have not four axes, fewer than two candidates, ``negatives`` that are no (M, N)
            integers, or different B on the processes.
    """

    def __init__(
        self,
        mode: str = "infonce",
        temperature: float = 0.1,
        normalize: bool = True,
        num_negatives: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if num_negatives is not None and (num_negatives < 1 or (mode == "bce" and num_negatives > 1)):
            raise ValueError(f"num_negatives must be at least 1, and 1 for mode 'bce', got {num_negatives}")
        self.mode = mode
        self.temperature = temperature
        self.normalize = normalize
        self.num_negatives = num_negatives

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        negatives: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean over rows, or over columns for "bce".

        Args:
            input: predictions, (B, Q, K, D).
            target: codes, (B, Q, K, D).
            negatives: (M, N) int64, numbers of rows of the joined batch, used as they are; for "bce" (B * Q, 1),
                numbers of columns.
            generator: draws the negatives where ``negatives`` is None and not all others are used.

        Returns:
            0-dim tensor.
        """
        if input.ndim != 4 or input.shape != target.shape:
            raise ValueError(f"input {tuple(input.shape)} and target {tuple(target.shape)} must be equal, (B, Q, K, D)")
        with no_autocast(input):
            if self.mode == "bce":
                return self._bce(input, target, negatives, generator)
            prepare = unit_rows if self.normalize else full_precision
            rows, codes = prepare(input).flatten(0, 2), prepare(target).flatten(0, 2)  # (M, D)
            codes, own = _candidates(codes)
            scores = rows @ codes.T / self.temperature  # (M, M * processes)
            if negatives is None and self.num_negatives is None and self.mode == "infonce":
                return F.cross_entropy(scores, own)
            index = _negatives(own, len(codes), negatives, self.num_negatives, generator)
            term = infonce if self.mode == "infonce" else sum_exponent
            return term(scores.gather(1, own[:, None]).squeeze(1), scores.gather(1, index)).mean()

    def _bce(
        self, input: Tensor, target: Tensor, negatives: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        columns, codes = full_precision(input).flatten(0, 1), full_precision(target).flatten(0, 1)  # (B * Q, K, D)
        others, own = _candidates(codes)
        index = _negatives(own, len(others), negatives, 1, generator)
        if index.shape[1] != 1:
            raise ValueError(f"negatives {tuple(index.shape)} must be ({len(columns)}, 1), one column for each")
        return binary(binary_scores(columns, codes), binary_scores(columns, others[index[:, 0]])).mean()


def _scores(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    if negative.shape[:-1] != positive.shape:
        raise ValueError(
            f"positive {tuple(positive.shape)} and negative {tuple(negative.shape)} must be (M,) and (M, N)"
        )
    return full_precision(positive), full_precision(negative)


def _candidates(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of all processes, and the places of the own ones among them."""
    gathered, first = gather_rows(codes)
    if len(gathered) < 2:
        raise ValueError(f"{len(gathered)} candidate(s): without another code there are no negatives")
    return gathered, first + torch.arange(len(codes), device=codes.device)


def _negatives(
    own: Tensor, total: int, given: Tensor | None, num: int | None, generator: torch.Generator | None
) -> Tensor:
    """Numbers (M, N) of negatives: the given ones, or ``num`` drawn, or all that are not the row's own."""
    if given is not None:
        if given.ndim != 2 or len(given) != len(own) or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"negatives {tuple(given.shape)} of {given.dtype} must be ({len(own)}, N) integers")
        return given.to(own.device, torch.int64)
    if num is None:
        index = torch.arange(total - 1, device=own.device).expand(len(own), -1)
    else:
        device = own.device if generator is None else generator.device
        index = torch.randint(total - 1, (len(own), num), generator=generator, device=device).to(own.device)
    return index + (index >= own[:, None])  # counted without the own number
