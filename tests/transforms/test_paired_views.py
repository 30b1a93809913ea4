# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, Flip, Flipd, Rotate90d, SpatialResample

from monai_ssl.data import KeyedDataset
from monai_ssl.transforms import RandPairedViews, RandPairedViewsd, extract_view, view_iou, view_matrix

SIZES: dict[int, tuple[int, ...]] = {3: (17, 20, 23), 2: (21, 26)}
ROIS: dict[int, tuple[int, ...]] = {3: (10, 12, 14), 2: (11, 13)}
SAM: dict[str, Any] = {
    "roi_size": (32, 96, 96), "scale_range": (0.8, 1.2), "pixdim": (2, 2, 2), "min_overlap": 0.0, "overlap_prob": 0.8,
    "flip_prob": 0.0, "placement": "seed",
}  # fmt: skip


def rotation(*angles: float) -> torch.Tensor:
    """Turns about the three axes, 3 x 3."""
    result = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        turn = torch.eye(3, dtype=torch.float64)
        a, b = [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def affine_of(kind: str, ndim: int) -> torch.Tensor:
    """(ndim + 1, ndim + 1); no two spacings alike."""
    columns = {
        "anisotropic": torch.diag(torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64)),
        "permuted": torch.tensor([[0, 0, -1.25], [0, -1.5, 0], [3, 0, 0]], dtype=torch.float64),  # SPL
        "oblique": rotation(0.3, -0.2, 0.5) @ torch.diag(torch.tensor([1.25, 2.0, 0.75], dtype=torch.float64)),
    }[kind]
    if ndim == 2:
        flat = {"permuted": [[0, -1.5], [2.5, 0]], "oblique": [[0.6 * 2, -0.8 * 1.25], [0.8 * 2, 0.6 * 1.25]]}
        columns = torch.tensor(flat[kind], dtype=torch.float64) if kind in flat else columns[:2, :2]
    affine = torch.eye(ndim + 1, dtype=torch.float64)
    affine[:-1, :-1] = columns
    affine[:-1, -1] = torch.tensor([-100.0, 60.5, 1500.0])[-ndim:]
    return affine


AFFINES = ("anisotropic", "permuted", "oblique")


def places(size: Any, affine: torch.Tensor) -> torch.Tensor:
    """Image (n, *size) whose voxels hold their own place, float64."""
    index = torch.stack(torch.meshgrid(*(torch.arange(int(s)).double() for s in size), indexing="ij"))
    n = len(index)
    return torch.einsum("ij,j...->i...", affine[:n, :n], index) + affine[:n, -1].reshape(n, *(1 for _ in size))


def coordinates(size: Any, affine: torch.Tensor, channels: int | None = None) -> torch.Tensor:
    """`places`; or of those and their sum with unequal weights the first three or the last one, float64."""
    world = places(size, affine)
    if channels is None:
        return world
    total = torch.einsum("i,i...->...", torch.tensor([1, 0.3, -0.2]).double()[: len(world)], world)[None]
    return total if channels == 1 else torch.cat([world, total])[:channels]


def placed_volume(size: tuple[int, ...], affine: torch.Tensor, channels: int | None = None) -> MetaTensor:
    return MetaTensor(coordinates(size, affine, channels).float(), affine=affine)


def iou_by_counting(start: Any, extent: Any) -> float:
    """Voxels of each box as sets, axis by axis."""
    sets = [[set(range(int(s), int(s) + int(e))) for s, e in zip(a, b)] for a, b in zip(start, extent)]
    common = np.prod([len(a & b) for a, b in zip(*sets)], dtype=float)
    return common / (sum(np.prod([len(a) for a in box], dtype=float) for box in sets) - common)


# ---- the free functions


def test_hand_worked_values() -> None:
    assert view_matrix([4, 0], [8, 8], [8, 8], [True, False]).tolist() == [[-1, 0, 11], [0, 1, 0], [0, 0, 1]]
    matrix = view_matrix([6, 0], [12, 8], [8, 8], [True, False])
    assert matrix.dtype == torch.float64
    assert matrix[0].tolist() == [-1.5, 0, 16.75]
    matrix = view_matrix(np.array([6, 0]), torch.tensor([12, 8]), 8, np.array([False, True]))
    assert matrix.tolist() == [[1.5, 0, 6.25], [0, -1, 7], [0, 0, 1]]
    assert view_iou([0, 0, 0], [10, 10, 10], [5, 0, 0], [10, 10, 10]) == pytest.approx(1 / 3, abs=1e-12)
    assert view_iou([2], [10], [6], [12]) == 0.375
    assert view_iou([0, 0], [4, 4], [4, 0], [4, 4]) == 0
    assert view_iou(np.array([1, 2]), np.array([3, 4]), torch.tensor([1, 2]), [3, 4]) == 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_iou_by_counting_and_its_promise(ndim: int) -> None:
    """It bounds the share of either box from below."""
    state = np.random.RandomState(0)
    for _ in range(100):
        start, extent = state.randint(0, 5, (2, ndim)), state.randint(1, 8, (2, ndim))
        iou = view_iou(start[0], extent[0], start[1], extent[1])
        assert iou == pytest.approx(iou_by_counting(start, extent), abs=1e-12)
        overlap = np.prod(np.clip((start + extent).min(0) - start.max(0), 0, None))
        assert all(overlap / np.prod(e) >= iou - 1e-12 for e in extent)


