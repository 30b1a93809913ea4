# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_ssl.losses import (
    VoCoLoss,
    base_similarity_loss,
    inter_volume_loss,
    overlap_logits,
    overlap_prediction_loss,
)
from monai_ssl.transforms import overlap_fractions

EPS = 1e-6
VARIANTS = {"v2": ("overlap", "log"), "v1": ("overlap", "square"), "cvpr": ("binary", "square")}


# ---- the equations of the paper, one pair at a time


def ref_cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm().clamp_min(1e-8) * b.norm().clamp_min(1e-8))


def ref_logits(crops: Tensor, bases: Tensor) -> Tensor:
    return torch.stack([torch.stack([ref_cos(x, q).clamp(0, 1) for q in bases]) for x in crops])


def ref_prediction(logits: Tensor, target: Tensor, pos_weight: str, negative: str) -> tuple[Any, Any]:
    pos = neg = weights = zeros = 0.0
    for r, k in product(*map(range, target.shape)):
        y, value = target[r, k], logits[r, k]
        weight = float(y > 0) if pos_weight == "binary" else y
        pos += weight * -torch.log(1 - abs(y - value) + EPS)
        weights += weight
        if y == 0:
            neg += -torch.log(1 - value + EPS) if negative == "log" else value**2
            zeros += 1
    return pos / (weights + EPS), neg / (zeros + EPS)


def ref_similarity(bases: Tensor, symmetric: bool) -> Any:
    pairs = list(combinations(range(len(bases)), 2))
    others = bases if symmetric else bases.detach()
    return sum(ref_cos(bases[i], others[j]).clamp_min(0) ** 2 for i, j in pairs) / len(pairs)


def ref_inter(x_s: Tensor, q_s: Tensor, x_t: Tensor, q_t: Tensor, partner: list[int]) -> list[Any]:
    values = []
    for i, j in enumerate(partner):
        target = ref_logits(x_t[i], q_t[j]).detach()
        values.append(sum(ref_prediction(ref_logits(x_s[i], q_s[j]), target, "overlap", "log")) if i != j else 0.0)
    return values


def ref_loss(student: Tensor, teacher: Tensor, target: Tensor, variant: str, partner: list[int], **weights: Any) -> Any:
    num = target.shape[1]
    teacher = teacher.detach()
    x_s, q_s, x_t, q_t = student[:, :num], student[:, num:], teacher[:, :num], teacher[:, num:]
    total = 0.0
    for b in range(len(target)):
        logits = ref_logits(x_s[b], q_t[b])
        if variant == "v1":
            logits = (logits + ref_logits(x_t[b], q_s[b])) / 2
        total += sum(ref_prediction(logits, target[b], *VARIANTS[variant]))
        total += weights.get("lambda_reg", 1) * ref_similarity(q_s[b], weights.get("symmetric_reg", False))
    if variant == "v2":
        total += weights.get("lambda_inter", 1) * sum(ref_inter(x_s, q_s, x_t, q_t, partner))
    return total / len(target)


def batch(b: int = 3, r: int = 2, k: int = 4, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and target in float64, whose cosines keep away from the kinks at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, b, r + k, d, generator=generator, dtype=torch.float64)
    target = torch.rand(b, r, k, generator=generator, dtype=torch.float64)
    target = target * (torch.rand(b, r, k, generator=generator) < 0.5)
    return student, teacher, target / target.sum(-1, keepdim=True).clamp_min(0.1)


