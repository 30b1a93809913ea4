# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from itertools import permutations as all_permutations
from math import factorial, prod
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_ssl.transforms import (
    RandJigsaw,
    RandJigsawd,
    affine_permutations,
    greedy_permutations,
    hamming_permutations,
    patch_grid,
)
from monai_ssl.transforms._affine_permutations import GaloisField, prime_power

from .index_images import AFFINE, crops, drawn_starts, index_image

# image, grid, number of permutations, jitter, gap, channels
GEOMETRIES: list[tuple[Any, ...]] = [
    ((14, 17, 19), 3, 10, 1, 0, 1),
    ((14, 17, 19), (2, 1, 3), 7, 0.4, 0.2, 3),
    ((14, 17), (3, 3), 72, 1, 1, 3),
    ((14, 17), (2, 3), 720, 0, 1, 1),
]


def distances(table: torch.Tensor) -> np.ndarray:
    """Hamming distance of every pair of rows."""
    rows = table.numpy().astype(np.int16)
    return np.concatenate([(row != rows[i + 1 :]).sum(1) for i, row in enumerate(rows)])


def rows_of(text: str) -> list[list[int]]:
    return [[int(c) for c in word] for word in text.split()]


# ---- tables


def test_affine_permutations_of_four() -> None:
    assert affine_permutations(4).tolist() == rows_of("0123 1032 3210 2301 3021 2130 0312 1203 1320 0231 2013 3102")


def test_affine_permutations_of_nine() -> None:
    table = affine_permutations(9)
    assert table[[0, 9, 71]].tolist() == rows_of("012345678 621438075 678302154")
    assert (table.dtype, tuple(table.shape)) == (torch.int64, (72, 9))


@pytest.mark.parametrize("q", [2, 3, 4, 5, 7, 8, 9, 16, 25, 27])
def test_affine_permutations_agree_in_one_place_at_most(q: int) -> None:
    table = affine_permutations(q, seed=1)
    assert torch.equal(table.sort(-1).values, torch.arange(q).expand(q * (q - 1), q))
    assert distances(table).min() == max(q - 1, 2)
    assert distances(table[:q]).min() == q
    assert not torch.equal(table, affine_permutations(q, seed=2)) or q < 4


@pytest.mark.parametrize("p", [5, 7, 11])
def test_prime_fields_are_arithmetic_modulo_p(p: int) -> None:
    relabel = np.random.RandomState(0).permutation(p)
    inverse = {int(v): y for y, v in enumerate(relabel)}
    expected = [[int(relabel[(a * inverse[y] + b) % p]) for y in range(p)] for a in range(1, p) for b in range(p)]
    assert affine_permutations(p).tolist() == expected


@pytest.mark.parametrize(
    "q, modulus",
    [(4, 3), (8, 3), (9, 5), (16, 3), (25, 7), (27, 7), (32, 5), (49, 10), (64, 3), (125, 17)],
)
def test_modulus(q: int, modulus: int) -> None:
    p, k = prime_power(q)
    field = GaloisField(p, k)
    top = field.multiply(np.array(p ** (k - 1)), np.array(p))  # x^(k-1) x = -sum c_i x^i
    assert field.add(top, np.array(modulus)) == 0


@pytest.mark.parametrize("q", [4, 8, 9, 25])
def test_field_axioms(q: int) -> None:
    field, x = GaloisField(*prime_power(q)), np.arange(q)
    a, b, c = x[:, None, None], x[None, :, None], x[None, None, :]
    assert np.array_equal(field.multiply(a, field.add(b, c)), field.add(field.multiply(a, b), field.multiply(a, c)))
    assert np.array_equal(field.multiply(field.multiply(a, b), c), field.multiply(a, field.multiply(b, c)))
    assert np.array_equal(field.multiply(1, x), x)
    assert all(len(set(field.multiply(v, x).tolist())) == q for v in range(1, q))


