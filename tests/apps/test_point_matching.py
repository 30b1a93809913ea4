# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from embedding_fields import AFFINE, maps_of

from monai_ssl import apps
from monai_ssl.apps import (
    ImageEmbedding,
    PointMatcher,
    PointMatches,
    match_points,
    point_matching,
    refine_peak,
    sample_embedding,
    similarity,
    similarity_map,
    stable_matches,
)
from monai_ssl.transforms.view_geometry import transform_points

SPACING = 2.0
QUERY, KEY = (24, 40, 36), (22, 38, 40)
TO_CELL = lambda mm: (mm / SPACING + 0.5) / 2 - 0.5  # on a map of stride 2
TO_MM = lambda cell: ((cell + 0.5) * 2 - 0.5) * SPACING


def unit_maps(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=0) for shape in shapes]


MAPS = {2: ((7, 6, 9), (5, 3, 3)), 3: ((6, 4, 6, 8), (5, 2, 3, 2), (4, 1, 2, 4))}


def interpolated(values: torch.Tensor, place: list[float]) -> torch.Tensor:
    """Linear interpolation of (C, *size) by loops over corners, border beyond."""
    place = [min(max(x, 0.0), n - 1.0) for x, n in zip(place, values.shape[1:])]
    total = torch.zeros(len(values), dtype=values.dtype)
    for corner in product((0, 1), repeat=len(place)):
        at, weight = [], 1.0
        for x, c, n in zip(place, corner, values.shape[1:]):
            low = min(int(x), max(n - 2, 0))
            at.append(min(low + c, n - 1))
            weight *= (x - low) if c else 1 - (x - low)
        total += weight * values[(slice(None), *at)]
    return total


def on_level(place: list[float], fine: tuple[int, ...], coarse: tuple[int, ...], align: bool) -> list[float]:
    if align:
        return [x * (c - 1) / (f - 1) for x, f, c in zip(place, fine, coarse)]
    return [(x + 0.5) * c / f - 0.5 for x, f, c in zip(place, fine, coarse)]


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_sampling_and_similarity_equal_loops(rank: int, align: bool) -> None:
    query, key = unit_maps(*MAPS[rank]), unit_maps(*MAPS[rank], seed=1)
    fine = MAPS[rank][0][1:]
    index = torch.rand(5, rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * torch.tensor(fine)
    index[0] = -0.4  # beyond the outermost centre
    vectors = sample_embedding(query, index, align)
    sim = similarity(vectors, key, align)
    assert sim.shape == (5, *fine)
    for row, place in enumerate(index.tolist()):
        mine = []
        for level, values in enumerate(query):
            at = on_level(place, fine, values.shape[1:], align)
            mine.append(F.normalize(interpolated(values, at), dim=0))
            torch.testing.assert_close(vectors[level][row], mine[-1], atol=1e-9, rtol=0)
        for cell in list(product(*(range(n) for n in fine)))[::5]:
            cosines = [
                F.normalize(interpolated(values, on_level(list(cell), fine, values.shape[1:], align)), dim=0) @ vector
                for values, vector in zip(key, mine)
            ]
            assert float(sim[(row, *cell)]) == pytest.approx(float(sum(cosines)) / len(key), abs=1e-9)


def test_interpolation_commutes_with_the_product_in_float32() -> None:
    maps = [m.float() for m in unit_maps((128, 8, 12, 10), (128, 4, 3, 3))]
    vectors = sample_embedding(maps, torch.rand(6, 3) * 8)
    up = F.normalize(F.interpolate(maps[1][None], size=(8, 12, 10), mode="trilinear")[0], dim=0)
    slow = (torch.einsum("pc,cxyz->pxyz", vectors[0], maps[0]) + torch.einsum("pc,cxyz->pxyz", vectors[1], up)) / 2
    torch.testing.assert_close(similarity(vectors, maps), slow, atol=1e-6, rtol=0)


def test_refine_peak_by_hand() -> None:
    assert refine_peak(torch.tensor([[0.8, 1, 0.9]]), torch.tensor([[1]])).item() == pytest.approx(1 / 6, abs=1e-6)
    rows = torch.tensor([[0.9, 1, 0.8], [0.9, 1, 1], [0.5, 0.5, 0.5], [1, 0.9, 1], [float("-inf"), 1, 0.9]])
    at = torch.ones(5, 1, dtype=torch.long)
    assert refine_peak(rows, at).flatten().tolist() == pytest.approx([-1 / 6, 0.5, 0, 0, 0], abs=1e-6)
    assert refine_peak(torch.tensor([[1, 0.9, 0.8], [0.7, 0.8, 1]]), torch.tensor([[0], [2]])).tolist() == [[0], [0]]
    # never more than half a cell, also where the index is not the peak
    assert refine_peak(torch.tensor([[0.0, 0.4, 0.7]]), torch.tensor([[1]])).item() == 0.5


def test_refine_peak_of_a_paraboloid() -> None:
    centre = torch.tensor([[2.3, 3.8, 1.6], [1.0, 0.0, 3.2]], dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (5, 6, 7)), indexing="ij"), -1)
    curved = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    sim = -((grid - centre[:, None, None, None]) ** 2 * curved).sum(-1)
    index = centre.round()
    torch.testing.assert_close(index + refine_peak(sim.transpose(1, 2).contiguous().transpose(1, 2), index), centre)


