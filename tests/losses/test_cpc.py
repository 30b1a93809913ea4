# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_ssl.losses import CPCLoss, binary, binary_scores, infonce, sum_exponent

MODES = ("infonce", "paper", "bce")
CYCLE = torch.tensor([[1], [2], [3], [0]])


def batch(b: int = 2, q: int = 3, k: int = 2, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, b, q, k, d, generator=generator, dtype=torch.float64)
    return prediction, target


def eye() -> tuple[Tensor, Tensor]:
    return torch.eye(4).view(1, 4, 1, 4), torch.eye(4).view(1, 4, 1, 4)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def reference(
    x: Tensor, t: Tensor, mode: str, negatives: Any = None, temperature: float = 0.1, normalize: bool = True
) -> Tensor:
    """The equations, one row and one negative at a time."""
    b, q, k, d = x.shape
    if mode == "bce":
        columns = list(product(range(b), range(q)))
        total = 0.0
        for i, (at, other) in enumerate(zip(columns, negatives)):
            terms = lambda place, at=at: [x[at][s, j] * t[place][s, j] for s in range(k) for j in range(d)]
            logit = lambda place, terms=terms: sum(terms(place)) / (k * d)
            total += (softplus(-logit(columns[i])) + softplus(logit(columns[other[0]]))) / 2
        return total / len(columns)
    places = list(product(range(b), range(q), range(k)))
    total = 0.0
    for i, place in enumerate(places):

        def score(j: int, place: Any = place) -> Tensor:
            a, c = x[place], t[places[j]]
            return (a @ c) / ((a.norm() * c.norm() if normalize else 1.0) * temperature)

        others = [j for j in range(len(places)) if j != i] if negatives is None else negatives[i]
        if mode == "paper":
            total += softplus(sum(score(j) for j in others) - score(i))
        else:
            total += torch.log(sum(torch.exp(score(j)) for j in [i, *others])) - score(i)
    return total / len(places)


def assert_same(actual: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    results = []
    for function in (actual, expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, e in zip(*results):
        torch.testing.assert_close(a, e, atol=1e-8, rtol=0)


# ---- hand-worked values ---------------------------------------------------------------------------------------------


def test_terms_by_hand() -> None:
    positive, negative = torch.tensor([2.0]), torch.tensor([[1.0, 0.0]])
    assert infonce(positive, negative).tolist() == pytest.approx([0.4076060], abs=1e-6)
    assert sum_exponent(positive, negative).tolist() == pytest.approx([0.3132617], abs=1e-6)
    for term in (infonce, sum_exponent):
        assert term(positive, negative[:, :1]).tolist() == pytest.approx([0.3132617], abs=1e-6)
    prediction = torch.tensor([[1.0, 2], [3, 4]])
    logits = [binary_scores(prediction, torch.tensor(t)) for t in ([[1.0, 0], [0, 1]], [[0.0, 1], [-1, 0]])]
    assert [logit.item() for logit in logits] == [1.25, -0.25]
    assert binary(*logits).item() == pytest.approx(0.4139342, abs=1e-6)


@pytest.mark.parametrize(
    "loss, value, expected",
    [
        (CPCLoss(), None, math.log(1 + 3 * math.exp(-10))),
        (CPCLoss(), None, 1.36190e-4),
        (CPCLoss(), 1.0, 1.3862944),
        (CPCLoss("paper", 1.0, False), None, 0.3132617),
        (CPCLoss("paper", 1.0, False), 0.5, 2.1269280),
    ],
)
def test_class_by_hand(loss: CPCLoss, value: float | None, expected: float) -> None:
    pair = eye() if value is None else (torch.full((1, 4, 1, 4), value),) * 2
    assert loss(*pair).item() == pytest.approx(expected, abs=1e-6)


def test_released_loss_by_hand() -> None:
    expected = (math.log(1 + math.exp(-0.25)) + math.log(2)) / 2
    assert CPCLoss("bce")(*eye(), negatives=CYCLE).item() == pytest.approx(expected, abs=1e-6)
    assert CPCLoss("bce")(*eye(), negatives=CYCLE).item() == pytest.approx(0.6345433, abs=1e-6)
    other = CPCLoss("bce", temperature=7.0, normalize=False)  # both unused
    assert other(*eye(), negatives=CYCLE).item() == pytest.approx(0.6345433, abs=1e-6)


def test_equal_codes_have_no_gradient() -> None:
    leaves = [torch.full((1, 4, 1, 6), 0.3, requires_grad=True) for _ in range(2)]
    value = CPCLoss()(*leaves)
    value.backward()
    assert value.item() == pytest.approx(math.log(4), abs=1e-6)
    assert all(leaf.grad.abs().max() < 1e-6 for leaf in leaves)


# ---- slow references, values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["infonce", "paper"])
@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.5, "normalize": False}])
@pytest.mark.parametrize("given", [False, True])
def test_rows_equal_loops(mode: str, kwargs: dict[str, Any], given: bool) -> None:
    negatives = torch.randint(12, (12, 5), generator=torch.Generator().manual_seed(1)) if given else None
    rows = negatives.tolist() if given else None
    assert_same(
        lambda x, t: CPCLoss(mode, **kwargs)(x, t, negatives=negatives),
        lambda x, t: reference(x, t, mode, rows, **kwargs),
        *batch(),
    )


