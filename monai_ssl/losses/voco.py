# SPDX-License-Identifier: Apache-2.0
"""VoCo: read the position of a crop off its cosines with the base crops, and keep base crops apart.

Sources: arXiv 2402.17300 (CVPR 2024) and arXiv 2410.09890. The terms follow the released code (`Luffy03/VoCo`,
`Luffy03/Large-Scale-Medical`), which splits the prediction term into cells with and without overlap and adds the
regulariser with a plus sign. B volumes, R random crops and K base crops each, embeddings of width D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._precision import full_precision, no_autocast, unit_rows

__all__ = ["VoCoLoss", "base_similarity_loss", "inter_volume_loss", "overlap_logits", "overlap_prediction_loss"]


class _Variant(NamedTuple):
    pos_weight: str
    negative: str
    both_directions: bool  # logits are the mean of student against teacher bases and teacher against student bases
    inter: bool


VARIANTS = {
    "v2": _Variant("overlap", "log", False, True),
    "v1": _Variant("overlap", "square", True, False),
    "cvpr": _Variant("binary", "square", False, False),
}


def overlap_logits(crops: Tensor, bases: Tensor) -> Tensor:
    """Predicted overlap of each crop with each base crop: their cosine, cut to [0, 1].

    Source: VoCo (arXiv 2402.17300). The upper end matters: rounding gives cosines above 1, whose loss is not defined.

    Args:
        crops: embeddings, (..., R, D).
        bases: embeddings, (..., K, D).

    Returns:
        (..., R, K) in float32, or float64 for float64 embeddings. A zero row has cosine 0 with everything.
    """
    with no_autocast(crops):
        return _clipped_cosine(unit_rows(crops), unit_rows(bases))


def overlap_prediction_loss(
    logits: Tensor, target: Tensor, pos_weight: str = "overlap", negative: str = "log", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Distance of predicted from true overlaps, apart for cells with and without overlap.

    Source: released code of VoCo (arXiv 2402.17300, 2410.09890); the paper's form is one mean over all cells. With
    l the logits, y the target and sums over all R * K cells of a volume: pos = sum w * -log(1 - |y - l| + eps) /
    (sum w + eps), neg = sum m * g(l) / (sum m + eps), m = 1 where y is 0.

    Args:
        logits: l in [0, 1], (..., R, K).
        target: y in [0, 1], (..., R, K).
        pos_weight: w = y ("overlap") or w = 1 where y > 0 ("binary").
        negative: g(l) = -log(1 - l + eps) ("log") or l^2 ("square").
        eps: keeps logarithms and quotients finite.

    Returns:
        pos and neg, each (...).

    Raises:
        ValueError: on an unknown `pos_weight` or `negative`, or when R or K of the two inputs differ.
    """
    if pos_weight not in ("overlap", "binary"):
        raise ValueError(f"pos_weight must be 'overlap' or 'binary', got '{pos_weight}'")
    if negative not in ("log", "square"):
        raise ValueError(f"negative must be 'log' or 'square', got '{negative}'")
    if logits.shape[-2:] != target.shape[-2:]:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must end in the same (R, K)")
    with no_autocast(logits):
        logits = full_precision(logits)
        target = target.to(logits.dtype)
        weight = target if pos_weight == "overlap" else (target > 0).to(logits.dtype)
        empty = (target == 0).to(logits.dtype)
        # 1 - x first: 1 + eps would round eps off in float32
        hit = -torch.log(1 - (target - logits).abs() + eps)
        miss = -torch.log(1 - logits + eps) if negative == "log" else logits.square()
        cells = (-2, -1)
        pos = (weight * hit).sum(cells) / (weight.sum(cells) + eps)
        neg = (empty * miss).sum(cells) / (empty.sum(cells) + eps)
        return pos, neg


def base_similarity_loss(bases: Tensor, symmetric: bool = False) -> Tensor:
    """Mean over pairs of base crops i < j of relu(cos(q_i, sg(q_j)))^2, which keeps base crops apart.

    Source: released code of VoCo (arXiv 2402.17300, 2410.09890), with a plus sign: with a minus, minimising makes all
    base crops equal. As released the gradient reaches only the first of each pair.

    Args:
        bases: embeddings, (..., K, D).
        symmetric: give the gradient to both of a pair, which is that of the formula without sg; same value.

    Returns:
        (...).

    Raises:
        ValueError: when there are fewer than two base crops.
    """
    with no_autocast(bases):
        return _base_similarity(unit_rows(bases), symmetric)


