# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
from voxel_fields import AFFINE, SIZE, affine, border_mask, embedding, matcher, same_cells

from monai_ssl.apps.registration.grid_matches import match_grid
from monai_ssl.transforms.view_geometry import transform_points

MOVING, FIXED = embedding(), embedding(affine)


def test_one_image_twice() -> None:
    """No bias: linear sampling pulls towards the nearest cell, by 0.14 voxel."""
    mask = border_mask()
    found = match_grid(matcher(), MOVING, MOVING, mask, mask)
    assert found.counts == {"grid": 192, "moving_mask": 140, "score": 140, "masks": 140, "cycle": 140}
    signed = (found.fixed - found.moving).mean(0)
    assert (signed.abs() < 0.25).all()
    assert (found.fixed - found.moving).norm(dim=1).max() < 0.75
    assert found.moving[0].tolist() == [3, 11, 11]
    assert found.moving.dtype == found.fixed.dtype == torch.float64


def test_pairs_show_the_same() -> None:
    for matching, limit in (("cycle", 0.5), ("stable", 1.5)):
        found = match_grid(matcher(), MOVING, FIXED, border_mask(), border_mask(), matching=matching)
        assert (transform_points(AFFINE, found.fixed) - found.moving).norm(dim=1).mean() < limit
        assert len(found.moving) == len(found.fixed) == len(found.scores) == list(found.counts.values())[-1]
        assert 0.7 < found.scores.min() <= found.scores.max() <= 1


def test_filters_and_counts() -> None:
    """Each filter leaves what it should: compared with plain lists of what all points would answer."""
    everything = match_grid(matcher(), MOVING, FIXED, min_score=-1.0)  # no masks: all but the cycle
    strict = float(everything.scores.median())
    fixed_mask = torch.zeros(SIZE, dtype=torch.bool)
    fixed_mask[:, 10:] = True
    found = match_grid(matcher(), MOVING, FIXED, border_mask(), fixed_mask, min_score=strict)
    inside = [
        bool(border_mask()[tuple(p.long())]) and s > strict and bool(fixed_mask[tuple(q.round().long())])
        for p, q, s in zip(everything.moving, everything.fixed.clamp_min(0), everything.scores)
    ]
    assert torch.equal(found.moving, everything.moving[torch.tensor(inside)])
    assert torch.equal(found.fixed, everything.fixed[torch.tensor(inside)])
    counts = list(found.counts.values())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == sum(inside)
    assert (found.scores > strict).all()  # not only as much


def test_matching_back_is_a_filter() -> None:
    """Half of the fixed image shows another place, whose partner is found elsewhere."""
    fixed = embedding(lambda p: torch.where(p[:, :1] < 16, affine(p), affine(p) + torch.tensor([0.0, 9, 9])))
    found = match_grid(matcher(), MOVING, fixed, min_score=0.0)
    assert found.counts["cycle"] < found.counts["masks"]
    back = (match_grid(matcher(), fixed, MOVING, min_score=0.0)).counts
    assert back["cycle"] < back["masks"]


def test_stable_matches_lie_in_masks_at_both_ends() -> None:
    """Points move away from where they start, also out of the moving mask."""
    moving_mask = torch.zeros(SIZE, dtype=torch.bool)
    moving_mask[:, 11:36, 11:44] = True  # grid points lie on its borders
    found = match_grid(matcher(), MOVING, FIXED, moving_mask, border_mask(), matching="stable")
    assert moving_mask[tuple(found.moving.round().long().T)].all()
    assert border_mask()[tuple(found.fixed.round().long().T)].all()
    assert found.counts["masks"] < found.counts["score"] <= found.counts["stable"] <= found.counts["moving_mask"]


@pytest.mark.parametrize("matching", ["cycle", "stable"])
def test_chunks(matching: str) -> None:
    a, b = (match_grid(matcher(size), MOVING, FIXED, stride=12, matching=matching) for size in (25, 10**6))
    torch.testing.assert_close(a.moving, b.moving)
    torch.testing.assert_close(a.fixed, b.fixed, atol=1e-4, rtol=0)
    assert a.counts == b.counts


