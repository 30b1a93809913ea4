# SPDX-License-Identifier: Apache-2.0
"""The samplers of SAM once more, with a loop over anchors, from affines and vectors in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]  # volume and view


class Anchor(NamedTuple):
    cell: int
    positive: int  # of the pool
    place: np.ndarray  # continuous index in the other view
    negatives: list[int]  # of the pool, 2N for the zero vector


def cells(size: tuple[int, ...]) -> np.ndarray:
    return np.array(list(np.ndindex(*size)), dtype=float)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def vectors(rows: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """(2B, C, *t) -> unit vectors (2B, N, C) at another size."""
    mode = "trilinear" if rows.ndim == 5 else "bilinear"
    large = F.interpolate(rows, size=size, mode=mode, align_corners=False) if rows.shape[2:] != size else rows
    return F.normalize(large, dim=1).flatten(2).transpose(1, 2).numpy()


class Views:
    """Where the cells of both views of a volume lie."""

    def __init__(self, affines: Tensor, size: tuple[int, ...], valid: Tensor | None) -> None:
        self.num = len(cells(size))
        self.world = [apply(a.numpy(), cells(size)) for a in affines]
        self.place = [apply(np.linalg.inv(affines[1 - v].numpy()), self.world[v]) for v in range(2)]
        self.valid = np.ones((2, self.num), bool) if valid is None else valid.numpy()
        self.nearest, self.distance = np.zeros((2, self.num), int), np.zeros((2, self.num))
        self.inside = np.zeros((2, self.num), bool)
        for v in range(2):
            box = cells(size)[self.valid[1 - v]]
            for i in range(self.num):
                distances = np.linalg.norm(self.world[1 - v] - self.world[v][i], axis=1)
                self.nearest[v, i], self.distance[v, i] = distances.argmin(), distances.min()
                place = self.place[v][i]
                within = len(box) and (place >= box.min(0) - 1e-4).all() and (place <= box.max(0) + 1e-4).all()
                self.inside[v, i] = self.valid[v, i] and within and self.valid[1 - v, self.nearest[v, i]]

    def near(self, view: int, cell: int, radius: float) -> np.ndarray:
        return np.linalg.norm(np.concatenate(self.world) - self.world[view][cell], axis=1) < radius


def drawn(score: np.ndarray, keys: Tensor, negatives: Pair) -> list[int]:
    """By rank: the best candidates, and of these the ones with the largest keys."""
    order = [i for i in np.argsort(-score) if score[i] > -np.inf][: negatives[0]]
    ranks = sorted(range(len(order)), key=lambda rank: -float(keys[rank]))[: negatives[1]]
    return [int(order[rank]) for rank in ranks]


def scores(score: np.ndarray, near: np.ndarray, positive: int, allowed: np.ndarray, exclude: str) -> np.ndarray:
    score = score.copy()
    score[near] = 0 if exclude == "zero" else -np.inf
    if exclude == "inf":
        score[positive] = -np.inf
    score[~allowed] = -np.inf
    return score


def local_samples(
    maps: list[Tensor],
    affines: Tensor,
    valid: Tensor | None,
    anchor_keys: Tensor,
    negative_keys: Tensor,
    **options: Any,
) -> dict[Pair, list[Anchor]]:
    size = tuple(maps[0].shape[2:])
    volumes = len(affines)
    fine, coarse = (vectors(m, size) for m in maps)
    found: dict[Pair, list[Anchor]] = {}
    for b in range(volumes):
        views = Views(affines[b], size, None if valid is None else valid[b])
        num, alone = views.num, not views.inside.any()
        allowed = np.ones(2 * num, bool) if options["exclude"] == "zero" else views.valid.reshape(-1)
        if alone:
            allowed = allowed & (np.arange(2 * num) < num)
        pools = [np.concatenate([x[b], x[volumes + b]]) for x in (fine, coarse)]
        for v in range(2):
            inside = views.inside[v]
            if alone:
                eligible = views.valid[v] if v == 0 else np.zeros(num, bool)
            elif options["positives"] == "interpolated":
                eligible = inside
            else:
                eligible = inside & (views.distance[v] < options["positive_radius"])
                if not eligible.any() and inside.any():
                    eligible = inside & (views.distance[v] < views.distance[v][inside].min() + 0.5)
            order = sorted(np.flatnonzero(eligible), key=lambda i: -float(anchor_keys[b, v, i]))
            found[b, v] = []
            for rank, i in enumerate(order[: options["num_anchors"]]):
                positive = v * num + i if alone else (1 - v) * num + views.nearest[v, i]
                score = sum(pool @ pool[v * num + i] for pool in pools)
                near = views.near(v, i, options["exclusion_radius"])
                score = scores(score, near, positive, allowed, options["exclude"])
                negatives = drawn(score, negative_keys[b, v, rank], options["negatives"])
                found[b, v].append(Anchor(int(i), int(positive), views.place[v][i], negatives))
    return found


def global_samples(
    rows: Tensor, affines: Tensor, valid: Tensor | None, negative_keys: Tensor, **options: Any
) -> dict[Pair, list[Anchor]]:
    size = tuple(rows.shape[2:])
    volumes, gates = len(affines), options["axial_gate"]
    gates = gates if isinstance(gates, tuple) else (gates, gates)
    maps = vectors(rows, size)
    found: dict[Pair, list[Anchor]] = {}
    for b in range(volumes):
        views = Views(affines[b], size, None if valid is None else valid[b])
        num, pool = views.num, np.concatenate([maps[b], maps[volumes + b]])
        eligible = np.zeros((2, num), bool)
        for v, i in np.ndindex(2, num):
            j = views.nearest[v, i]
            offset = abs(views.world[v][i, -1] - views.world[1 - v][j, -1])
            gate = gates[v] if len(size) == 3 else None
            near = views.distance[v, i] < options["positive_radius"] and (gate is None or offset < gate)
            eligible[v, i] = views.valid[v, i] and views.valid[1 - v, j] and near
        alone = not eligible.any()
        eligible = views.valid if alone else eligible
        allowed = np.ones(2 * num, bool) if options["exclude"] == "zero" else views.valid.reshape(-1)
        for v in range(2):
            found[b, v] = []
            for i in np.flatnonzero(eligible[v]):
                positive = v * num + i if alone else (1 - v) * num + views.nearest[v, i]
                near = views.near(v, i, options["exclusion_radius"])
                score = scores(pool @ pool[v * num + i], near, positive, allowed, options["exclude"])
                negatives = drawn(score, negative_keys[b, v, i], options["negatives"])
                if options["exclude"] == "zero":
                    negatives = [2 * num if near[j] else j for j in negatives]
                found[b, v].append(Anchor(int(i), int(positive), views.place[v][i], negatives))
    return found


def diverse_cells(volumes: int, num: int, rows: int, rank: int, keys: Tensor, number: int) -> dict[Pair, list[int]]:
    """Cells of all other volumes of the joined batch, by the largest keys."""
    found: dict[Pair, list[int]] = {}
    for b, v in np.ndindex(volumes, 2):
        others = []
        for row in range(rows):
            process, within = divmod(row, 2 * volumes)
            if (process, within % volumes) != (rank, b):
                others += range(row * num, (row + 1) * num)
        found[b, v] = sorted(others, key=lambda i, b=b, v=v: -float(keys[b, v, i]))[:number]  # type: ignore[misc]
    return found


def loop_loss(
    rows: Tensor,
    found: dict[Pair, list[Anchor]],
    temperature: float,
    interpolated: bool = False,
    diverse: dict[Pair, list[int]] | None = None,
    joined: Tensor | None = None,
) -> Tensor:
    """Mean over volumes of the mean over anchors of -log softmax of the positive; rows (2B, C, *s)."""
    volumes, num = len(rows) // 2, rows[0, 0].numel()
    flat = rows.flatten(2).transpose(1, 2)  # (2B, N, C)
    every = (rows if joined is None else joined).flatten(2).transpose(1, 2).flatten(0, 1)
    total = rows.new_zeros(())
    for b in range(volumes):
        values = []
        for v in range(2):
            pool = torch.cat([flat[b], flat[volumes + b], flat.new_zeros(1, flat.shape[2])])
            for anchor in found[b, v]:
                query, key = flat[v * volumes + b, anchor.cell], pool[anchor.positive]
                if interpolated and anchor.positive // num != v:
                    key = linear(rows[(1 - v) * volumes + b], anchor.place)
                others = pool[anchor.negatives]
                if diverse is not None:
                    others = torch.cat([others, every[diverse[b, v]]])
                logits = torch.stack([query @ key, *(query @ n for n in others)]) / temperature
                values.append(-logits.log_softmax(0)[0])
        if values:
            total = total + torch.stack(values).mean()
    return total / volumes


def linear(view: Tensor, place: np.ndarray) -> Tensor:
    """The unit vector at a continuous index of a map (C, *s), from the cells around it."""
    size = view.shape[1:]
    place = np.clip(place, 0, np.array(size) - 1)
    low = np.minimum(np.floor(place), np.array(size) - 2).astype(int)
    total = view.new_zeros(len(view))
    for corner in np.ndindex(*[2] * len(size)):
        weight = float(np.prod(np.where(corner, place - low, 1 - (place - low))))
        total = total + weight * view[(slice(None), *(low + corner))]
    return total / total.norm()