def inter_volume_loss(
    crops: Tensor,
    bases: Tensor,
    teacher_crops: Tensor,
    teacher_bases: Tensor,
    partner: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Positions in volume i, read off the base crops of volume partner[i], must agree with the teacher's.

    Source: arXiv 2410.09890 (released code). The target is `overlap_logits` of the teacher embeddings, without
    gradient; weights "overlap" and negatives "log" of `overlap_prediction_loss`.

    Args:
        crops: student embeddings of random crops, (B, R, D).
        bases: student embeddings of base crops, (B, K, D).
        teacher_crops: (B, R, D).
        teacher_bases: (B, K, D).
        partner: (B,) int64, the volume whose base crops are used; default i -> (i + 1) mod B.
        eps: keeps logarithms and quotients finite.

    Returns:
        pos + neg, (B,); 0 where a volume is its own partner.

    Raises:
        ValueError: when `partner` is not (B,).
    """
    with no_autocast(crops):
        student, teacher = (unit_rows(crops), unit_rows(bases)), (unit_rows(teacher_crops), unit_rows(teacher_bases))
        return _inter_volume(*student, *teacher, partner, eps)


class VoCoLoss(nn.Module):
    """Volume contrast: overlap prediction, agreement across volumes (v2), and dissimilar base crops.

    Sources: arXiv 2402.17300 and arXiv 2410.09890. Three variants of the released code:

    - "v2": student crops against teacher bases; "overlap" and "log"; inter-volume term.
    - "v1": mean of student against teacher bases and teacher against student bases; "overlap" and "square".
    - "cvpr": student crops against teacher bases; "binary" and "square".

    Every term is taken per volume and averaged over the batch, in float32 also under autocast. The inter-volume term
    pairs volumes of the own process; it needs a batch of at least 2 there, and is left out otherwise.

    Args:
        variant: "v2", "v1" or "cvpr".
        lambda_reg: weight of the dissimilarity of base crops.
        lambda_inter: weight of the inter-volume term.
        symmetric_reg: see `base_similarity_loss`.
        eps: keeps logarithms and quotients finite; a perfect prediction scores -eps.

    Shapes: input (student, teacher), each (B, R + K, D), random crops first; target (B, R, K).

    Raises:
        ValueError: on an unknown variant, or when shapes do not fit together.
    """

    def __init__(
        self,
        variant: str = "v2",
        lambda_reg: float = 1.0,
        lambda_inter: float = 1.0,
        symmetric_reg: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got '{variant}'")
        self.variant = variant
        self.lambda_reg = lambda_reg
        self.lambda_inter = lambda_inter
        self.symmetric_reg = symmetric_reg
        self.eps = eps

    def forward(self, input: Sequence[Tensor], target: Tensor, partner: Tensor | None = None) -> Tensor:
        """Weighted sum of the terms.

        Args:
            input: student and teacher embeddings, each (B, R + K, D).
            target: overlap fractions, (B, R, K).
            partner: (B,) int64, for the inter-volume term; default the next volume of the batch.

        Returns:
            0-dim tensor.
        """
        terms = self.terms(input, target, partner)
        loss = terms["pos"] + terms["neg"] + self.lambda_reg * terms["reg"]
        return loss + self.lambda_inter * terms["inter"] if "inter" in terms else loss

    def terms(self, input: Sequence[Tensor], target: Tensor, partner: Tensor | None = None) -> dict[str, Tensor]:
        """The terms before weighting: pos, neg, reg and, for "v2" with more than one volume or a partner, inter.

        Args:
            input: see `forward`.
            target: see `forward`.
            partner: see `forward`.

        Returns:
            0-dim tensors by name.
        """
        variant = VARIANTS[self.variant]
        with no_autocast(input[0]):
            x_s, q_s, x_t, q_t = self._split(input, target)
            logits = self._logits(x_s, q_s, x_t, q_t)
            pos, neg = overlap_prediction_loss(logits, target, variant.pos_weight, variant.negative, self.eps)
            terms = {"pos": pos.mean(), "neg": neg.mean()}
            if variant.inter and (len(target) > 1 or partner is not None):
                terms["inter"] = _inter_volume(x_s, q_s, x_t, q_t, partner, self.eps).mean()
            terms["reg"] = _base_similarity(q_s, self.symmetric_reg).mean()
            return terms

    def logits(self, input: Sequence[Tensor], target: Tensor, partner: Tensor | None = None) -> Tensor:
        """Predicted overlaps, against the base crops of another volume where `partner` says so.

        Args:
            input: see `forward`.
            target: see `forward`; only its shape is used.
            partner: (B,) int64, the volume whose base crops are used; default the own.

        Returns:
            (B, R, K).
        """
        with no_autocast(input[0]):
            x_s, q_s, x_t, q_t = self._split(input, target)
            if partner is not None:
                index = _checked_partner(partner, q_s)
                q_s, q_t = q_s[index], q_t[index]
            return self._logits(x_s, q_s, x_t, q_t)

    def _logits(self, x_s: Tensor, q_s: Tensor, x_t: Tensor, q_t: Tensor) -> Tensor:
        logits = _clipped_cosine(x_s, q_t)
        return (logits + _clipped_cosine(x_t, q_s)) / 2 if VARIANTS[self.variant].both_directions else logits

    def _split(self, input: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit vectors of student crops, student bases, teacher crops and teacher bases."""
        student, teacher = input
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(target.shape)
        if target.ndim != 3 or student.ndim != 3 or student.shape != teacher.shape:
            fits = False
        else:
            fits = student.shape[:2] == (target.shape[0], target.shape[1] + target.shape[2])
        if not fits:
            raise ValueError(
                "student {} and teacher {} must both be (B, R+K, D) for target {} = (B, R, K)".format(*shapes)
            )
        num_crops = target.shape[1]
        student, teacher = unit_rows(student), unit_rows(teacher.detach())
        return student[:, :num_crops], student[:, num_crops:], teacher[:, :num_crops], teacher[:, num_crops:]


def _clipped_cosine(crops: Tensor, bases: Tensor) -> Tensor:
    """Clipped cosines of unit vectors; relu, unlike a clamp, has gradient 0 at exactly 0."""
    return torch.relu(crops @ bases.transpose(-2, -1)).clamp(max=1)


def _base_similarity(bases: Tensor, symmetric: bool) -> Tensor:
    num = bases.shape[-2]
    if num < 2:
        raise ValueError(f"the regulariser needs pairs of base crops, got bases of shape {tuple(bases.shape)}")
    others = bases if symmetric else bases.detach()
    cosines = torch.relu(bases @ others.transpose(-2, -1))  # (..., K, K)
    return cosines.square().triu(1).sum((-2, -1)) / (num * (num - 1) / 2)


def _inter_volume(x_s: Tensor, q_s: Tensor, x_t: Tensor, q_t: Tensor, partner: Tensor | None, eps: float) -> Tensor:
    if partner is None:
        q_s, q_t = q_s.roll(-1, 0), q_t.roll(-1, 0)
    else:
        partner = _checked_partner(partner, q_s)
        q_s, q_t = q_s[partner], q_t[partner]
    target = _clipped_cosine(x_t, q_t).detach()
    pos, neg = overlap_prediction_loss(_clipped_cosine(x_s, q_s), target, eps=eps)
    if partner is None:
        return (pos + neg) * int(len(x_s) > 1)
    return (pos + neg) * (partner != torch.arange(len(partner), device=partner.device))


def _checked_partner(partner: Tensor, like: Tensor) -> Tensor:
    partner = torch.as_tensor(partner)
    if tuple(partner.shape) != (len(like),) or partner.is_floating_point() or partner.dtype == torch.bool:
        raise ValueError(
            f"partner of shape {tuple(partner.shape)} and {partner.dtype} must be ({len(like)},) int64, "
            "one volume for each"
        )
    # on a GPU the look would wait for the device
    if partner.device.type == "cpu" and ((partner < 0) | (partner >= len(like))).any():
        raise ValueError(f"partner {partner.tolist()} must hold numbers of volumes from 0 to {len(like) - 1}")
    return partner.to(like.device, torch.int64)