@pytest.mark.parametrize("ndim", [2, 3])
def test_view_is_where_its_matrix_says(ndim: int) -> None:
    size, roi = SIZES[ndim], ROIS[ndim]
    volume = places(size, torch.eye(ndim + 1, dtype=torch.float64))
    start, extent = (2, 0, 3)[:ndim], (15, 20, 17)[:ndim]
    for flip in product([False, True], repeat=ndim):
        view = extract_view(volume, start, extent, roi, flip)
        assert (view.dtype, type(view)) == (torch.float32, torch.Tensor)
        matrix = view_matrix(start, extent, roi, flip)
        torch.testing.assert_close(view.double(), places(roi, matrix), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint8, torch.float16])
def test_equals_one_interpolation(dtype: torch.dtype) -> None:
    """Of the flipped view, coarser along some axes and finer along others, whatever the order of voxels in memory."""
    volume = torch.randint(0, 200, (2, 17, 20, 23), generator=torch.manual_seed(0)).to(dtype)
    start, extent, roi = [2, 0, 5], [15, 8, 17], (10, 12, 15)
    crop = volume[:, 2:17, 0:8, 5:22].float()
    for flip, order in product(product([False, True], repeat=3), [(0, 1, 2, 3), (0, 3, 2, 1), (1, 2, 3, 0)]):
        stored = volume.permute(order).contiguous().permute(np.argsort(order).tolist())
        view = extract_view(stored, start, extent, roi, flip)
        plain = F.interpolate(crop[None], size=roi, mode="trilinear", align_corners=False)[0]
        assert view.is_contiguous()
        assert view.dtype == torch.float32
        torch.testing.assert_close(view, plain.flip([axis + 1 for axis in range(3) if flip[axis]]), atol=1e-4, rtol=0)


def test_finer_views_repeat_the_edge() -> None:
    view = extract_view(torch.arange(10.0)[None, :, None], [2, 0], [4, 1], [8, 1], [False, False])
    assert view.flatten().tolist() == [2, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64])
def test_nearest_keeps_the_dtype(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 2 if dtype == torch.bool else 100, (2, 17, 20, 23), generator=torch.manual_seed(0))
    args: Any = ([1, 0, 5], [16, 5, 13], [10, 7, 13], [False, True, True])
    view = extract_view(labels.to(dtype), *args, mode="nearest")
    assert view.dtype == dtype
    crop = labels[:, 1:17, 0:5, 5:18].double()[None]
    plain = F.interpolate(crop, size=[10, 7, 13], mode="nearest-exact")[0].flip([2, 3])
    assert torch.equal(view.double(), plain)


def test_nearest_takes_the_voxel_that_holds_the_centre() -> None:
    volume = places((30, 26), torch.eye(3, dtype=torch.float64))
    for extent, flip in product(([23, 19], [7, 26], [11, 5]), product([False, True], repeat=2)):
        view = extract_view(volume, [3, 0], extent, [11, 13], flip, "nearest")
        exact = places((11, 13), view_matrix([3, 0], extent, [11, 13], flip))
        assert (view - exact).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "bilinear"}, "unknown mode 'bilinear'"),
        ({"start": [-1, 0]}, r"\(-1, 4\).*does not lie inside.*\(8, 9\)"),
        ({"extent": [5, 10]}, r"\(0, 10\).*does not lie inside.*\(8, 9\)"),
        ({"extent": [0, 4]}, "does not lie inside"),
        ({"start": [0, 0, 0]}, "3, 2 and 2 entries"),
        ({"flip": [True]}, "2, 2 and 1 entries"),
        ({"roi_size": [4, 4, 4]}, "3 entries for 2"),
        ({"roi_size": [4, 0]}, "at least 1"),
    ],
)
def test_extract_view_errors(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"start": [0, 0], "extent": [5, 4], "roi_size": [4, 4], "flip": [True, False], **change}
    with pytest.raises(ValueError, match=message):
        extract_view(torch.zeros(1, 8, 9), **args)


# ---- geometry of the transform


