# SPDX-License-Identifier: Apache-2.0
"""The shared box of two views, cut out of their feature maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.networks import align_overlap, overlap_theta
from monai_ssl.transforms import extract_view, view_matrix

# ---- pairs of views, written down as start, extent and flip of each --------------------------------------------------

ROI, VOLUME, FEATURES = (16, 96, 96), (48, 260, 250), (2, 6, 6)
EIGHT = list(itertools.product([False, True], repeat=3))


def pair_affine(start: Any, extent: Any, flip: Any, roi: Sequence[int], parent: Tensor | None = None) -> Tensor:
    """(1, 2, n + 1, n + 1), to the index of the volume, or with the matrix of the volume to its world."""
    views = [view_matrix(start[v], extent[v], roi, flip[v]) for v in range(2)]
    affine = torch.stack(views)[None]
    return affine if parent is None else parent @ affine


def draw_pair(seed: int, roi: Sequence[int] = ROI, volume: Sequence[int] = VOLUME) -> tuple[list, list]:
    """Start and extent of two boxes with scales of 1.1 to 1.4 per axis that share a fifth of each axis or more."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    extent = [[draw(math.ceil(1.1 * r), int(1.4 * r)) for r in roi] for _ in range(2)]
    first = [draw(0, n - e) for n, e in zip(volume, extent[0])]
    second = []
    for s, e, other, n in zip(first, extent[0], extent[1], volume):
        shared = e // 5 + 1
        second.append(draw(max(0, s - other + shared), min(n - other, s + e - shared)))
    return [first, second], extent


def oblique(seed: int) -> Tensor:
    """A matrix of a volume: axes permuted and mirrored, 20 degrees oblique, anisotropic, far from the origin."""
    turn, c, s = torch.eye(4, dtype=torch.float64), math.cos(0.35), math.sin(0.35)
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = c, -s, s, c
    order = [[1, 2, 0], [2, 0, 1], [0, 2, 1]][seed % 3]
    scale = torch.zeros(4, 4, dtype=torch.float64)
    for column, (row, spacing) in enumerate(zip(order, (3.0, -0.8, 0.9))):
        scale[row, column] = spacing
    scale[:3, 3], scale[3, 3] = torch.tensor([-213.7, 88.1, 1024.3]), 1.0
    return turn @ scale


# ---- tables ----------------------------------------------------------------------------------------------------------

TABLE = [  # start, extent of axis 0 in view 1; in view 2; view 2 flipped; cell and rf: (scale, translation) of 1 and 2
    ((0, 8), (4, 8), True, [(0.5, 0.5), (-0.5, 0.5)], [(0.5, 0.625), (-0.5, 0.625)]),
    ((2, 10), (6, 12), True, [(0.6, 0.4), (-0.5, 0.5)], [(0.6, 0.525), (-0.5, 0.625)]),
]


@pytest.mark.parametrize("anchor", ["cell", "rf"])
@pytest.mark.parametrize("first, second, flipped, cell, rf", TABLE)
def test_by_hand(first: Any, second: Any, flipped: bool, cell: Any, rf: Any, anchor: str) -> None:
    start, extent = [[first[0], 0], [second[0], 0]], [[first[1], 8], [second[1], 8]]
    affine = pair_affine(start, extent, [[False, False], [flipped, False]], (8, 8))
    theta = overlap_theta(affine, (8, 8), (4, 4), anchor)
    assert theta.shape == (1, 2, 2, 3)
    assert theta.dtype == torch.float64
    for view, (scale, translation) in enumerate(cell if anchor == "cell" else rf):
        other = 0.0 if anchor == "cell" else 0.125
        expected = torch.tensor([[1, 0, other], [0, scale, translation]], dtype=torch.float64)  # rows x, then y
        torch.testing.assert_close(theta[0, view], expected, atol=1e-12, rtol=0)