def both_gradients(loss: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value, [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(leaves, torch.autograd.grad(value.sum(), leaves, allow_unused=True))
    ]


def assert_same(actual: Callable[..., Any], expected: Callable[..., Any], *inputs: Tensor) -> None:
    for a, e in zip(both_gradients(actual, *inputs), both_gradients(expected, *inputs)):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


# ---- hand-worked values


def test_logits_by_hand() -> None:
    logits = overlap_logits(torch.tensor([[3.0, 4], [-1, 0]]), torch.tensor([[2.0, 0], [0, 5], [0, 0]]))
    torch.testing.assert_close(logits, torch.tensor([[0.6, 0.8, 0], [0, 0, 0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "logits, target, pos_weight, negative, expected",
    [
        ([0.6, 0.8], [1, 0], "overlap", "log", (0.510823, 1.609431)),
        ([0.6, 0.8], [1, 0], "binary", "square", (0.510823, 0.64)),
        ([0.75, 0], [0.75, 0.25], "overlap", "log", (0.071919, 0)),
        ([0.75, 0], [0.75, 0.25], "binary", "square", (0.143840, 0)),
        ([0, 1], [1, 0], "overlap", "log", (13.815498, 13.815498)),
        ([0, 1], [1, 0], "overlap", "square", (13.815498, 1)),
        ([0.5, 0.5, 0.2], [0.75, 0.25, 0], "overlap", "log", (0.287680, 0.223142)),
        ([0.5, 0.5, 0.2], [0.75, 0.25, 0], "overlap", "square", (0.287680, 0.04)),
        ([0.5, 0.7], [0, 0], "binary", "square", (0, 0.37)),  # no overlap at all
        ([0.5, 0.5], [0.5, 0.5], "overlap", "log", (-1e-6, 0)),  # perfect
    ],
)
def test_prediction_by_hand(logits: Any, target: Any, pos_weight: str, negative: str, expected: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        rows = torch.tensor([logits], dtype=dtype), torch.tensor([target], dtype=dtype)
        actual = torch.stack(overlap_prediction_loss(*rows, pos_weight, negative))
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), atol=1e-5, rtol=0)


def test_regulariser_by_hand() -> None:
    bases = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]])
    for symmetric, gradient in ((False, [[0, 0.32], [0, 0], [0, 0]]), (True, [[0, 0.32], [0.256, -0.192], [0, 0]])):
        value, (grad,) = both_gradients(lambda q, s=symmetric: base_similarity_loss(q, symmetric=s), bases)
        assert value.item() == pytest.approx(0.12, abs=1e-6)
        torch.testing.assert_close(grad, torch.tensor(gradient), atol=1e-6, rtol=0)


@pytest.mark.parametrize("partner, expected", [(None, (0.510822, 6.907752)), ((0, 1), (0, 0)), ((1, 1), (0.510822, 0))])
def test_inter_by_hand(partner: Any, expected: tuple[float, float]) -> None:
    crops = torch.tensor([[[1.0, 0]], [[0, 1]]])
    bases = torch.tensor([[[0.0, 1], [1, 0]], [[1, 0], [0, 1]]])
    teacher_bases = torch.tensor([[[0.0, -1], [-1, 0]], [[0.6, 0.8], [-1, 0]]])
    index = None if partner is None else torch.tensor(partner)
    actual = inter_volume_loss(crops, bases, crops, teacher_bases, index)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


HAND_STUDENT = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1]]])
HAND_TEACHER = torch.tensor([[[0.8, 0.6], [1, 0], [0, 1]]])
HAND_TARGET = torch.tensor([[[0.75, 0.25]]])


@pytest.mark.parametrize(
    "variant, logits, pos, total",
    [
        ("v2", (1, 0), 0.287680, 0.927680),
        ("v1", (0.98, 0.3), 0.208845, 0.848845),
        ("cvpr", (1, 0), 0.287681, 0.927681),
    ],
)
def test_class_by_hand(variant: str, logits: Any, pos: float, total: float) -> None:
    loss, pair = VoCoLoss(variant), (HAND_STUDENT, HAND_TEACHER)
    expected = torch.tensor([[logits]], dtype=torch.float32)
    torch.testing.assert_close(loss.logits(pair, HAND_TARGET), expected, atol=1e-6, rtol=0)
    terms = {name: value.item() for name, value in loss.terms(pair, HAND_TARGET).items()}
    assert terms == pytest.approx({"pos": pos, "neg": 0, "reg": 0.64}, abs=1e-6)  # one volume: no inter
    assert loss(pair, HAND_TARGET).item() == pytest.approx(total, abs=1e-6)