@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("world", [False, True])
def test_world_coordinates(kind: str, ndim: int, channels: int, world: bool) -> None:
    """Every combination of flips of either view, view index -> volume index, and with `pixdim` -> mm."""
    affine, roi = affine_of(kind, ndim), ROIS[ndim]
    volume = placed_volume(SIZES[ndim], affine, channels)
    pixdim = [1.1 * float(s) for s in affine[:-1, :-1].norm(dim=0)] if world else None
    for number, flip in enumerate(product([False, True], repeat=ndim)):
        transform = RandPairedViews(roi, [(0.95, 1.3)] * ndim, pixdim, flip_prob=[float(f) for f in flip])
        transform.set_random_state(seed=number)
        *views, matrices = transform(volume)
        assert (type(matrices), matrices.dtype, matrices.shape) == (
            torch.Tensor,
            torch.float64,
            (2, ndim + 1, ndim + 1),
        )
        for view, matrix, start, extent in zip(views, matrices, transform.start, transform.extent):
            own = view_matrix(start, extent, roi, flip)
            index = torch.linalg.inv(affine) @ matrix if world else matrix
            torch.testing.assert_close(index, own, atol=1e-9, rtol=0)
            torch.testing.assert_close(view.affine, affine @ own, atol=1e-9, rtol=0)
            assert view.dtype == torch.float32
            inside = (slice(None), *(slice(1, -1),) * ndim)  # views finer than the volume repeat its edge
            error = (view.as_tensor().double() - coordinates(roi, view.affine, channels))[inside].abs()
            assert error.max() < 1e-3


@pytest.mark.parametrize("kind", AFFINES)
def test_unequal_flips_of_the_views(kind: str) -> None:
    affine = affine_of(kind, 3)
    transform = RandPairedViews(ROIS[3]).set_random_state(seed=0)
    flips = set()
    for _ in range(40):
        *views, _ = transform(placed_volume(SIZES[3], affine))
        flips |= {tuple(flip) for flip in transform.flip.tolist()}
        for view in views:
            assert (view.as_tensor() - places(ROIS[3], view.affine)).abs().max() < 1e-3
    assert len(flips) == 8


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_in_a_pipeline(kind: str, ndim: int, lazy: bool) -> None:
    """Between other spatial transforms, for every combination of flips."""
    affine = affine_of(kind, ndim)
    volume = placed_volume({3: (30, 33, 36), 2: (47, 46)}[ndim], affine)
    spacing = 1.1 * float(affine[:-1, :-1].norm(dim=0).min())
    for number, flip in enumerate(product([0.0, 1.0], repeat=ndim)):
        views = RandPairedViewsd("image", (7, 8, 9)[:ndim], (1.0, 1.2), spacing, min_overlap=0.3, flip_prob=flip)
        before = [Flipd("image", 0), Rotate90d("image", 1, (0, 1))]
        pipeline = Compose([*before, views, Flipd("image_2", 1)], lazy=lazy).set_random_state(seed=number)
        out = pipeline({"image": volume})
        for key in ("image", "image_2"):
            assert not out[key].pending_operations
            matrix = out[key].affine if len(out[key].affine) == ndim + 1 else out[key].affine[[0, 1, -1]][:, [0, 1, -1]]
            inside = (slice(None), *(slice(3, -3),) * ndim)  # views finer than the volume repeat its edge
            error = (out[key].as_tensor() - places(out[key].shape[1:], matrix))[inside].abs()
            assert error.numel()
            assert error.max() < 1e-3
        torch.testing.assert_close(out["view_affine"][0], out["image"].affine, atol=1e-9, rtol=0)


def test_pending_operations_are_refused_outside_a_compose() -> None:
    img = Flip(0, lazy=True)(MetaTensor(torch.zeros(1, 20, 20)))
    with pytest.raises(ValueError, match="'img' has lazy operations pending"):
        RandPairedViews(10)(img)


@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_one_spatial_resample(kind: str, ndim: int) -> None:
    affine = affine_of(kind, ndim)
    noise = torch.rand(2, *SIZES[ndim], generator=torch.manual_seed(0))
    img = MetaTensor(noise, affine=affine)
    transform = RandPairedViews(ROIS[ndim], [(1.0, 1.5)] * ndim).set_random_state(seed=1)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)
    for _ in range(5):
        *views, matrices = transform(img)
        for view, matrix in zip(views, matrices):
            own = resample(img, dst_affine=affine @ matrix, spatial_size=ROIS[ndim])
            assert own.shape == view.shape
            torch.testing.assert_close(view.as_tensor(), own.as_tensor(), atol=1e-5, rtol=0)


