# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter

from monai_ssl.transforms import (
    GridPatches,
    GridPatchesd,
    RandGridPatches,
    RandGridPatchesd,
    extract_patches,
    patch_grid,
)

from .index_images import AFFINE, crops, drawn_starts, index_image

# image, arguments of the grid, channels: 2D and 3D, per axis and for all, ints and floats
GEOMETRIES: list[tuple[tuple[int, ...], dict[str, Any], int]] = [
    ((14, 17, 19), {"grid_size": 3, "jitter": 0.25, "gap": 0.25}, 1),
    ((14, 17, 19), {"grid_size": (2, 1, 3), "jitter": (1, 3, 0), "gap": (2, 0.2, 1), "patch_size": (3, 5, 4)}, 3),
    ((14, 17), {"grid_size": (2, 3), "jitter": 1, "gap": 2}, 3),
    ((14, 17), {"grid_size": 4, "overlap": (2, 1), "jitter": 1}, 1),
]


def axis_starts(starts: torch.Tensor) -> list[list[int]]:
    """The starts along each axis, once it is sure that the grid is their product with the first axis slowest."""
    per_axis = [sorted(set(column)) for column in starts.T.tolist()]
    assert starts.tolist() == [list(row) for row in product(*per_axis)]
    return per_axis


def space_between(origin: torch.Tensor, size: tuple[int, ...], grid: tuple[int, ...]) -> torch.Tensor:
    """Free voxels between neighbours, for every axis along which they are neighbours."""
    cells = origin.reshape(*grid, len(grid))
    return torch.cat([cells.diff(dim=a)[..., a].flatten() - size[a] for a in range(len(grid))])


# ---- the grid