def turns() -> list[Tensor]:
    """Matrices of images: with them, boxes that touch overlap by about 1e-14 voxels now and then."""
    angles = torch.linspace(0.05, 1.5, 20, dtype=torch.float64)
    rows = [
        [[0.7 * math.cos(a), -0.9 * math.sin(a), 81.3], [0.7 * math.sin(a), 0.9 * math.cos(a), -57.1]] for a in angles
    ]
    return [torch.tensor([*two, [0, 0, 1]], dtype=torch.float64) for two in rows]


def test_boxes_that_touch_share_nothing() -> None:
    for start in ([[0, 0], [8, 0]], [[0, 0], [11, 3]]):
        affine = pair_affine(start, [[8, 8], [8, 8]], [[False] * 2] * 2, (8, 8))
        for matrix in (affine, *(parent @ affine for parent in turns())):
            theta = overlap_theta(matrix, (8, 8), (4, 4))
            assert not theta[..., :2].any()
            for border in (0.0, 0.5, math.inf):
                aligned, valid = align_overlap(torch.rand(2, 3, 4, 4), theta[0], border)
                assert not valid.any()
                assert aligned.isfinite().all()


@pytest.mark.parametrize("roi, features", [((12, 18, 10), (3, 6, 2)), ((14, 6), (7, 2))])
def test_stride_moves_rf_by_a_known_amount_and_cell_not_at_all(roi: Any, features: Any) -> None:
    n = len(roi)
    start, extent = [[1] * n, [3] * n], [[r + 2 for r in roi], [r + 1 for r in roi]]
    affine = pair_affine(start, extent, [[False] * n, [True] * n], roi)
    cell, rf = (overlap_theta(affine, roi, features, anchor) for anchor in ("cell", "rf"))
    strides = torch.tensor([i / f for i, f in zip(roi, features)], dtype=torch.float64)
    shift = ((strides - 1) / torch.tensor(roi, dtype=torch.float64)).flip(0).expand(1, 2, n)
    torch.testing.assert_close(rf[..., n] - cell[..., n], shift, atol=1e-12, rtol=0)
    torch.testing.assert_close(rf[..., :n], cell[..., :n], atol=1e-12, rtol=0)
    given = overlap_theta(affine, roi, features, "rf", [int(s) for s in strides])
    torch.testing.assert_close(given, rf, atol=0, rtol=0)


def test_border_by_hand() -> None:
    """Cells of 2 voxels, the box is the second half of view 1: samples at feature index 1.5 + (k + 1/2) / 2."""
    affine = pair_affine([[0, 0], [4, 0]], [[8, 8], [8, 8]], [[False] * 2] * 2, (8, 8))
    theta = overlap_theta(affine, (8, 8), (4, 4), "cell")
    features = torch.arange(4.0)[:, None].expand(4, 4)[None, None].repeat(2, 1, 1, 1)
    aligned, _ = align_overlap(features, theta[0])
    torch.testing.assert_close(aligned[0, 0, :, 1], torch.tensor([1.75, 2.25, 2.75, 3.0]))  # 3.25 lies beyond
    torch.testing.assert_close(aligned[1, 0, :, 1], torch.tensor([0.0, 0.25, 0.75, 1.25]))
    counted = {b: align_overlap(features, theta[0], b)[1][:, :, 1].tolist() for b in (0.0, 0.24, 0.25, 0.5)}
    assert counted[0.0] == counted[0.24] == [[True, True, True, False], [False, True, True, True]]
    assert counted[0.25] == counted[0.5] == [[True] * 4] * 2


def test_everything_counts_without_a_border() -> None:
    start, extent = draw_pair(0)
    theta = overlap_theta(pair_affine(start, extent, EIGHT[3:5], ROI), ROI, FEATURES, "rf", 3)
    _, valid = align_overlap(torch.rand(2, 1, *FEATURES), theta[0], math.inf)
    assert valid.all()
    assert not align_overlap(torch.rand(2, 1, *FEATURES), theta[0], 0.5)[1].all()