def test_a_flat_image_may_carry_an_affine_of_three_axes() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0], dtype=torch.float64))
    img = MetaTensor(torch.zeros(1, *SIZES[2]), affine=affine)
    view, _, matrices = RandPairedViews(ROIS[2], pixdim=2.5).set_random_state(seed=0)(img)
    assert matrices.shape == (2, 3, 3)
    assert view.affine.shape == (4, 4)
    assert torch.equal(view.affine[[0, 1, 3]][:, [0, 1, 3]], matrices[0])
    assert view.affine[2].tolist() == [0, 0, 5, 0]
    coronal = MetaTensor(img.as_tensor(), affine=affine[[0, 2, 1, 3]])
    with pytest.raises(ValueError, match="not that of the first two world axes"):
        RandPairedViews(ROIS[2], pixdim=2.5)(coronal)
    RandPairedViews(ROIS[2])(coronal)


def test_an_image_without_affine_gets_the_matrix() -> None:
    view, other, matrices = RandPairedViews(ROIS[2]).set_random_state(seed=0)(np.zeros((1, *SIZES[2])))
    for result, matrix in zip((view, other), matrices):
        assert torch.equal(result.affine[[0, 1, 3]][:, [0, 1, 3]], matrix)


def test_no_memory_is_shared_where_nothing_is_resized() -> None:
    img = MetaTensor(torch.rand(1, *ROIS[3]))
    before = img.clone()
    out = RandPairedViewsd(["image", "label"], ROIS[3], (1, 1), flip_prob=0, mode=("linear", "nearest"))(
        {"image": img, "label": img}
    )
    assert all(torch.equal(out[key], before) for key in ("image", "image_2", "label", "label_2"))
    for value in out.values():
        value.zero_()
    assert torch.equal(img, before)


# ---- draws: an independent reference in plain loops


def reference_draw(
    state: np.random.RandomState, size: Any, roi: Any, pairs: list[tuple[float, float]], unit: Any, **options: Any
) -> tuple[Any, Any, Any, bool]:
    """`start`, `extent`, `flip`, and whether the fifty attempts were in vain; every number is drawn by itself."""
    n, shared = len(size), len(pairs) == 1
    fits = [size[a] / (unit[a] * roi[a]) for a in range(n)]
    high = []
    for a, (lo, hi) in enumerate(pairs):
        high.append(max(lo, min(hi, min(fits) if shared else fits[a])))
    together = float(state.uniform()) < options["overlap_prob"]
    flip = [[bool(state.uniform() < options["flip_prob"]) for _ in range(n)] for _ in range(2)]
    start, extent = [], []
    for _ in range(50):
        factors = [[state.uniform() for _ in pairs] for _ in range(2)]
        extent = []
        for row in factors:
            scale = [lo + u * (hi - lo) for u, (lo, _), hi in zip(row, pairs, high)] * (n if shared else 1)
            extent.append([min(max(int(np.rint(scale[a] * unit[a] * roi[a])), 1), size[a]) for a in range(n)])
        room = [[size[a] - extent[v][a] for a in range(n)] for v in range(2)]

        def pick(low: list[int], top: list[int]) -> list[int]:
            return [int(state.randint(lo, hi + 1)) for lo, hi in zip(low, top)]

        if not together:
            start = [pick([0] * n, room[0]), pick([0] * n, room[1])]
            return start, extent, flip, False
        if options["placement"] == "seed":
            q = [int(state.randint(0, s)) for s in size]
            start = []
            for v in range(2):
                low = [max(0, q[a] - extent[v][a] + 1) for a in range(n)]
                start.append(pick(low, [min(room[v][a], q[a]) for a in range(n)]))
        else:
            first = pick([0] * n, room[0])
            low = [max(0, first[a] - extent[1][a] + 1) for a in range(n)]
            start = [first, pick(low, [min(room[1][a], first[a] + extent[0][a] - 1) for a in range(n)])]
        if iou_by_counting(start, extent) >= options["min_overlap"]:
            return start, extent, flip, False
    centre = [int(np.rint(start[0][a] + (extent[0][a] - extent[1][a]) / 2)) for a in range(n)]
    centre = [min(max(c, 0), size[a] - extent[1][a]) for a, c in enumerate(centre)]
    drawn = start[1]
    for sixteenths in range(16, -1, -1):
        moved = [int(np.rint(c + sixteenths / 16 * (s - c))) for c, s in zip(centre, drawn)]
        start = [start[0], moved]
        if iou_by_counting(start, extent) >= options["min_overlap"]:
            break
    return start, extent, flip, True


DEFAULTS: dict[str, Any] = {"overlap_prob": 1.0, "flip_prob": 0.5, "min_overlap": 0.1, "placement": "uniform"}
ONE, THREE = [(1.1, 1.4)], [(1.1, 1.4), (0.8, 1.2), (1.0, 1.0)]