@pytest.mark.parametrize(
    "image, args, lowest, size, jitter",
    [
        ((14, 17), ((2, 3), None, 1, 2), [[1, 8], [1, 6, 11]], (4, 2), (1, 1)),
        ((24, 24), (4, None, 0, 0, 3), [[0, 5, 10, 15]] * 2, (8, 8), (0, 0)),
        ((128,) * 3, (3, None, 3, 0), [[0, 42, 84]] * 3, (39,) * 3, (3,) * 3),
        ((96,) * 3, (3, None, 0.125, 0.125), [[2, 34, 66]] * 3, (24,) * 3, (4,) * 3),
        ((128,) * 3, (3, None, 0.125, 0.125), [[2, 44, 86]] * 3, (32,) * 3, (5,) * 3),
        ((128, 128), (5, None, 0, 0, 128 // 6), [[0, 21, 42, 63, 84]] * 2, (42, 42), (0, 0)),
        ((14, 17, 19), ((2, 1, 3), (3, 5, 4), (1, 3, 0), (2, 0.2, 1)), [[1, 8], [4], [1, 7, 13]], (3, 5, 4), (1, 3, 0)),
        ((9,), (2, None, 1), [[0, 4]], (3,), (1,)),
    ],
)
def test_patch_grid(image: Any, args: Any, lowest: Any, size: Any, jitter: Any) -> None:
    starts, s, j = patch_grid(image, *args)
    assert starts.dtype == torch.int64
    assert axis_starts(starts) == lowest
    assert (s, j) == (size, jitter)


def test_fixed_starts_of_the_released_geometry() -> None:
    transform = GridPatches(3, jitter=3)
    transform(torch.zeros(1, 128, 128, 128))
    assert axis_starts(transform.starts) == [[1, 43, 85]] * 3
    even = GridPatchesd("image", (2, 3), jitter=(2, 3))({"image": torch.zeros(1, 14, 17)})
    assert axis_starts(even["image_origin"]) == [[1, 8], [1, 6, 11]]


@pytest.mark.parametrize(
    "image, args, low, high",
    [
        ((14, 17), ((2, 3), None, 1, 2), 2, 4),
        ((13, 17, 19), (3, None, 2, 1), 1, 5),
        ((31, 29), (3, None, 0.3, 0.2), 1, 8),
    ],
)
def test_gap_is_a_guarantee(image: Any, args: Any, low: int, high: int) -> None:
    transform = RandGridPatches(*args).set_random_state(seed=0)
    size = patch_grid(image, *args)[1]
    grid = args[0] if isinstance(args[0], tuple) else (args[0],) * len(image)
    spaces = []
    for _ in range(200):
        transform.randomize(image)
        spaces.append(space_between(transform.starts, size, grid))
    joined = torch.cat(spaces)
    assert (joined.min(), joined.max()) == (low, high)


# ---- draws


@pytest.mark.parametrize("image, args, _", GEOMETRIES)
def test_draws(image: Any, args: Any, _: int) -> None:
    transform = RandGridPatches(**args).set_random_state(seed=7)
    state = np.random.RandomState(7)
    lowest, _, jitter = patch_grid(image, **args)
    for _ in range(2):
        transform.randomize(image)
        assert transform.starts.tolist() == drawn_starts(state, lowest, jitter)
        assert transform.starts.dtype == torch.int64
    assert transform.R.randint(1000) == state.randint(1000)
    vector = np.random.RandomState(7).randint(0, np.array(jitter) + 1, size=(len(lowest), len(image)))
    assert torch.equal(
        RandGridPatches(**args).set_random_state(seed=7)(index_image(image)),
        crops(index_image(image), lowest + torch.tensor(vector), patch_grid(image, **args)[1]),
    )


def test_all_shifts_are_drawn() -> None:
    transform = RandGridPatches((2, 3), jitter=(2, 0)).set_random_state(seed=0)
    seen = []
    for _ in range(60):
        transform.randomize((14, 17))
        seen.append(transform.starts - patch_grid((14, 17), (2, 3), None, (2, 0))[0])
    assert [sorted(set(column)) for column in torch.cat(seen).T.tolist()] == [[0, 1, 2], [0]]


# ---- patches


@pytest.mark.parametrize("image, args, channels", GEOMETRIES)
def test_patches_are_the_right_voxels(image: Any, args: Any, channels: int) -> None:
    img = index_image(image, channels)
    lowest, size, jitter = patch_grid(image, **args)
    for starts in (lowest, lowest + torch.tensor(jitter)):
        expected = crops(img, starts, size)
        assert torch.equal(RandGridPatches(**args).apply(img, starts), expected)
        assert torch.equal(GridPatches(**args).apply(img.numpy(), starts), expected)
        assert torch.equal(extract_patches(img, starts, size), expected)
    for cls in (RandGridPatchesd, GridPatchesd):
        out = cls("image", **args)({"image": img, "name": "a.nii.gz"})
        assert set(out) == {"image", "image_origin", "name"}
        assert torch.equal(out["image"], crops(img, out["image_origin"], size))
        assert type(out["image_origin"]) is torch.Tensor
        assert out["image_origin"].dtype == torch.int64
        assert out["image"].is_contiguous()


@pytest.mark.parametrize("cls", [GridPatches, RandGridPatches])
def test_images_of_different_size_one_after_the_other(cls: Any) -> None:
    transform = cls((2, 3), gap=1)
    for image in ((14, 17), (9, 20), (14, 17)):
        starts, size, _ = patch_grid(image, (2, 3), gap=1)
        img = index_image(image)
        assert torch.equal(transform(img), crops(img, starts, size))


def test_extract_patches_is_plain_and_keeps_gradients() -> None:
    img = index_image((5, 6, 7), 2).requires_grad_()
    patches = extract_patches(MetaTensor(img.detach()), torch.tensor([[0, 1, 2], [3, 0, 4]]), (2, 4, 3))
    assert type(patches) is torch.Tensor
    assert patches.shape == (2, 2, 2, 4, 3)
    extract_patches(img, torch.tensor([[0, 1, 2], [1, 1, 2]]), 2).sum().backward()
    assert img.grad is not None
    assert img.grad[0, :, 1, 2].tolist() == [1, 2, 1, 0, 0]


def test_strided_and_read_only_images() -> None:
    img = index_image((14, 17)).numpy()
    img.flags.writeable = False
    starts = patch_grid((14, 17), 2)[0]
    for memory_format in (torch.channels_last, torch.contiguous_format):
        assert GridPatches(2)(torch.rand(2, 14, 17, 19).to(memory_format=memory_format)).is_contiguous()
    for given in (img, img[:, ::-1], torch.tensor(img).transpose(1, 2).contiguous().transpose(1, 2)):
        patches = GridPatches(2)(given)
        assert torch.equal(patches, crops(torch.tensor(np.array(given)), starts, (7, 8)))
        assert patches.is_contiguous()


def test_constant_volume_gives_equal_patches() -> None:
    patches = RandGridPatches(3, jitter=0.125, gap=0.125)(torch.full((2, 24, 25, 26), 0.3))
    assert torch.equal(patches, patches[:1].expand_as(patches))


def test_affine() -> None:
    img = MetaTensor(index_image((14, 17, 19)), affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    out = RandGridPatchesd("image", 2, jitter=2, gap=1).set_random_state(seed=2)({"image": img})
    assert torch.equal(out["image"].affine, AFFINE)
    assert out["image"].meta["filename_or_obj"] == "a.nii.gz"
    assert out["image"].applied_operations == []
    patch, translate = out["image"].as_tensor()[5], torch.eye(4, dtype=torch.float64)
    translate[:3, 3] = out["image_origin"][5]
    voxel = (img.as_tensor()[0] == patch[0, 1, 2, 3]).nonzero()[0]
    one, other = torch.tensor([*voxel, 1]).double(), torch.tensor([1, 2, 3, 1]).double()
    torch.testing.assert_close(AFFINE @ one, AFFINE @ translate @ other)


@pytest.mark.parametrize("cls", [GridPatches, RandGridPatches])
def test_no_memory_shared_even_for_one_patch(cls: Any) -> None:
    img = index_image((5, 6, 7))
    cls(1)(img).zero_()
    cls(1)(img.numpy()).zero_()
    assert torch.equal(img, index_image((5, 6, 7)))


# ---- leaks: what jitter, gaps and overlap are for


def shares_voxels(a: torch.Tensor, b: torch.Tensor, size: tuple[int, ...]) -> bool:
    return all(abs(int(p) - int(q)) < s for p, q, s in zip(a, b, size))


@pytest.mark.parametrize(
    "image, args, skip, leak",
    [
        ((48, 49, 50), {"jitter": 0.125, "gap": 0.125}, 0, False),
        ((64, 66), {"overlap": (64 // 5, 66 // 5)}, 1, False),
        ((64, 66), {"overlap": (64 // 5, 66 // 5)}, 0, True),
    ],
)
def test_target_rows_share_voxels_with_rows_behind_only_with_overlap(
    image: Any, args: Any, skip: int, leak: bool
) -> None:
    n = 4  # rows 0 and 1 are context of prediction along axis 0, the target begins `skip` rows further on
    transform = RandGridPatches(n, **args).set_random_state(seed=0)
    size = patch_grid(image, n, **args)[1]
    found = False
    for _ in range(5):
        transform.randomize(image)
        rows = transform.starts.reshape(n, -1, len(image))
        behind, ahead = rows[:2].flatten(0, 1), rows[2 + skip :].flatten(0, 1)
        found |= any(shares_voxels(a, b, size) for a in behind for b in ahead)
    assert found == leak


def face_correlation(img: torch.Tensor, transform: RandGridPatches, grid: int = 3) -> float:
    """Mean correlation of the faces that neighbours turn to each other, where they lie opposite."""
    patches = transform(img)[:, 0].as_tensor()
    n = grid
    origin, values = transform.starts.reshape(n, n, n, 3), patches.reshape(n, n, n, *patches.shape[1:])
    size, correlations = patches.shape[1:], []
    for axis, cell in product(range(3), product(range(n), repeat=3)):
        if cell[axis] == n - 1:
            continue
        other = tuple(c + (a == axis) for a, c in enumerate(cell))
        one, two = values[cell].select(axis, size[axis] - 1), values[other].select(axis, 0)
        shift = [int(origin[other][a] - origin[cell][a]) for a in range(3) if a != axis]
        left = tuple(slice(max(d, 0), s + min(d, 0)) for d, s in zip(shift, one.shape))
        right = tuple(slice(max(-d, 0), s + min(-d, 0)) for d, s in zip(shift, one.shape))
        pair = torch.stack([one[left].flatten(), two[right].flatten()])
        correlations.append(float(torch.corrcoef(pair)[0, 1]))
    assert len(correlations) == 54
    return float(np.mean(correlations))


@pytest.mark.parametrize("jitter, gap, low, high", [(0.125, 0.125, -0.05, 0.05), (0, 0, 0.7, 1)])
def test_facing_faces_of_smooth_noise(jitter: float, gap: float, low: float, high: float) -> None:
    noise = torch.randn(1, 1, 96, 96, 96, generator=torch.Generator().manual_seed(0))
    smooth = GaussianFilter(3, 1.0)(noise)[0]
    transform = RandGridPatches(3, jitter=jitter, gap=gap).set_random_state(seed=0)
    assert low < face_correlation(smooth, transform) < high


# ---- repeats, keys, errors


def test_randomize_false_repeats_the_last_draw() -> None:
    img = index_image((14, 17, 19))
    array = RandGridPatches(2, jitter=2).set_random_state(seed=0)
    dictionary = RandGridPatchesd("image", 2, jitter=2).set_random_state(seed=0)
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})
    assert torch.equal(array(img, randomize=False), first)
    repeated = dictionary({"image": img}, randomize=False)
    assert all(torch.equal(out[key], repeated[key]) for key in out)
    assert torch.equal(out["image"], first)
    assert torch.equal(out["image_origin"], array.starts)
    out["image_origin"].zero_()
    assert torch.equal(dictionary({"image": img}, randomize=False)["image_origin"], array.starts)
    assert not torch.equal(array(img), first)


@pytest.mark.parametrize("cls", [GridPatchesd, RandGridPatchesd])
def test_keys(cls: Any) -> None:
    img = index_image((14, 17))
    out = cls(["ct", "pet"], 2, jitter=1)({"ct": img, "pet": 2 * img})
    assert torch.equal(2 * out["ct"], out["pet"])
    assert torch.equal(out["ct_origin"], out["pet_origin"])
    out["ct_origin"].zero_()
    assert out["pet_origin"].any()
    with pytest.raises(ValueError, match=r"'ct' has spatial shape \(14, 17\) and 'pet' \(17, 14\)"):
        cls(["ct", "pet"], 2)({"ct": img, "pet": img.transpose(1, 2)})
    with pytest.raises(ValueError, match="image_origin"):
        cls(["image", "image_origin"], 2)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"jitter": True}, "jitter must be"),
        ({"jitter": np.True_}, "jitter must be"),
        ({"jitter": -1}, "jitter must be"),
        ({"jitter": 1.0}, "jitter must be"),
        ({"jitter": (0, -0.1)}, "jitter must be"),
        ({"jitter": float("nan")}, "jitter must be"),
        ({"jitter": "1"}, "jitter must be"),
        ({"gap": False}, "gap must be"),
        ({"gap": -0.5}, "gap must be"),
        ({"gap": 1.5}, "gap must be"),
        ({"overlap": True}, "overlap must be"),
        ({"overlap": -1}, "overlap must be"),
        ({"overlap": 0.5}, "overlap must be"),
        ({"overlap": 1, "gap": 1}, "exclude each other"),
        ({"overlap": (0, 1), "gap": 0.1}, "exclude each other"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"patch_size": True}, "patch_size must be"),
        ({"grid_size": 0}, "grid_size must be"),
        ({"grid_size": (2, 2.0)}, "grid_size must be"),
        ({"grid_size": (2, 2), "jitter": (1, 1, 1)}, "3 entries for 2 spatial axes|2 entries for 3 spatial axes"),
    ],
)
def test_argument_errors(args: Any, message: str) -> None:
    args = {"grid_size": 2, **args}
    for build in (
        lambda: GridPatches(**args),
        lambda: RandGridPatches(**args),
        lambda: GridPatchesd("image", **args),
        lambda: RandGridPatchesd("image", **args),
        lambda: patch_grid((14, 17), **args),
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    "args, message",
    [
        ({"grid_size": (2, 18)}, r"axis 1 of length 17 in 18 cells .*patch of size 0 "),
        ({"grid_size": 2, "patch_size": (7, 9)}, r"axis 1 of length 17 in 2 cells .*patch of size 9 "),
        ({"grid_size": 2, "patch_size": 6, "jitter": (1, 2), "gap": 1}, r"axis 0 of length 14 in 2 cells .*size 6 "),
        ({"grid_size": 2, "jitter": (3, 4), "gap": 4}, r"axis 0 of length 14 in 2 cells .*size 0 "),
        ({"grid_size": 2, "overlap": 15}, r"axis 0 of length 14 in 2 cells"),
        ({"grid_size": (2, 2, 2)}, r"grid_size \(2, 2, 2\) has 3 entries for 2 spatial axes"),
    ],
)
def test_patches_that_do_not_fit(args: Any, message: str) -> None:
    transform = RandGridPatches(**args).set_random_state(seed=0)
    for call in (transform, GridPatches(**args), lambda img: patch_grid(img.shape[1:], **args)):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(1, 14, 17))
    assert transform.starts is None


@pytest.mark.parametrize(
    "starts, message",
    [
        ([[0, 0, 0]], r"must be \(P, 2\)"),
        ([0, 0], r"must be \(P, 2\)"),
        (np.zeros((0, 2)), r"must be \(P, 2\)"),
        ([[0, -1]], "leave the image"),
        ([[8, 0]], "leave the image"),
    ],
)
def test_starts_outside_are_refused(starts: Any, message: str) -> None:
    for cls in (GridPatches, RandGridPatches):
        with pytest.raises(ValueError, match=message):
            cls(2).apply(torch.zeros(1, 14, 17), torch.tensor(starts))