def test_same_volume_twice() -> None:
    pair = HAND_STUDENT.repeat(2, 1, 1), HAND_TEACHER.repeat(2, 1, 1)
    loss, target = VoCoLoss(), HAND_TARGET.repeat(2, 1, 1)
    assert loss.terms(pair, target)["inter"].item() == pytest.approx(0.520204, abs=1e-5)
    assert loss(pair, target).item() == pytest.approx(1.447885, abs=1e-5)
    own = loss.terms(pair, target, partner=torch.tensor([0, 1]))
    assert own["inter"].item() == 0


def test_all_embeddings_equal() -> None:
    target = torch.tensor([[[0.75, 0.25] + [0.0] * 7]])
    pair = torch.ones(1, 10, 6), torch.ones(1, 10, 6)
    terms = VoCoLoss().terms(pair, target)
    # float32 gives the cosine up to 1e-7, which the logarithm sees next to eps
    assert terms["neg"].item() == pytest.approx(13.8155, abs=0.2)
    assert terms["reg"].item() == pytest.approx(1, abs=1e-5)
    double = VoCoLoss().terms((pair[0].double(), pair[1].double()), target)
    assert double["neg"].item() == pytest.approx(13.8155, abs=1e-4)


# ---- slow references, values and gradients


@pytest.mark.parametrize("seed", [0, 1])
def test_free_functions_equal_loops(seed: int) -> None:
    student, teacher, target = batch(seed=seed)
    x_s, q_s, x_t, q_t = student[:, :2], student[:, 2:], teacher[:, :2], teacher[:, 2:]
    stacked = lambda f: lambda *xs: torch.stack([f(*rows) for rows in zip(*xs)])
    assert_same(overlap_logits, stacked(ref_logits), x_s, q_t)
    for symmetric in (False, True):
        assert_same(
            lambda q, s=symmetric: base_similarity_loss(q, s), stacked(lambda q, s=symmetric: ref_similarity(q, s)), q_s
        )
    logits = ref_logits(x_s[0], q_t[0])
    for choice in product(("overlap", "binary"), ("log", "square")):
        for part in (0, 1):
            assert_same(
                lambda x, c=choice, p=part: overlap_prediction_loss(x, target[0], *c)[p],
                lambda x, c=choice, p=part: ref_prediction(x, target[0], *c)[p] + 0 * x.sum(),
                logits,
            )
    for partner in ([1, 2, 0], [2, 1, 0]):
        assert_same(
            lambda *xs, p=partner: inter_volume_loss(*xs, partner=torch.tensor(p)),
            lambda *xs, p=partner: torch.stack([torch.as_tensor(v).double() for v in ref_inter(*xs, p)]),
            x_s, q_s, x_t, q_t,
        )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [{}, {"lambda_reg": 0.3, "lambda_inter": 2.0, "symmetric_reg": True}])
