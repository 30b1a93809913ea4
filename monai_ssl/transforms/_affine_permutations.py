# SPDX-License-Identifier: Apache-2.0
"""Permutations x -> a x + b of a finite field, any two of which agree in at most one position."""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch

__all__ = ["GaloisField", "affine_permutations", "affine_rows", "prime_power"]


def affine_permutations(q: int, seed: int = 0) -> torch.Tensor:
    """All maps x -> a x + b of the field with q elements, a not 0, with the elements relabelled at random.

    Two of them agree in at most one position. Without relabelling those with a = 1 would be mere shifts of the grid.

    Args:
        q: number of positions, a prime power.
        seed: of the relabelling.

    Returns:
        (q (q - 1), q) int64; a = 1 first, within it b = 0, 1, ...

    Raises:
        ValueError: when q is not a prime power.
    """
    return affine_rows(q, seed, np.arange(q * (q - 1)))


def affine_rows(q: int, seed: int, rows: np.ndarray) -> torch.Tensor:
    """Rows of `affine_permutations`, so that the whole table need not be made."""
    power = prime_power(q)
    if power is None:
        raise ValueError(f"affine permutations need a prime power of positions, got {q}")
    field = GaloisField(*power)
    relabel = np.random.RandomState(seed).permutation(q)
    a, b = rows[:, None] // q + 1, rows[:, None] % q
    image = field.add(field.multiply(a, np.argsort(relabel)), b)  # (rows, q)
    return torch.as_tensor(relabel[image], dtype=torch.int64)


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


class GaloisField:
    """Sum and product of arrays of elements of GF(p^k).

    Element v is the polynomial whose coefficients are the base-p digits of v, lowest first.

    The modulus is x^k + sum c_i x^i with the smallest number sum c_i p^i for which the powers of x are all p^k - 1
    non-zero elements, so that products are sums of logarithms. For k = 1 it is arithmetic modulo p.
    """

    def __init__(self, p: int, k: int) -> None:
        self.p, self.k, self.q = p, k, p**k
        if k > 1:
            powers = next(x for c in range(1, self.q) if len(x := self._powers(c)) == self.q - 1)
            self._antilog = np.array(powers)
            self._log = np.zeros(self.q, dtype=np.int64)
            self._log[self._antilog] = np.arange(self.q - 1)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b, broadcast."""
        place = self.p ** np.arange(self.k)
        # (..., k); higher digits add multiples of p
        digits = np.asarray(a)[..., None] // place + np.asarray(b)[..., None] // place
        return digits % self.p @ place

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a times b, broadcast."""
        a, b = np.asarray(a), np.asarray(b)
        if self.k == 1:
            return a * b % self.p
        product = self._antilog[(self._log[a] + self._log[b]) % (self.q - 1)]
        return np.where((a == 0) | (b == 0), 0, product)

    def _powers(self, c: int) -> list[int]:
        """1, x, x^2, ... up to the first that is 0 or 1 again, with x^k = -sum c_i x^i."""
        powers, v = [1], self._times_x(1, c)
        while v > 1 and len(powers) < self.q:
            powers.append(v)
            v = self._times_x(v, c)
        return powers

    def _times_x(self, v: int, c: int) -> int:
        top, rest = divmod(v, self.q // self.p)
        v, result = rest * self.p, 0
        for place in (self.p**i for i in range(self.k)):
            result += (v // place - top * (c // place)) % self.p * place
        return result