def test_prime_power() -> None:
    powers = {n: prime_power(n) for n in range(-1, 130)}
    expected = {p**k: (p, k) for p in range(2, 130) if all(p % d for d in range(2, p)) for k in range(1, 8)}
    assert {n: v for n, v in powers.items() if v} == {n: v for n, v in expected.items() if n < 130}


def test_published_size_of_the_table() -> None:
    assert hamming_permutations(9, 72)[0].tolist() == [8, 6, 1, 2, 4, 0, 7, 5, 3]
    table = hamming_permutations(27, 100)
    assert (table.dtype, tuple(table.shape)) == (torch.int64, (100, 27))
    assert distances(table).min() == 26
    assert distances(table).mean() == pytest.approx(26.0347, abs=5e-5)
    assert not (table == torch.arange(27)).all(-1).any()


@pytest.mark.parametrize(
    "q, m, least",
    [(27, 27, 27), (27, 702, 26), (64, 1000, 63), (8, 56, 7), (125, 100, 125), (27, 28, 26), (2, 2, 2), (3, 6, 2)],
)
def test_smallest_distance(q: int, m: int, least: int) -> None:
    table = hamming_permutations(q, m)
    assert table.shape == (m, q)
    assert distances(table).min() == least


@pytest.mark.parametrize("q, m", [(9, 9), (9, 10), (27, 100)])
def test_rows_are_drawn_from_the_affine_code(q: int, m: int) -> None:
    rows = np.random.RandomState(5).permutation(q if m <= q else q * (q - 1))[:m]
    assert torch.equal(hamming_permutations(q, m, seed=5), affine_permutations(q, seed=5)[rows])


@pytest.mark.parametrize("q, m, least", [(27, 100, 24), (12, 100, 9), (18, 100, 15), (36, 100, 33), (6, 100, 3)])
def test_smallest_distance_of_the_greedy_choice(q: int, m: int, least: int) -> None:
    assert distances(greedy_permutations(q, m, 0)).min() == least
    if prime_power(q) is None:
        assert torch.equal(hamming_permutations(q, m), greedy_permutations(q, m, 0))


@pytest.mark.parametrize("q, m, pool_size", [(4, 20, 4000), (5, 30, 100), (6, 9, 50), (7, 1, 1)])
def test_greedy_choice_in_plain_loops(q: int, m: int, pool_size: int) -> None:
    m, size = max(m, 2), max(pool_size, 4 * max(m, 2))
    state = np.random.RandomState(3)
    every = [list(p) for p in all_permutations(range(q))]
    pool = every if factorial(q) <= size else [state.permutation(q).tolist() for _ in range(size)]
    chosen = [0]
    while len(chosen) < m:
        least = [min(sum(a != b for a, b in zip(pool[i], pool[c])) for c in chosen) for i in range(len(pool))]
        chosen.append(least.index(max(least)))
    assert greedy_permutations(q, m, 3, pool_size).tolist() == [pool[i] for i in chosen]


def test_more_permutations_than_the_affine_code_has() -> None:
    assert torch.equal(hamming_permutations(4, 24, seed=1), greedy_permutations(4, 24, 1))
    assert len(hamming_permutations(4, 24).unique(dim=0)) == 24


@pytest.mark.parametrize("q, m", [(4, 25), (4, 1), (4, 0), (1, 2), (0, 2), (-3, 2)])
def test_impossible_numbers(q: int, m: int) -> None:
    for function in (hamming_permutations, lambda q, m: greedy_permutations(q, m, 0)):
        with pytest.raises(ValueError, match=f"{q}! permutations of {q} positions, got {m}"):
            function(q, m)


@pytest.mark.parametrize("q", [1, 6, 12])
def test_affine_needs_a_prime_power(q: int) -> None:
    with pytest.raises(ValueError, match=f"prime power of positions, got {q}"):
        affine_permutations(q)


# ---- draws