@pytest.mark.parametrize(
    "size, roi, pairs, pixdim, options, in_vain",
    [
        ((40, 44, 60), (10, 12, 14), ONE, None, {}, False),
        ((40, 44, 60), (10, 12, 14), THREE, None, {}, False),
        ((40, 44), (10, 12), THREE[:2], None, {"flip_prob": 0.2}, False),
        ((12, 16, 16), (10, 12, 14), ONE, None, {}, False),  # the volume narrows the range
        ((12, 16, 15), (10, 12, 14), THREE, None, {}, False),
        ((40, 44, 60), (10, 12, 14), ONE, None, {"overlap_prob": 0.5, "min_overlap": 0.3}, False),
        ((40, 44, 60), (10, 12, 14), ONE, (2.0, 1.5, 3.0), {"min_overlap": 0.0, "placement": "seed"}, False),
        ((40, 44, 60), (10, 12, 14), THREE, (2.0, 1.5, 3.0), {"overlap_prob": 0.8, "placement": "seed"}, False),
        ((30, 34), (10, 12), [(0.8, 1.2)], (2.0, 1.5), {"overlap_prob": 0.8, "placement": "seed"}, False),
        ((200, 220, 260), (10, 12, 14), ONE, None, {"min_overlap": 0.48}, True),
        ((20, 22, 26), (10, 12, 14), ONE, None, {"min_overlap": 0.48, "placement": "seed"}, False),
    ],
)
def test_order_of_draws(size: Any, roi: Any, pairs: Any, pixdim: Any, options: dict[str, Any], in_vain: bool) -> None:
    spacing = (1.25, 1.7, 2.0)[: len(size)]
    unit = [1.0] * len(size) if pixdim is None else [p / s for p, s in zip(pixdim, spacing)]
    options = {**DEFAULTS, **options}
    scale_range = pairs[0] if len(pairs) == 1 else pairs
    transform = RandPairedViews(roi, scale_range, pixdim, **options).set_random_state(seed=7)
    state, fallbacks = np.random.RandomState(7), 0
    for _ in range(120):
        transform.randomize(size, spacing)
        start, extent, flip, fallback = reference_draw(state, size, roi, pairs, unit, **options)
        fallbacks += fallback
        assert transform.extent.tolist() == extent
        assert transform.start.tolist() == start
        assert transform.flip.tolist() == flip
        assert (transform.start >= 0).all()
        assert (transform.start + transform.extent <= np.array(size)).all()
        if options["overlap_prob"] == 1:
            # rounding the extents to whole voxels costs a little at the very bound
            assert view_iou(start[0], extent[0], start[1], extent[1]) >= options["min_overlap"] - 0.02
    assert fallbacks or not in_vain
    assert transform.R.randint(10**6) == state.randint(10**6)


def test_attributes_of_a_draw() -> None:
    array = RandPairedViews(ROIS[3]).set_random_state(seed=0)
    dictionary = RandPairedViewsd("image", ROIS[3]).set_random_state(seed=0)
    array(torch.zeros(1, *SIZES[3]))
    dictionary({"image": torch.zeros(1, *SIZES[3])})
    for name, kind in (("start", "i"), ("extent", "i"), ("flip", "b")):
        value = getattr(array, name)
        assert value.shape == (2, 3)
        assert value.dtype.kind == kind
        assert np.array_equal(value, getattr(dictionary, name))


@pytest.mark.parametrize("size, share", [((160, 256, 256), 0.73), ((5000, 5000, 5000), 0.26)])
@pytest.mark.parametrize("pairs", [(1.1, 1.4), [(1.1, 1.4)] * 3])
def test_share_of_attempts_that_succeed(size: tuple[int, ...], share: float, pairs: Any) -> None:
    transform = RandPairedViews(96, pairs, min_overlap=0.0).set_random_state(seed=0)
    hits = 0
    for _ in range(3000):
        transform.randomize(size)
        hits += view_iou(transform.start[0], transform.extent[0], transform.start[1], transform.extent[1]) >= 0.1
    assert hits / 3000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    "size, mean, quartiles, none",
    [((375, 220, 200), 0.49, (0.26, 0.52, 0.74), 0.15), ((90, 180, 190), 0.66, None, None)],
)
def test_overlaps_of_seed_placement(size: Any, mean: float, quartiles: Any, none: Any) -> None:
    """At 1.6 mm, 600 x 352 x 320 and 144 x 288 x 304 mm: shared voxels over those of the smaller box."""
    transform, shares = RandPairedViews(**SAM).set_random_state(seed=0), []
    for _ in range(4000):
        transform.randomize(size, (1.6, 1.6, 1.6))
        end = transform.start + transform.extent
        overlap = np.prod(np.clip(end.min(0) - transform.start.max(0), 0, None))
        shares.append(overlap / transform.extent.prod(1).min())
    assert np.mean(shares) == pytest.approx(mean, abs=0.03)
    if quartiles:
        np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), quartiles, atol=0.03)
        assert np.mean(np.array(shares) == 0) == pytest.approx(none, abs=0.03)