@pytest.mark.parametrize("matching", ["cycle", "stable"])
def test_padding_is_no_answer(matching: str) -> None:
    """Of 64 voxels that the maps cover, 50 are the image: its last cell lies at 48.5, and its border at 49.5."""
    padded = dataclasses.replace(FIXED, size=(32, 48, 50), padded_size=SIZE)
    found = match_grid(matcher(), MOVING, padded, matching=matching)
    assert 45 < found.fixed[:, 2].max() <= 48.5
    padded = dataclasses.replace(MOVING, size=(32, 48, 46), padded_size=SIZE)
    end = torch.zeros(32, 48, 46, dtype=torch.bool)
    end[..., 40:] = True
    found = match_grid(matcher(), padded, FIXED, end, stride=4, matching=matching)
    assert found.moving[:, 2].max() == {"cycle": 45, "stable": 44.5}[matching]  # a grid point, the last cell


def test_exact_on_other_grids() -> None:
    worlds = (torch.diag(torch.tensor([2.0, 3, 1.5, 1])).double() for _ in range(2))
    moving, fixed, true = same_cells((6, 5, 7), *worlds)
    found = match_grid(matcher(), moving, fixed, stride=2, matching="stable")
    torch.testing.assert_close(transform_points(true, found.fixed), found.moving, atol=1e-9, rtol=0)
    assert len(found.moving) == 6 * 5 * 7


def test_too_few() -> None:
    with pytest.raises(ValueError, match=r"at least 16 are needed.*grid 12, .*too small for this stride"):
        match_grid(matcher(), MOVING, FIXED, stride=20)
    point = torch.zeros(SIZE, dtype=torch.bool)
    point[3, 3, 3] = True
    with pytest.raises(ValueError, match=r"only [01] matches are left.*grid 192, moving_mask 1, .*few grid points"):
        match_grid(matcher(), MOVING, FIXED, moving_mask=point)
    with pytest.raises(ValueError, match=r"score 192, masks 0, cycle 0; few matches lie in both masks"):
        match_grid(matcher(), MOVING, FIXED, fixed_mask=point)
    with pytest.raises(ValueError, match=r"score 0, .*not confident.*min_score"):
        match_grid(matcher(), MOVING, FIXED, min_score=1.0)
    elsewhere = embedding(lambda p: p + 1000)
    with pytest.raises(ValueError, match=r"score 0, .*same region"):
        match_grid(matcher(), MOVING, elsewhere)
    with pytest.raises(ValueError, match=r"masks 192, cycle .* matching back does not lead back"):
        match_grid(matcher(), MOVING, embedding(lambda p: p * 0 + 20), min_score=-1.0)  # one place everywhere


def test_one_layer() -> None:
    """Answers spread a little across it, which says nothing."""
    layer = torch.zeros(SIZE, dtype=torch.bool)
    layer[10:13] = True
    for matching in ("cycle", "stable"):
        with pytest.raises(ValueError, match=r"in one layer of the moving image .* moving_mask 48.*smaller stride"):
            match_grid(matcher(), MOVING, FIXED, moving_mask=layer, matching=matching)
    two = layer.clone()
    two[18:21] = True
    assert len(match_grid(matcher(), MOVING, FIXED, moving_mask=two).moving) > 16


def test_an_empty_body() -> None:
    none = torch.zeros(16, 24, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"moving_mask 0, .*the body"):
        match_grid(matcher(), dataclasses.replace(MOVING, body=none), FIXED)
    with pytest.raises(ValueError, match=r"masks 0, .*the bodies"):
        match_grid(matcher(), MOVING, dataclasses.replace(FIXED, body=none))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"min_score 1\.3 accepts nothing"):
        match_grid(matcher(), MOVING, FIXED, min_score=1.3)
    with pytest.raises(ValueError, match="cycle, stable, got 'mutual'"):
        match_grid(matcher(), MOVING, FIXED, matching="mutual")
    with pytest.raises(ValueError, match="stride must be at least 1"):
        match_grid(matcher(), MOVING, FIXED, stride=0)
    with pytest.raises(ValueError, match="fixed_mask"):
        match_grid(matcher(), MOVING, FIXED, fixed_mask=torch.ones(3, 4, 5))