@pytest.mark.parametrize("partner", [None, [2, 1, 0]])
def test_class_equals_loops(variant: str, weights: dict[str, Any], partner: list[int] | None) -> None:
    student, teacher, target = batch()
    loss = VoCoLoss(variant, **weights)
    index = None if partner is None else torch.tensor(partner)
    assert_same(
        lambda s, t: loss((s, t), target, index),
        lambda s, t: ref_loss(s, t, target, variant, partner or [1, 2, 0], **weights),
        student,
        teacher,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_partner(variant: str) -> None:
    student, teacher, target = batch()
    logits = VoCoLoss(variant).logits((student, teacher), target, partner=torch.tensor([2, 0, 1]))
    for i, j in enumerate((2, 0, 1)):
        expected = ref_logits(student[i, :2], teacher[j, 2:])
        if variant == "v1":
            expected = (expected + ref_logits(teacher[i, :2], student[j, 2:])) / 2
        torch.testing.assert_close(logits[i], expected, atol=1e-12, rtol=0)


def test_eps_is_used() -> None:
    pair = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]]), torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])
    target = torch.tensor([[[0.0, 1]]])  # worst case in both cells
    terms = VoCoLoss(eps=1e-3).terms(pair, target)
    assert terms["neg"].item() == pytest.approx(-math.log(1e-3) / (1 + 1e-3), abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    student, teacher, target = batch(b=2, r=1, k=3, d=4)
    assert torch.autograd.gradcheck(
        lambda s: VoCoLoss(variant, symmetric_reg=True)((s, teacher), target), student.requires_grad_()
    )


# ---- which inputs get a gradient


@pytest.mark.parametrize("variant, bases_learn", [("v2", False), ("v1", True), ("cvpr", False)])
def test_gradient_stops(variant: str, bases_learn: bool) -> None:
    student, teacher, target = batch()
    loss = VoCoLoss(variant)

    def gradient(name: str) -> tuple[Tensor, Tensor]:
        pick = lambda s, t: sum(loss.terms((s, t), target)[n] for n in name.split("+"))
        student_gradient, teacher_gradient = both_gradients(pick, student, teacher)[1]
        assert not teacher_gradient.any()
        return student_gradient[:, :2], student_gradient[:, 2:]

    crops, bases = gradient("pos+neg")
    assert crops.abs().sum(-1).all()
    assert bool(bases.any()) == bases_learn
    crops, bases = gradient("reg")
    assert not crops.any()
    assert not bases[:, -1].any()
    if variant == "v2":
        crops, bases = gradient("inter")
        assert crops.any()
        assert bases.any()


def test_inter_gradient_reaches_the_partner_only() -> None:
    student, teacher, _ = batch(seed=2)
    x_s, q_s, x_t, q_t = student[:, :2], student[:, 2:], teacher[:, :2], teacher[:, 2:]
    first = lambda *xs: inter_volume_loss(*xs, partner=torch.tensor([2, 0, 1]))[0]
    gradients = both_gradients(first, x_s, q_s, x_t, q_t)[1]
    assert [bool(g.any()) for g in gradients[0]] == [True, False, False]
    assert [bool(g.any()) for g in gradients[1]] == [False, False, True]
    assert not gradients[2].any()
    assert not gradients[3].any()


# ---- one volume, order of volumes


def test_one_volume_has_no_inter_term() -> None:
    student, teacher, target = batch(b=1)
    loss = VoCoLoss()
    assert set(loss.terms((student, teacher), target)) == {"pos", "neg", "reg"}
    value, gradients = both_gradients(lambda *xs: inter_volume_loss(*xs), *batch(b=1)[:2], *batch(b=1, seed=1)[:2])
    assert value.tolist() == [0]
    assert not any(g.any() for g in gradients)
    assert loss.terms((student, teacher), target, partner=torch.tensor([0]))["inter"].item() == 0


def test_permuting_volumes_changes_nothing() -> None:
    student, teacher, target = batch(b=4)
    order, partner = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 3, 0])
    place = torch.argsort(order)
    loss = VoCoLoss()
    permuted = loss((student[order], teacher[order]), target[order], partner=place[partner[order]])
    torch.testing.assert_close(permuted, loss((student, teacher), target), atol=1e-12, rtol=0)


# ---- numerics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ["identical", "zero", "one zero"])
def test_half_precision_is_finite(dtype: torch.dtype, variant: str, rows: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 1, 96, generator=generator).expand(2, 6, 96).to(dtype).clone()
    if rows == "zero":
        student.zero_()
    elif rows == "one zero":
        student[0, 0] = student[1, 3] = 0
    target = torch.tensor([[[0.75, 0.25, 0, 0], [0, 0, 0, 1]]]).repeat(2, 1, 1)
    leaf = student.clone().requires_grad_()
    loss = VoCoLoss(variant)((leaf, student), target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.isfinite()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


def test_cosines_above_one_are_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 7, generator=generator)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    assert ((unit * unit).sum(-1) > 1).any()  # what the clip is for
    assert overlap_logits(rows[:, None], rows[:, None]).max() <= 1


def test_gradient_at_zero_cosine_is_zero() -> None:
    _, gradients = both_gradients(overlap_logits, torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]]))
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "given, label, result",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtype_of_the_result(given: torch.dtype, label: torch.dtype, result: torch.dtype) -> None:
    student, teacher, target = batch()
    terms = VoCoLoss().terms((student.to(given), teacher.to(given)), target.to(label))
    assert set(terms) == {"pos", "neg", "inter", "reg"}
    assert all(t.dtype == result and t.shape == () for t in terms.values())