@pytest.mark.parametrize("image, grid, classes, jitter, gap, _", GEOMETRIES)
def test_draws(image: Any, grid: Any, classes: int, jitter: Any, gap: Any, _: int) -> None:
    transform = RandJigsaw(grid, classes, jitter, gap).set_random_state(seed=3)
    state = np.random.RandomState(3)
    lowest, _, ranges = patch_grid(image, grid, None, jitter, gap)
    for _ in range(2):
        transform.randomize(image)
        assert transform.starts.tolist() == drawn_starts(state, lowest, ranges)
        assert transform.label == state.randint(classes)
        assert (transform.label.dtype, transform.label.shape) == (torch.int64, ())
    assert transform.R.randint(1000) == state.randint(1000)


def test_table_of_the_transform() -> None:
    assert torch.equal(RandJigsaw().permutations, hamming_permutations(27, 100))
    assert torch.equal(RandJigsaw((3, 3), 50, seed=4).permutations, hamming_permutations(9, 50, 4))
    assert torch.equal(RandJigsawd("image", (2, 3), 50).permutations, greedy_permutations(6, 50, 0))
    given = [[1, 0, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]
    for table in (given, np.array(given, dtype=np.uint8), torch.tensor(given)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform = RandJigsaw((2, 2), permutations=table, jitter=0, gap=0).set_random_state(seed=0)
        assert transform.permutations.tolist() == given
        assert transform.permutations.dtype == torch.int64
        labels = set()
        for _ in range(30):
            transform.randomize((4, 4))
            labels.add(int(transform.label))
        assert labels == {0, 1, 2}
    table[0, 0] = 5
    assert transform.permutations.tolist() == given
    for wrong in ([[0.5, 1, 2, 3]], torch.tensor([[True, False]])):
        with pytest.raises(ValueError, match="permutations must hold whole numbers"):
            RandJigsaw((2, len(wrong[0]) // 2), permutations=wrong)


# ---- patches


@pytest.mark.parametrize("image, grid, classes, jitter, gap, channels", GEOMETRIES)
def test_patches_are_the_right_voxels(
    image: Any, grid: Any, classes: int, jitter: Any, gap: Any, channels: int
) -> None:
    img = index_image(image, channels)
    array = RandJigsaw(grid, classes, jitter, gap)
    starts, size, _ = patch_grid(image, grid, None, jitter, gap)
    for label in (0, classes - 1, torch.tensor(1)):
        table = array.permutations.tolist()[int(label)]
        expected = torch.stack([crops(img, starts[table[i]][None], size)[0] for i in range(len(starts))])
        assert torch.equal(array.apply(img, starts, label), expected)
    out = RandJigsawd("image", grid, classes, jitter, gap, label_key="order")({"image": img})
    assert set(out) == {"image", "image_origin", "order"}
    assert out["image"].shape == (len(starts), channels, *size)
    assert torch.equal(out["image"], crops(img, out["image_origin"], size))
    for key, shape in (("image_origin", starts.shape), ("order", ())):
        assert type(out[key]) is torch.Tensor
        assert (out[key].dtype, out[key].shape) == (torch.int64, shape)


@pytest.mark.parametrize("image, grid, classes, jitter, gap, channels", GEOMETRIES)
def test_gather_convention(image: Any, grid: Any, classes: int, jitter: Any, gap: Any, channels: int) -> None:
    cells = grid if isinstance(grid, tuple) else (grid,) * len(image)
    transform = RandJigsawd("image", grid, classes, jitter, gap).set_random_state(seed=0)
    pitch = torch.tensor([s // n for s, n in zip(image, cells)])
    weight = torch.tensor([prod(cells[i + 1 :]) for i in range(len(cells))])
    for _ in range(4):
        out = transform({"image": index_image(image, channels)})
        ids = (out["image_origin"] // pitch * weight).sum(-1)  # number of the cell, first axis slowest
        assert ids.tolist() == transform.permutations[out["label"]].tolist()


def test_constant_volume_gives_equal_inputs_for_every_label() -> None:
    transform = RandJigsaw().set_random_state(seed=0)
    img = torch.full((2, 24, 25, 26), 0.3)
    first = transform(img)
    assert torch.equal(first, first[:1].expand_as(first))
    starts = transform.starts
    assert all(torch.equal(transform.apply(img, starts, label), first) for label in range(100))


def test_affine() -> None:
    img = MetaTensor(index_image((14, 17, 19)), affine=AFFINE)
    assert torch.equal(RandJigsaw(2, jitter=1)(img).affine, AFFINE)


# ---- repeats, keys, errors


def test_randomize_false_repeats_the_last_draw() -> None:
    img = index_image((14, 17, 19))
    array = RandJigsaw(3, 20, 1, 0).set_random_state(seed=0)
    dictionary = RandJigsawd("image", 3, 20, 1, 0).set_random_state(seed=0)
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})
    assert torch.equal(array(img, randomize=False), first)
    assert torch.equal(array.apply(img, array.starts, array.label), first)
    repeated = dictionary({"image": img}, randomize=False)
    assert all(torch.equal(out[key], repeated[key]) for key in out)
    assert torch.equal(out["image"], first)
    assert torch.equal(out["label"], array.label)
    assert not torch.equal(array(img), first)


def test_keys() -> None:
    img = index_image((14, 17))
    out = RandJigsawd(["ct", "pet"], (2, 3), 50, 1, 0)({"ct": img, "pet": 2 * img})
    assert torch.equal(2 * out["ct"], out["pet"])
    assert torch.equal(out["ct_origin"], out["pet_origin"])
    with pytest.raises(ValueError, match=r"\(14, 17\) and 'pet' \(17, 14\)"):
        RandJigsawd(["ct", "pet"], (2, 3))({"ct": img, "pet": img.transpose(1, 2)})
    for label_key in ("image", "image_origin"):
        with pytest.raises(ValueError, match=label_key):
            RandJigsawd("image", label_key=label_key)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"num_permutations": 1}, "got 1"),
        ({"grid_size": (2, 2), "num_permutations": 25}, "between 2 and 4! permutations of 4 positions, got 25"),
        ({"grid_size": 0}, "grid_size must be"),
        ({"jitter": True}, "jitter must be"),
        ({"gap": 1.0}, "gap must be"),
        ({"permutations": [[0, 1, 2]]}, r"shape \(1, 3\) must hold permutations of 0..26"),
        ({"grid_size": (1, 3), "permutations": [[0, 1, 3]]}, "permutations of 0..2"),
        ({"grid_size": (1, 3), "permutations": [[0, 1, 1]]}, "permutations of 0..2"),
        ({"grid_size": (1, 3), "permutations": [0, 1, 2]}, "permutations of 0..2"),
        ({"grid_size": (1, 3), "permutations": [[0, 1, 2], [2, 1, 0], [0, 1, 2]]}, "distinct"),
        ({"grid_size": (1, 3), "permutations": np.zeros((0, 3))}, "at least one"),
    ],
)
def test_constructor_errors(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandJigsaw(**args)
    with pytest.raises(ValueError, match=message):
        RandJigsawd("image", **args)


@pytest.mark.parametrize(
    "image, message",
    [((14, 17), r"3 entries for 2 spatial axes"), ((14, 17, 2), "axis 2 of length 2 in 3 cells")],
)
def test_other_images_are_refused_without_a_draw(image: tuple[int, ...], message: str) -> None:
    transform = RandJigsaw().set_random_state(seed=0)
    with pytest.raises(ValueError, match=message):
        transform(torch.zeros(1, *image))
    assert transform.starts is None
    assert transform.R.randint(1000) == np.random.RandomState(0).randint(1000)


@pytest.mark.parametrize(
    "count, label, message", [(26, 0, "grid of 27 patches"), (27, 100, "between 0 and 99, got 100"), (27, -1, "got -1")]
)
def test_starts_and_labels_of_another_table_are_refused(count: int, label: int, message: str) -> None:
    starts = torch.zeros(count, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        RandJigsaw().apply(torch.zeros(1, 14, 17, 19), starts, label)