def fourier_errors(refine: bool, rounding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed errors in mm (P, 3) and back on the query (P,), of points at least a cell away from all borders."""
    query = maps_of(QUERY, lambda v: v * SPACING)
    key = maps_of(KEY, lambda v: transform_points(AFFINE, v * SPACING))
    mask = torch.zeros(key[0].shape[1:], dtype=torch.bool)
    mask[tuple(slice(n // 2) for n in KEY)] = True
    g = torch.Generator().manual_seed(5)
    true = torch.rand(400, 3, generator=g, dtype=torch.float64) * SPACING * torch.tensor(KEY)
    points = transform_points(AFFINE, true)
    inner = [
        ((c >= 1) & (c <= torch.tensor(n) / 2 - 2)).all(1) for c, n in ((TO_CELL(points), QUERY), (TO_CELL(true), KEY))
    ]
    points, true = points[inner[0] & inner[1]], true[inner[0] & inner[1]]
    assert len(points) > 100
    index = (points / SPACING / 2).floor() if rounding else TO_CELL(points)
    found, score = match_points(query, key, index, refine=refine, key_mask=mask)
    assert found.dtype == torch.float64
    assert 0.9 < score.min() <= score.max() <= 1
    back, _ = match_points(key, query, found, refine=refine)
    return TO_MM(found) - true, (TO_MM(back) - points).norm(dim=1)


def test_fourier_field() -> None:
    """Below a millimetre at cells of 4 mm, without bias; the released rounding is more than three times as far off."""
    signed, cycle = fourier_errors(refine=True, rounding=False)
    error = signed.norm(dim=1)
    assert error.mean() < 0.6
    assert error.max() < 1.5
    assert cycle.mean() < 1
    assert (signed.mean(0).abs() / SPACING < 0.15).all()
    released = fourier_errors(refine=False, rounding=True)[0].norm(dim=1)
    assert released.mean() > 3 * error.mean()


def test_released_answers_are_cells() -> None:
    query, key = unit_maps((5, 4, 6)), unit_maps((5, 7, 6))
    key[0][:, 2:6, :] = query[0]  # place (i, j) of the query is (i + 2, j)
    at = torch.tensor([[0, 0], [3, 5], [1, 2]])
    found, score = match_points(query, key, at, refine=False)
    assert found.tolist() == [[2, 0], [5, 5], [3, 2]]
    assert score.tolist() == pytest.approx([1, 1, 1], abs=1e-9)


def test_corners_aligned() -> None:
    """A coarse level whose outermost cells coincide with those of the fine one, as in the code of SAME."""
    fine = torch.zeros(2, 9, 5, dtype=torch.float64)
    fine[0] = 1
    angle = torch.linspace(0, 1.2, 5, dtype=torch.float64)[:, None].expand(5, 3)  # along the first axis only
    coarse = torch.stack([angle.cos(), angle.sin()])
    at = torch.tensor([[2.0, 1.0], [6.0, 3.0]])
    found, _ = match_points([fine, coarse], [fine, coarse], at, refine=False, align_corners=True)
    assert found[:, 0].tolist() == [2, 6]  # on nodes of the coarse map, 2 k
    sampled = sample_embedding([fine, coarse], at, align_corners=True)[1]
    torch.testing.assert_close(sampled, coarse[:, [1, 3], 0].T)


def test_mask_and_chunks() -> None:
    query, key = unit_maps(*MAPS[3]), unit_maps(*MAPS[3], seed=1)
    mask = torch.zeros(4, 6, 8, dtype=torch.bool)
    mask[1:3, 2:5, 3] = True
    index = torch.rand(11, 3, generator=torch.Generator().manual_seed(0)) * 4
    found, score = match_points(query, key, index, key_mask=mask)
    cells, _ = match_points(query, key, index, refine=False, key_mask=mask)
    assert mask[tuple(cells.long().T)].all()
    assert (found[:, 2] == 3).all()  # both neighbours are barred: no refinement
    for size in (1, 4, 1000):
        again, scores = match_points(query, key, index, key_mask=mask, chunk_size=size)
        torch.testing.assert_close(again, found)
        torch.testing.assert_close(scores, score)
    assert [x.shape for x in match_points(query, key, torch.zeros(0, 3))] == [(0, 3), (0,)]


def test_other_width_and_one_map() -> None:
    query = maps_of(QUERY, lambda v: v * SPACING, strides=((2, 2, 2),), channels=7)
    assert len(query[0]) == 7
    index = torch.tensor([[4, 8, 7], [6, 10, 11]])
    assert torch.equal(match_points(query, query, index, refine=False)[0], index.double())


def test_similarity_map_at_image_size() -> None:
    query, key = unit_maps(*MAPS[3]), unit_maps(*MAPS[3], seed=1)
    at = torch.rand(2, 3) * 4
    shown = similarity_map(query, key, at, (8, 12, 16))
    assert shown.shape == (2, 8, 12, 16)
    cells = similarity(sample_embedding(query, at), key)
    torch.testing.assert_close(
        F.avg_pool3d(shown[None], 2)[0][:, 1:-1, 1:-1, 1:-1],
        F.avg_pool3d(F.interpolate(cells[None], scale_factor=2, mode="trilinear"), 2)[0][:, 1:-1, 1:-1, 1:-1],
    )
    assert torch.equal(similarity_map(query, key, at, (4, 6, 8)), cells)


def test_stable_matches() -> None:
    """Four places have partners; starts elsewhere end on them or are dropped, and no pair appears twice."""
    query, key = torch.zeros(5, 3, 4), torch.zeros(5, 4, 3)
    query[4], key[4] = 1, 1
    partners = {(0, 0): (3, 2), (0, 3): (0, 1), (2, 1): (1, 1), (1, 2): (2, 0)}
    for channel, (a, b) in enumerate(partners.items()):
        query[:, a[0], a[1]] = key[:, b[0], b[1]] = torch.eye(5)[channel]
    starts = torch.tensor([*partners, (0, 0), (2, 1)], dtype=torch.float64)
    first, second, score = stable_matches([query], [key], starts, rounds=2)
    found = {tuple(map(int, a)): tuple(map(int, b)) for a, b in zip(first.tolist(), second.tolist())}
    assert found == partners
    assert len(first) == len(second) == 4
    assert score.tolist() == [1, 1, 1, 1]
    # one round from a place that moves: dropped; from where it ended: kept
    key[:, 3, 2] = 0.8 * torch.eye(5)[0] + 0.6 * torch.eye(5)[3]
    query[:, 2, 3] = key[:, 3, 2]
    lost = stable_matches([query], [key], torch.tensor([[0.0, 0.0]]), rounds=1)
    assert len(lost[0]) == len(lost[1]) == len(lost[2]) == 0
    kept = stable_matches([query], [key], torch.tensor([[0.0, 0.0]]), rounds=2)
    assert kept[0].tolist() == [[2, 3]]
    assert kept[1].tolist() == [[3, 2]]
    barred = torch.ones(4, 3, dtype=torch.bool)
    barred[3, 2] = False
    assert stable_matches([query], [key], torch.tensor([[0.0, 0.0]]), key_mask=barred)[1].tolist() != [[3, 2]]


def test_errors() -> None:
    query, key = unit_maps(*MAPS[3]), unit_maps(*MAPS[3])
    with pytest.raises(ValueError, match=r"\(P, 3\).*\(4, 2\)"):
        match_points(query, key, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="first map must be the finest"):
        match_points(query[::-1], key, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="channels"):
        match_points(query[:2], key, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="key_mask"):
        match_points(query, key, torch.zeros(4, 3), key_mask=torch.zeros(4, 6, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="rounds"):
        stable_matches(query, key, torch.zeros(4, 3), rounds=0)


def test_images_are_found_here_too() -> None:
    assert point_matching.PointMatcher is PointMatcher
    assert point_matching.PointMatches is PointMatches
    assert point_matching.ImageEmbedding is ImageEmbedding
    with pytest.raises(AttributeError, match="nothing"):
        _ = point_matching.nothing
    assert set(point_matching.__all__) <= set(apps.__all__)