def test_label_of_the_transform_gives_a_float32_scalar() -> None:
    label = overlap_fractions(torch.tensor([[[3, 1], [0, 6]], [[5, 5], [1, 0]]]), (5, 6), (3, 2))
    loss = VoCoLoss()((torch.randn(2, 8, 4), torch.randn(2, 8, 4)), label)
    assert (loss.dtype, loss.shape) == (torch.float32, ())


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_switched_off(variant: str) -> None:
    student, teacher, target = (x.float() for x in batch(b=2, d=64))
    loss = VoCoLoss(variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss((student, teacher), target)
        free = overlap_logits(student, teacher), base_similarity_loss(student)
        inter = inter_volume_loss(student, student, teacher, teacher)
    assert torch.equal(inside, loss((student, teacher), target))
    assert torch.equal(free[0], overlap_logits(student, teacher))
    assert torch.equal(free[1], base_similarity_loss(student))
    assert torch.equal(inter, inter_volume_loss(student, student, teacher, teacher))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    student, teacher, target = batch()
    VoCoLoss()((student.requires_grad_(), teacher), target).backward()
    assert capfd.readouterr() == ("", "")


def test_descent() -> None:
    student, teacher, target = batch()
    losses = []
    for _ in range(20):
        value, (gradient, _) = both_gradients(lambda s, t: VoCoLoss()((s, t), target), student, teacher)
        losses.append(value.item())
        student = student - 0.1 * gradient.sign()
    assert losses[-1] < 0.7 * losses[0]


# ---- errors


@pytest.mark.parametrize(
    "student, teacher, target",
    [
        ((2, 6, 4), (2, 6, 5), (2, 2, 4)),
        ((2, 5, 4), (2, 5, 4), (2, 2, 4)),
        ((3, 6, 4), (3, 6, 4), (2, 2, 4)),
        ((2, 6, 4), (2, 7, 4), (2, 2, 4)),
        ((12, 4), (12, 4), (2, 2, 4)),
        ((2, 6, 4), (2, 6, 4), (2, 8)),
    ],
)
def test_shapes_are_checked(student: Any, teacher: Any, target: Any) -> None:
    pair, label = (torch.zeros(student), torch.zeros(teacher)), torch.zeros(target)
    for call in (VoCoLoss(), VoCoLoss().terms, VoCoLoss().logits):
        with pytest.raises(ValueError) as error:
            call(pair, label)
        assert all(str(shape) in str(error.value) for shape in (student, teacher, target))


def test_other_errors() -> None:
    student, teacher, target = batch()
    with pytest.raises(ValueError, match="v2, v1, cvpr, got 'v3'"):
        VoCoLoss("v3")
    with pytest.raises(ValueError, match="pos_weight"):
        overlap_prediction_loss(target, target, pos_weight="log")
    with pytest.raises(ValueError, match="negative"):
        overlap_prediction_loss(target, target, negative="overlap")
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) and target \(3, 2, 1\)"):
        overlap_prediction_loss(target, target[..., :1])
    with pytest.raises(ValueError, match="pairs"):
        base_similarity_loss(torch.ones(2, 1, 4))
    for call in (VoCoLoss(), VoCoLoss().logits):
        with pytest.raises(ValueError, match=r"partner of shape \(2,\) .* must be \(3,\)"):
            call((student, teacher), target, partner=torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"partner of shape .* and torch\.float32 must"):
            call((student, teacher), target, partner=torch.tensor([1.0, 0.0, 2.0]))
        for partner in ([0, 1, -1], [0, 1, 3]):  # -1 would be the last volume, its own
            with pytest.raises(ValueError, match=r"partner \[0, 1, .*\] must hold numbers of volumes from 0 to 2"):
                call((student, teacher), target, partner=torch.tensor(partner))
        assert torch.equal(
            call((student, teacher), target, partner=[1, 2, 0]),
            call((student, teacher), target, partner=torch.tensor([1, 2, 0])),
        )