# ---- against plain loops ---------------------------------------------------------------------------------------------


def interpolated(values: Tensor, index: float) -> Tensor:
    """One axis, last, linear between centres, the outermost value beyond them."""
    index = min(max(index, 0.0), values.shape[-1] - 1.0)
    low = min(int(index), max(values.shape[-1] - 2, 0))
    high = min(low + 1, values.shape[-1] - 1)
    return values[..., low] * (1 - (index - low)) + values[..., high] * (index - low)


def unflip_and_roi_align(
    features: Tensor, start: Any, extent: Any, flip: Any, view: int, roi: Sequence[int], stride: Any, anchor: str
) -> Tensor:
    """The published steps for one view: undo the flips of its map, crop the box in cells, one sample per bin."""
    out = features  # (C, *F)
    for axis in range(features.ndim - 1):
        count = features.shape[1 + axis]
        low = max(s[axis] for s in start)
        high = min(s[axis] + e[axis] for s, e in zip(start, extent))
        to_view = roi[axis] / extent[view][axis]
        low, high = (low - start[view][axis]) * to_view, (high - start[view][axis]) * to_view  # along the volume's axis
        if flip[view][axis]:
            out = out.flip(1 + axis)
        samples = []
        for k in range(count):
            u = low + (k + 0.5) / count * (high - low)  # corner coordinate in the view
            index = u / stride[axis] - 0.5
            if anchor == "rf":  # the flipped chain's centres are those of the other end of each cell
                index = (u - 0.5) / stride[axis]
                if flip[view][axis]:
                    index = count - 1 - (roi[axis] - u - 0.5) / stride[axis]
            samples.append(interpolated(out.movedim(1 + axis, -1), index))
        out = torch.stack(samples, -1).movedim(-1, 1 + axis)
    return out