def test_one_factor_or_one_per_axis() -> None:
    size, roi = (500, 500, 500), np.array([100, 120, 140])
    for pairs, shared in (((1.1, 1.4), True), ([[1.1, 1.4]], True), ([[1.1, 1.4]] * 3, False)):
        transform = RandPairedViews(roi.tolist(), pairs).set_random_state(seed=0)
        spread = []
        for _ in range(20):
            transform.randomize(size)
            spread.append(np.ptp(transform.extent / roi, axis=1).max())
        assert (max(spread) < 0.01) if shared else (max(spread) > 0.1)


def test_flips_per_axis() -> None:
    transform, drawn = RandPairedViews(10, flip_prob=(1, 0, 0.5)).set_random_state(seed=0), []
    for _ in range(50):
        transform.randomize((30, 30, 30))
        drawn.append(transform.flip)
    assert np.concatenate(drawn)[:, 0].all()
    assert not np.concatenate(drawn)[:, 1].any()
    assert 0 < np.concatenate(drawn)[:, 2].mean() < 1
    assert any(flip[0, 2] != flip[1, 2] for flip in drawn)


# ---- small volumes


CASES_OF_SIZE: list[tuple[dict[str, Any], Any, tuple[int, ...]]] = [
    ({"roi_size": (10, 12, 14)}, None, (11, 13, 15)),
    ({"roi_size": (10, 12, 14), "scale_range": [(1.1, 1.4), (0.5, 2.0), (1, 1)]}, None, (11, 6, 14)),
    ({"roi_size": 10}, None, (11, 11)),
    ({**SAM, "roi_size": (8, 24, 22)}, (1.6, 1.7, 3.0), (8, 23, 12)),
]


@pytest.mark.parametrize("args, spacing, least", CASES_OF_SIZE)
def test_smallest_volume(args: dict[str, Any], spacing: Any, least: tuple[int, ...]) -> None:
    ndim = len(least)
    affine = torch.diag(torch.tensor([*(spacing or (1,) * ndim), 1.0], dtype=torch.float64))
    transform = RandPairedViewsd("scan", **args).set_random_state(seed=0)
    for _ in range(200):
        out = transform({"scan": MetaTensor(torch.zeros(1, *least), affine=affine)})
        assert (transform.start >= 0).all()
        assert (transform.start + transform.extent <= np.array(least)).all()
        assert out["scan"].shape == out["scan_2"].shape
    for _ in range(200):
        transform.randomize([5 * s for s in least], spacing)
    state = transform.transform.R.get_state()[1:3]
    for axis in range(ndim):
        less = [s - (a == axis) for a, s in enumerate(least)]
        message = rf"'scan' has spatial shape \({', '.join(map(str, less))}\).*\({', '.join(map(str, least))}\) voxels"
        with pytest.raises(ValueError, match=f"{message}.*SpatialPadd"):
            transform({"scan": MetaTensor(torch.zeros(1, *less), affine=affine)})
        with pytest.raises(ValueError, match="SpatialPadd"):
            transform.randomize(less, spacing)
    assert np.array_equal(transform.transform.R.get_state()[1], state[0]), "a volume that is refused costs no draw"
    assert transform.transform.R.get_state()[2] == state[1]


def test_views_never_leave_the_volume() -> None:
    for placement, overlap_prob, size in product(("uniform", "seed"), (0.0, 1.0), ((17, 20, 23), (60, 61, 62))):
        transform = RandPairedViews(ROIS[3], overlap_prob=overlap_prob, placement=placement).set_random_state(seed=0)
        for _ in range(500):
            transform.randomize(size)
            assert (transform.start >= 0).all()
            assert (transform.extent >= 1).all()
            assert (transform.start + transform.extent <= np.array(size)).all()


# ---- keys


def test_masks_stay_on_their_image() -> None:
    """A mask that is the rounded image is the rounded view, up to the half voxel of the nearest neighbour."""
    size = (40, 44, 48)
    index = places(size, torch.eye(4, dtype=torch.float64))
    item = {"image": MetaTensor(index.float()), "label": MetaTensor(index.to(torch.uint8)), "mask": index > 20}
    transform = RandPairedViewsd(["image", "label", "mask"], ROIS[3], mode=["linear", "nearest", "nearest"])
    for _ in range(5):
        out = transform(item)
        for suffix in ("", "_2"):
            assert (out[f"label{suffix}"].dtype, out[f"mask{suffix}"].dtype) == (torch.uint8, torch.bool)
            label, image = out[f"label{suffix}"].as_tensor(), out[f"image{suffix}"].as_tensor()
            assert (label - image).abs().max() <= 0.5 + 1e-4
            assert torch.equal(out[f"mask{suffix}"], label > 20)
            assert torch.equal(out[f"label{suffix}"].affine, out[f"image{suffix}"].affine)