def test_columns_equal_loops() -> None:
    negatives = torch.tensor([[5], [0], [1], [4], [2], [3]])
    assert_same(
        lambda x, t: CPCLoss("bce")(x, t, negatives=negatives),
        lambda x, t: reference(x, t, "bce", negatives.tolist()),
        *batch(),
    )


@pytest.mark.parametrize("mode", ["infonce", "paper"])
def test_all_others_are_the_default(mode: str) -> None:
    x, t = batch()
    others = torch.tensor([[j for j in range(12) if j != i] for i in range(12)])
    torch.testing.assert_close(CPCLoss(mode)(x, t), CPCLoss(mode)(x, t, others), atol=1e-10, rtol=0)
    shuffled = others[:, torch.randperm(11)].to(torch.int32)
    torch.testing.assert_close(CPCLoss(mode)(x, t), CPCLoss(mode)(x, t, shuffled), atol=1e-10, rtol=0)


def test_one_negative_makes_both_forms_equal() -> None:
    x, t = batch()
    negatives = (torch.arange(12)[:, None] + 5) % 12
    values = [CPCLoss(mode)(x, t, negatives) for mode in ("infonce", "paper")]
    torch.testing.assert_close(*values, atol=1e-8, rtol=0)


def test_one_term_for_each_row() -> None:
    """As released the score is averaged over steps before the comparison: M / K terms."""
    x, t = batch()
    rows = (
        torch.nn.functional.normalize(x, dim=-1).flatten(0, 2),
        torch.nn.functional.normalize(t, dim=-1).flatten(0, 2),
    )
    scores = rows[0] @ rows[1].T / 0.1
    others = scores[~torch.eye(12, dtype=torch.bool)].view(12, 11)
    terms = infonce(scores.diagonal(), others)
    assert terms.shape == (12,)
    torch.testing.assert_close(CPCLoss()(x, t), terms.mean(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    x, t = batch(b=2, q=2, k=1, d=3)
    loss, negatives = CPCLoss(mode, temperature=0.5), CYCLE if mode == "bce" else None
    assert torch.autograd.gradcheck(lambda *pair: loss(*pair, negatives), (x.requires_grad_(), t.requires_grad_()))


# ---- negatives ------------------------------------------------------------------------------------------------------


def pull(loss: CPCLoss, b: int, q: int, k: int, **kwargs: Any) -> Tensor:
    """Entry (i, j): what row i adds to the gradient of code j where all scores are 0; predictions are one-hot."""
    num = b * q * k
    codes = torch.zeros(b, q, k, num, dtype=torch.float64, requires_grad=True)
    loss(torch.eye(num, dtype=torch.float64).view_as(codes), codes, **kwargs).backward()
    return codes.grad.flatten(0, 2).T * num


@pytest.mark.parametrize("mode, other", [("infonce", 1 / 12), ("paper", 0.5)])
def test_every_other_code_is_a_negative(mode: str, other: float) -> None:
    """Of the same volume other columns and rows, of another volume any."""
    expected = torch.full((12, 12), other, dtype=torch.float64).fill_diagonal_(other - 1)
    actual = pull(CPCLoss(mode, 1.0, normalize=False), 2, 3, 2)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_another_volume_changes_the_loss(mode: str) -> None:
    x, t = batch(q=4)
    changed = t.clone()
    changed[1] = changed[1].roll(1, -1)
    negatives = torch.arange(8).roll(4)[:, None] if mode == "bce" else None
    x.requires_grad_()
    of_first = lambda codes: torch.autograd.grad(CPCLoss(mode, 1.0)(x, codes, negatives), x)[0][0]
    assert (of_first(t) - of_first(changed)).abs().max() > 1e-6


def test_drawn_negatives_are_others_and_uniform() -> None:
    loss, generator = CPCLoss(temperature=1.0, normalize=False, num_negatives=6000), torch.Generator().manual_seed(0)
    counts = pull(loss, 1, 3, 2, generator=generator) * 6001
    torch.testing.assert_close(counts.diagonal(), torch.full((6,), -6000.0, dtype=torch.float64))  # never the own
    others = counts[~torch.eye(6, dtype=torch.bool)]
    assert (others - 1200).abs().max() < 5 * math.sqrt(6000 * 0.2 * 0.8)


def test_released_loss_draws_another_column() -> None:
    seen = torch.zeros(6, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        seen += pull(CPCLoss("bce"), 2, 3, 1, generator=generator) > 0
    assert not seen.diagonal().any()
    assert seen[~torch.eye(6, dtype=torch.bool)].min() > 20  # 40 expected
    assert seen.sum(1).tolist() == [200] * 6


@pytest.mark.parametrize("kwargs", [{"num_negatives": 4}, {"mode": "paper", "num_negatives": 4}, {"mode": "bce"}])
def test_generator(kwargs: dict[str, Any]) -> None:
    x, t = batch(q=8)
    loss = CPCLoss(**kwargs)
    draw = lambda seed: loss(x, t, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    state = torch.get_rng_state()
    draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = loss(x, t)
    torch.manual_seed(5)
    assert torch.equal(loss(x, t), first)


@pytest.mark.parametrize("mode", MODES)
def test_given_negatives_are_reproducible(mode: str) -> None:
    x, t = batch()
    negatives = torch.randint(6, (6, 1)) if mode == "bce" else torch.randint(12, (12, 3))
    loss = CPCLoss(mode, num_negatives=1)
    assert torch.equal(loss(x, t, negatives), loss(x, t, negatives))
    assert not torch.equal(loss(x, t, negatives), loss(x, t, (negatives + 1) % len(negatives)))


@pytest.mark.parametrize("mode", MODES)
def test_permuting_volumes_changes_nothing(mode: str) -> None:
    x, t = batch(b=4)
    order = torch.tensor([2, 0, 3, 1])
    place = torch.argsort(order)
    each = 3 if mode == "bce" else 6  # columns or rows of a volume
    negatives = torch.randint(4 * each, (4 * each, 1), generator=torch.Generator().manual_seed(0))
    moved = (place[negatives // each] * each + negatives % each).unflatten(0, (4, each))[order].flatten(0, 1)
    loss = CPCLoss(mode)
    expected = loss(x, t, negatives)
    torch.testing.assert_close(loss(x[order], t[order], moved), expected, atol=1e-12, rtol=0)
    if mode != "bce":
        torch.testing.assert_close(loss(x[order], t[order]), loss(x, t), atol=1e-12, rtol=0)


# ---- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_switched_off(mode: str) -> None:
    x, t = (y.float() for y in batch(d=64))
    negatives = torch.arange(6).roll(1)[:, None] if mode == "bce" else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = CPCLoss(mode)(x, t, negatives)
    assert torch.equal(inside, CPCLoss(mode)(x, t, negatives))


def test_terms_are_float32() -> None:
    half = torch.ones(3, dtype=torch.bfloat16)
    for value in (infonce(half, half[:, None]), sum_exponent(half, half[:, None]), binary(half, half)):
        assert value.dtype == torch.float32
    assert binary_scores(half[None], half[None]).dtype == torch.float32
    assert infonce(half.double(), half[:, None].double()).dtype == torch.float64


@pytest.mark.parametrize("mode", ["infonce", "paper"])
def test_extreme_scores_are_finite(mode: str) -> None:
    x, t = (y.float().requires_grad_() for y in batch())
    value = CPCLoss(mode, temperature=1e-3)(x, t)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_descent(mode: str) -> None:
    x, t = batch()
    negatives = torch.arange(6).roll(1)[:, None] if mode == "bce" else None
    loss, values = CPCLoss(mode, temperature=0.1 if mode == "infonce" else 1.0), []
    x.requires_grad_()
    for _ in range(20):
        value = loss(x, t, negatives)
        (gradient,) = torch.autograd.grad(value, x)
        values.append(value.item())
        with torch.no_grad():
            x -= 0.1 * gradient.sign()
    assert values[-1] < 0.8 * values[0]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((2, 3, 2, 5), (2, 3, 2, 4)), ((2, 3, 5), (2, 3, 5)), ((1, 2, 3, 2, 5),) * 2])
@pytest.mark.parametrize("mode", MODES)
def test_shapes_are_checked(mode: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError) as error:
        CPCLoss(mode)(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"mode": "nce"}, "infonce, paper, bce, got 'nce'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"mode": "bce", "num_negatives": 2}, "and 1 for mode 'bce'"),
    ],
)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPCLoss(**kwargs)


def test_too_few_candidates() -> None:
    one = torch.zeros(1, 1, 1, 3)
    for loss in (CPCLoss(), CPCLoss("paper"), CPCLoss("bce"), CPCLoss(num_negatives=3)):
        with pytest.raises(ValueError, match="without another code"):
            loss(one, one)
    with pytest.raises(ValueError, match="without another code"):
        CPCLoss("bce")(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3))  # two rows, but one column


@pytest.mark.parametrize(
    "negatives",
    [torch.zeros(11, 3).long(), torch.zeros(12).long(), torch.zeros(12, 3), torch.zeros(12, 12).bool()],
)
def test_negatives_are_checked(negatives: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(12, N\) integers"):
        CPCLoss()(*batch(), negatives=negatives)


def test_negatives_of_columns_are_checked() -> None:
    with pytest.raises(ValueError, match=r"must be \(6, N\)"):
        CPCLoss("bce")(*batch(), negatives=torch.zeros(12, 1).long())
    with pytest.raises(ValueError, match=r"\(6, 2\) must be \(6, 1\)"):
        CPCLoss("bce")(*batch(), negatives=torch.zeros(6, 2).long())


@pytest.mark.parametrize("term", [infonce, sum_exponent])
def test_terms_check_shapes(term: Callable[..., Tensor]) -> None:
    for negative in (torch.zeros(3), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"positive \(3,\) and negative"):
            term(torch.zeros(3), negative)