@pytest.mark.parametrize("anchor", ["cell", "rf"])
@pytest.mark.parametrize("flip", EIGHT)
def test_equals_unflip_and_roi_align(flip: tuple, anchor: str) -> None:
    roi, features, volume = (12, 20, 18), (3, 5, 6), (30, 41, 37)
    flips = [flip, (flip[1], not flip[2], flip[0])]
    start, extent = draw_pair(sum(flip) + 1, roi, volume)
    theta = overlap_theta(pair_affine(start, extent, flips, roi), roi, features, anchor)[0]
    maps = torch.rand(2, 3, *features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aligned, _ = align_overlap(maps, theta)
    for view in range(2):
        expected = unflip_and_roi_align(maps[view], start, extent, flips, view, roi, (4, 4, 3), anchor)
        torch.testing.assert_close(aligned[view], expected, atol=1e-9, rtol=0)


# ---- the world and the index -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flip", EIGHT)
def test_world_and_index_give_the_same_boxes(flip: tuple, seed: int) -> None:
    """Up to one joint flip of both samples, where the world runs against the volume."""
    flips = [flip, EIGHT[seed + 3]]
    start, extent = draw_pair(seed)
    index, world = (
        overlap_theta(pair_affine(start, extent, flips, ROI, parent), ROI, FEATURES) for parent in (None, oblique(seed))
    )
    torch.testing.assert_close(world[..., 3], index[..., 3], atol=1e-9, rtol=0)
    same, turned = (
        torch.stack([(sign * world[0, :, a, a] - index[0, :, a, a]).abs().amax() for a in range(3)]) for sign in (1, -1)
    )
    assert (torch.minimum(same, turned) < 1e-9).all()  # each axis of both views together
    assert (turned < 1e-9)[1]  # x, y, z: the axis with negative spacing is the middle one
    assert (same < 1e-9)[[0, 2]].all()


def test_a_batch_is_its_items() -> None:
    items = []
    for seed in range(4):
        start, extent = draw_pair(seed)
        items.append(pair_affine(start, extent, EIGHT[seed : seed + 2], ROI, oblique(seed) if seed % 2 else None))
    together = overlap_theta(torch.cat(items), ROI, FEATURES)
    for number, item in enumerate(items):
        torch.testing.assert_close(together[number], overlap_theta(item, ROI, FEATURES)[0], atol=1e-12, rtol=0)


# ---- coordinates as voxel values -------------------------------------------------------------------------------------


def coordinates(size: Sequence[int]) -> Tensor:
    axes = [torch.arange(float(s)) for s in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def encode(view: Tensor, stride: Sequence[int], anchor: str) -> Tensor:
    """A map whose features hold the coordinate of their centre."""
    if anchor == "cell":
        return F.avg_pool3d(view, tuple(stride))
    return view[(..., *(slice(None, None, s) for s in stride))]


def true_coordinates(start: Any, extent: Any, features: Sequence[int]) -> Tensor:
    """Index in the volume of the samples of the shared box."""
    axes = []
    for axis, count in enumerate(features):
        low = max(s[axis] for s in start)
        high = min(s[axis] + e[axis] for s, e in zip(start, extent))
        axes.append(low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low) - 0.5)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def aligned_coordinates(seed: int, flips: Any, anchor: str, assumed: str, border: float = 0.0) -> tuple[Tensor, Tensor]:
    """Error in voxels of the volume (2, 3, *F), and where both views are valid (*F)."""
    stride = (4, 8, 8)  # finer than the published map, which has two features along its first axis
    features = tuple(r // s for r, s in zip(ROI, stride))
    start, extent = draw_pair(seed)
    volume = coordinates(VOLUME)
    views = torch.stack([extract_view(volume, start[v], extent[v], ROI, flips[v]) for v in range(2)])
    theta = overlap_theta(pair_affine(start, extent, flips, ROI), ROI, features, assumed)[0]
    aligned, valid = align_overlap(encode(views, stride, anchor), theta, border)
    return (aligned - true_coordinates(start, extent, features)).abs(), valid.all(0)


@pytest.mark.parametrize("anchor", ["cell", "rf"])
@pytest.mark.parametrize("flip", EIGHT)
def test_both_maps_hold_the_true_coordinates(flip: tuple, anchor: str) -> None:
    found = 0
    for seed, other in enumerate((EIGHT[0], EIGHT[5], flip)):
        error, valid = aligned_coordinates(seed + 10 * sum(flip), [flip, other], anchor, anchor)
        assert (error * valid).amax((0, 2, 3, 4)).max() < 1e-3
        found += int(valid.sum())
    assert found > 100


def test_the_wrong_anchor_is_off_when_flips_differ() -> None:
    """By OS - 1 = 7 voxels of the view between the two maps, half of that in each."""
    for anchor, wrong in (("rf", "cell"), ("cell", "rf")):
        worst = []
        for seed in range(4):
            error, valid = aligned_coordinates(seed, [EIGHT[0], EIGHT[7]], anchor, wrong)
            worst.append((error * valid).amax((0, 2, 3, 4))[1:])
        assert torch.stack(worst).amax(0).min() > 3


def test_half_a_cell_beyond_costs_at_most_half_a_cell() -> None:
    start_error, _ = aligned_coordinates(2, [EIGHT[0], EIGHT[6]], "rf", "rf", border=0.0)
    error, valid = aligned_coordinates(2, [EIGHT[0], EIGHT[6]], "rf", "rf", border=0.5)
    half_a_cell = 0.5 * 1.4 * torch.tensor([4.0, 8.0, 8.0])
    assert ((error * valid).amax((0, 2, 3, 4)) < half_a_cell + 1e-3).all()
    assert (error * valid).amax() > 1  # there are such samples
    assert torch.equal(error, start_error)


# ---- dtype, autocast, device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(dtype: torch.dtype, expected: torch.dtype, autocast: bool) -> None:
    start, extent = draw_pair(3)
    theta = overlap_theta(pair_affine(start, extent, EIGHT[2:4], ROI), ROI, FEATURES)[0]
    maps = torch.rand(2, 3, *FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        aligned, valid = align_overlap(maps, theta)
    assert aligned.dtype == expected
    exact, same = align_overlap(maps.double(), theta)
    assert torch.equal(valid, same)
    torch.testing.assert_close(aligned.double(), exact, atol=1e-5, rtol=0)


def test_nothing_depends_on_values() -> None:
    """Meta tensors have none; so on a device nothing is waited for."""
    affine = torch.eye(4, dtype=torch.float64, device="meta").expand(3, 2, 4, 4)
    theta = overlap_theta(affine, ROI, FEATURES)
    aligned, valid = align_overlap(torch.empty(6, 5, *FEATURES, device="meta"), theta.flatten(0, 1))
    assert aligned.shape == (6, 5, *FEATURES)
    assert valid.shape == (6, *FEATURES)
    assert (valid.dtype, valid.device.type) == (torch.bool, "meta")


def test_single_precision_matrices_are_taken() -> None:
    start, extent = draw_pair(4)
    affine = pair_affine(start, extent, EIGHT[1:3], ROI)
    theta = overlap_theta(affine.float(), ROI, FEATURES)
    assert theta.dtype == torch.float64
    torch.testing.assert_close(theta, overlap_theta(affine, ROI, FEATURES), atol=1e-5, rtol=0)


def test_gradient_reaches_the_features() -> None:
    affine = pair_affine([[0, 0], [2, 1]], [[8, 9], [7, 8]], [[False, True], [True, True]], (8, 6))
    theta = overlap_theta(affine, (8, 6), (4, 3))[0]
    maps = torch.rand(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: align_overlap(m, theta)[0], maps)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_rotated_views_are_refused() -> None:
    start, extent = draw_pair(0)
    affine = pair_affine(start, extent, EIGHT[:2], ROI)
    with pytest.raises(ValueError, match="rotated against each other"):
        overlap_theta(torch.stack([affine[:, 0], oblique(0) @ affine[:, 1]], 1), ROI, FEATURES)
    with pytest.raises(ValueError, match="rotated against each other"):
        overlap_theta(affine * math.nan, ROI, FEATURES)
    nearly = affine.clone()
    nearly[0, 1, 0, 1] += 5e-5
    overlap_theta(nearly, ROI, FEATURES)  # rounding of a header


def test_errors() -> None:
    affine = pair_affine(*draw_pair(0), EIGHT[:2], ROI)
    with pytest.raises(ValueError, match="rf, cell, got 'center'"):
        overlap_theta(affine, ROI, FEATURES, "center")
    with pytest.raises(ValueError, match=r"\(16, 96, 96\) are no multiples of their maps \(3, 6, 6\): give output_str"):
        overlap_theta(affine, ROI, (3, 6, 6))
    overlap_theta(affine, ROI, (3, 6, 6), output_stride=(6, 16, 16))
    for wrong in (affine[0], affine[:, :1], affine[..., :3, :3]):
        with pytest.raises(ValueError, match=r"view_affine .* must be \(B, 2, n \+ 1, n \+ 1\)"):
            overlap_theta(wrong, ROI, FEATURES)
    with pytest.raises(ValueError, match="length of view_size"):
        overlap_theta(affine, ROI, (6, 6))
    theta = overlap_theta(affine, ROI, FEATURES)[0]
    for maps, matrix in (
        (torch.rand(3, 1, 2, 6, 6), theta),
        (torch.rand(2, 1, 6, 6), theta),
        (torch.rand(2, 6), theta),
    ):
        with pytest.raises(ValueError, match="must be"):
            align_overlap(maps, matrix)
    for border in (-0.1, math.nan):
        with pytest.raises(ValueError, match="border"):
            align_overlap(torch.rand(2, 1, *FEATURES), theta, border)