def test_one_mode_for_all_keys() -> None:
    item = {"a": torch.arange(400.0).reshape(1, 20, 20), "b": torch.arange(400).reshape(1, 20, 20)}
    out = RandPairedViewsd(["a", "b"], 10, mode="nearest").set_random_state(seed=0)(item)
    assert out["b"].dtype == torch.int64
    assert torch.equal(out["a"].long(), out["b"])
    for mode, message in ((["linear", "nearest", "nearest"], "length|number"), ("bilinear", "mode must be")):
        with pytest.raises(ValueError, match=message):
            RandPairedViewsd(["a", "b"], 10, mode=mode)


def test_modes_follow_their_keys_where_one_is_missing() -> None:
    transform = RandPairedViewsd(["a", "b"], 10, mode=("linear", "nearest"), allow_missing_keys=True)
    out = transform({"b": torch.zeros(1, 20, 20, dtype=torch.int16)})
    assert out["b"].dtype == torch.int16
    assert set(out) == {"b", "b_2", "view_affine"}


def test_keys_must_agree() -> None:
    affine = affine_of("oblique", 3)
    volume = MetaTensor(torch.zeros(1, *SIZES[3]), affine=affine)
    transform = RandPairedViewsd(["a", "b"], ROIS[3]).set_random_state(seed=0)
    with pytest.raises(ValueError, match=r"'a' has spatial shape \(17, 20, 23\) and 'b' \(17, 20, 22\)"):
        transform({"a": volume, "b": volume[..., :-1]})
    for change in (torch.diag(torch.tensor([1, 1, 1.01, 1])), torch.diag(torch.tensor([-1.0, 1, 1, 1]))):
        with pytest.raises(ValueError, match=r"'a' has affine .* and 'b'"):
            transform({"a": volume, "b": MetaTensor(volume.as_tensor(), affine=affine @ change.double())})
    shifted = affine.clone()
    shifted[1, 3] += 0.05
    with pytest.raises(ValueError, match=r"'a' has affine .* and 'b'"):
        transform({"a": volume, "b": MetaTensor(volume.as_tensor(), affine=shifted)})
    assert transform.start is None
    transform({"a": volume, "b": MetaTensor(volume.as_tensor(), affine=affine.float().double())})  # as read from a file
    transform({"a": volume, "b": volume.as_tensor()})


def test_written_keys_must_differ() -> None:
    for keys in (["image", "image_2"], ["view_affine"]):
        with pytest.raises(ValueError, match="would both write"):
            RandPairedViewsd(keys, 10)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_collation(num_workers: int) -> None:
    items = [{"image": placed_volume(SIZES[3], affine_of("permuted", 3))} for _ in range(4)]
    transform = RandPairedViewsd("image", ROIS[3], pixdim=1.3)
    dataset = KeyedDataset(Dataset(items, Compose([transform])), seed=1)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=num_workers))
    for batch in batches:
        assert type(batch["view_affine"]) is torch.Tensor
        assert (batch["view_affine"].shape, batch["view_affine"].dtype) == ((2, 2, 4, 4), torch.float64)
        for image, matrix in zip(batch["image_2"].as_tensor(), batch["view_affine"][:, 1]):
            assert (image - places(ROIS[3], matrix))[:, 1:-1, 1:-1, 1:-1].abs().max() < 1e-3
    again = KeyedDataset(Dataset(items, Compose([RandPairedViewsd("image", ROIS[3], pixdim=1.3)])), seed=1)
    expected = torch.stack([again[i]["view_affine"] for i in range(4)])
    assert torch.equal(torch.cat([batch["view_affine"] for batch in batches]), expected)


# ---- repeats and errors


def test_randomize_false() -> None:
    img = torch.rand(1, *SIZES[3])
    array, dictionary = RandPairedViews(ROIS[3]), RandPairedViewsd("image", ROIS[3])
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})
    assert all(torch.equal(a, b) for a, b in zip(first, array(img, randomize=False)))
    out["view_affine"].zero_()
    assert torch.equal(dictionary({"image": img}, randomize=False)["image_2"], out["image_2"])
    assert dictionary({"image": img}, randomize=False)["view_affine"].any()
    applied = array.apply(img, array.start.tolist(), array.extent.tolist(), array.flip.tolist())
    assert all(torch.equal(a, b) for a, b in zip(first, applied))
    with pytest.raises(ValueError, match="does not lie inside"):
        array.start[0, 0] = 17
        array(img, randomize=False)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"scale_range": (1.4, 1.1)}, "0 < lo <= hi"),
        ({"scale_range": (0, 1.1)}, "0 < lo <= hi"),
        ({"scale_range": (-1.0, 1.1)}, "0 < lo <= hi"),
        ({"scale_range": (1.0, float("nan"))}, "0 < lo <= hi"),
        ({"scale_range": (1.0, 1.1, 1.2)}, "one pair"),
        ({"scale_range": [(1.0, 1.1)] * 2}, "2 pairs for 3"),
        ({"scale_range": [(1.0, 1.1)] * 4}, "4 pairs for 3"),
        ({"min_overlap": 0.5}, r"min_overlap 0.5 cannot be promised.*\(1.1, 1.4\).*0.485"),
        ({"min_overlap": -0.1}, r"min_overlap must lie in \[0, 1\]"),
        ({"min_overlap": 1.1}, r"min_overlap must lie in \[0, 1\]"),
        ({"overlap_prob": 1.1}, r"overlap_prob must lie in \[0, 1\]"),
        ({"overlap_prob": -0.1}, r"overlap_prob must lie in \[0, 1\]"),
        ({"flip_prob": 1.5}, r"flip_prob must lie in \[0, 1\]"),
        ({"flip_prob": (0.5, 0.5, -1)}, r"flip_prob must lie in \[0, 1\]"),
        ({"flip_prob": (0.5, 0.5)}, r"flip_prob \(0.5, 0.5\) does not have one entry"),
        ({"pixdim": (1, 2)}, r"pixdim \(1, 2\) does not have one entry"),
        ({"pixdim": (1, 2, 0)}, "pixdim must be positive"),
        ({"roi_size": (10, 0, 10)}, "roi_size must be whole numbers"),
        ({"roi_size": (10, 10, 10, 10)}, "2 or 3 spatial axes, got 4"),
        ({"placement": "centre"}, "unknown placement 'centre'.*uniform.*seed"),
    ],
)
def test_constructor_errors(args: dict[str, Any], message: str) -> None:
    args = {"roi_size": (10, 12, 14), **args}
    with pytest.raises(ValueError, match=message):
        RandPairedViews(**args)
    with pytest.raises(ValueError, match=message):
        RandPairedViewsd("image", **args)


def test_overlap_that_can_be_promised() -> None:
    bound = (1.1 / 1.4) ** 3
    RandPairedViews((10, 12, 14), min_overlap=bound)
    RandPairedViews((10, 12), min_overlap=0.6)
    RandPairedViews((10, 12, 14), min_overlap=0.9, overlap_prob=0.0)
    RandPairedViews((10, 12, 14), (1.2, 1.2), min_overlap=1.0).randomize((30, 30, 30))
    with pytest.raises(ValueError, match="cannot be promised"):
        RandPairedViews((10, 12, 14), min_overlap=bound + 1e-6)
    with pytest.raises(ValueError, match="cannot be promised"):
        RandPairedViews((10, 12, 14), [(1.1, 1.4), (1, 1), (1, 1)], min_overlap=0.8)
    unknown = RandPairedViews(10, min_overlap=0.55)  # possible in 2D only
    unknown.randomize((30, 30))
    with pytest.raises(ValueError, match="cannot be promised"):
        unknown.randomize((30, 30, 30))
    with pytest.raises(ValueError, match="cannot be promised"):
        RandPairedViews(10, min_overlap=0.7)


def test_volumes_that_pixdim_refuses() -> None:
    transform = RandPairedViewsd("scan", ROIS[3], pixdim=1.0).set_random_state(seed=0)
    for img in (torch.zeros(1, *SIZES[3]), np.zeros((1, *SIZES[3]))):
        with pytest.raises(ValueError, match="'scan' carries no affine"):
            transform({"scan": img})
    sheared = torch.eye(4, dtype=torch.float64)
    sheared[0, 1] = 2e-3
    with pytest.raises(ValueError, match="axes of 'scan' are not orthogonal"):
        transform({"scan": MetaTensor(torch.zeros(1, *SIZES[3]), affine=sheared)})
    sheared[0, 1] = 5e-4
    transform({"scan": MetaTensor(torch.zeros(1, *SIZES[3]), affine=sheared)})
    with pytest.raises(ValueError, match="'scan' has voxels of"):
        flat = torch.diag(torch.tensor([1.0, 1, 0, 1], dtype=torch.float64))
        transform({"scan": MetaTensor(torch.zeros(1, *SIZES[3]), affine=flat)})
    with pytest.raises(ValueError, match="needs the spacing"):
        transform.randomize(SIZES[3])
    RandPairedViews(ROIS[3])(MetaTensor(torch.zeros(1, *SIZES[3]), affine=flat))  # without pixdim lengths do not matter


def test_other_numbers_of_axes() -> None:
    with pytest.raises(ValueError, match="2 or 3 spatial axes, got 1"):
        RandPairedViews(10)(torch.zeros(1, 30))
    with pytest.raises(ValueError, match="3 entries for 2"):
        RandPairedViews(ROIS[3])(torch.zeros(1, 30, 30))
