# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl.transforms import (
    feature_affine,
    nearest_correspondence,
    spacing_of,
    squared_distance,
    transform_points,
    view_matrix,
    voxel_index,
)
from monai_ssl.transforms.view_geometry import vector_like


def turn(angle: float, ndim: int) -> torch.Tensor:
    matrix = torch.eye(ndim, dtype=torch.float64)
    matrix[0, 0] = matrix[-1, -1] = np.cos(angle)
    matrix[0, -1], matrix[-1, 0] = -np.sin(angle), np.sin(angle)
    return matrix


def pair(ndim: int, seed: int) -> torch.Tensor:
    """Affines (2, n + 1, n + 1) of two views of one oblique volume far from the origin, axes permuted."""
    state = np.random.RandomState(seed)
    affine = torch.eye(ndim + 1, dtype=torch.float64)
    affine[:-1, :-1] = turn(0.4, ndim).flip(1) @ torch.diag(torch.tensor([1.5, 2.5, 0.8][:ndim], dtype=torch.float64))
    affine[:-1, -1] = torch.tensor([1500.0, -700.0, 90.0])[:ndim]
    views = [
        view_matrix(state.randint(0, 5, ndim), state.randint(5, 9, ndim), (5, 6, 7)[:ndim], state.rand(ndim) < 0.5)
        for _ in range(2)
    ]
    return torch.stack([affine @ view for view in views])


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 5)])
def test_voxel_index(size: tuple[int, ...]) -> None:
    index = voxel_index(size)
    assert index.dtype == torch.int64
    assert index.tolist() == [list(i) for i in np.ndindex(*size)]


def test_vector_like() -> None:
    out = vector_like(torch.zeros(2, 3, dtype=torch.float64), [1.5, -2])
    assert out.dtype == torch.float64
    assert out.tolist() == [1.5, -2]
    assert vector_like(torch.zeros(1, dtype=torch.int64), (6, 1)).dtype == torch.int64


def test_transform_points() -> None:
    matrix = torch.tensor([[0, -2, 5], [3, 0, -1], [0, 0, 1]], dtype=torch.float64)
    out = transform_points(matrix, torch.tensor([[0, 0], [1, 2]]))
    assert out.dtype == torch.float64
    assert out.tolist() == [[5, -1], [1, 2]]
    batch = torch.stack([matrix, torch.eye(3, dtype=torch.float64)])
    points = torch.rand(4, 1, 7, 2, generator=torch.manual_seed(0))
    out = transform_points(batch, points)
    assert out.shape == (4, 2, 7, 2)
    for b, m, p in np.ndindex(4, 2, 7):
        homogeneous = torch.cat([points[b, 0, p].double(), torch.ones(1, dtype=torch.float64)])
        torch.testing.assert_close(out[b, m, p], (batch[m] @ homogeneous)[:2])


def test_spacing_of() -> None:
    affine = torch.tensor([[0, -4, 7], [3, 3, 9], [0, 0, 1]], dtype=torch.float64)
    assert spacing_of(affine).tolist() == [3, 5]
    assert spacing_of(torch.stack([affine, 2 * affine])[:, None]).tolist() == [[[3, 5]], [[6, 10]]]
    assert torch.allclose(spacing_of(pair(3, 0)), spacing_of(pair(3, 0)).abs())


def test_feature_affine_values() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    fine = feature_affine(eye, (32, 96, 96), (16, 48, 48))
    assert fine.tolist() == [[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]]
    coarse = feature_affine(eye, (32, 96, 96), (8, 6, 6))
    assert coarse.tolist() == [[4, 0, 0, 1.5], [0, 16, 0, 7.5], [0, 0, 16, 7.5], [0, 0, 0, 1]]


@pytest.mark.parametrize("ndim", [2, 3])
def test_feature_affine_is_the_resampled_coordinate(ndim: int) -> None:
    view, cells = (12, 8, 15)[:ndim], (3, 8, 5)[:ndim]
    affines = torch.stack([pair(ndim, seed) for seed in range(3)])  # (3, 2, n + 1, n + 1)
    mapped = feature_affine(affines, view, cells)
    assert mapped.shape == affines.shape
    for affine, own in zip(affines.flatten(0, 1), mapped.flatten(0, 1)):
        world = transform_points(affine, voxel_index(view)).T.reshape(1, ndim, *view)
        mode = "trilinear" if ndim == 3 else "bilinear"
        coarse = F.interpolate(world, size=cells, mode=mode, align_corners=False)[0].flatten(1).T
        torch.testing.assert_close(transform_points(own, voxel_index(cells)), coarse, atol=1e-9, rtol=0)


@pytest.mark.parametrize("view, cells", [((12, 9), (4, 4)), ((12, 9), (4, 3, 3)), ((4, 4), (8, 4)), ((4, 4), (0, 4))])
def test_feature_affine_errors(view: Any, cells: Any) -> None:
    with pytest.raises(ValueError) as error:
        feature_affine(torch.eye(3), view, cells)
    assert str(view) in str(error.value)
    assert str(cells) in str(error.value)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_correspondence_against_all_cells(ndim: int, autocast: bool) -> None:
    """Among all cells of the other map none lies nearer in mm, 1500 mm from the origin and under autocast too."""
    size = (5, 6, 7)[:ndim]
    affines = torch.stack([pair(ndim, seed) for seed in range(3)])
    with torch.autocast("cpu", enabled=autocast):
        index, nearest, distance = nearest_correspondence(affines, size)
    cells = prod(size)
    assert (index.shape, nearest.shape, distance.shape) == ((3, 2, cells, ndim), (3, 2, cells), (3, 2, cells))
    assert (index.dtype, nearest.dtype, distance.dtype) == (torch.float64, torch.int64, torch.float64)
    outside = 0
    for b, v, number in np.ndindex(3, 2, cells):
        world = affines[b, v] @ torch.tensor([*np.unravel_index(number, size), 1.0], dtype=torch.float64)
        others = [affines[b, 1 - v] @ torch.tensor([*i, 1.0], dtype=torch.float64) for i in np.ndindex(*size)]
        distances = (torch.stack(others) - world).norm(dim=1)
        assert float(distances.min()) == pytest.approx(float(distance[b, v, number]), abs=1e-9)
        assert float(distances[nearest[b, v, number]]) == pytest.approx(float(distances.min()), abs=1e-9)
        place = affines[b, 1 - v] @ torch.cat([index[b, v, number], torch.ones(1, dtype=torch.float64)])
        assert (place - world).abs().max() < 1e-9
        outside += bool((index[b, v, number] < 0).any())
    assert outside  # places beyond the other map are among them


def test_nearest_correspondence_in_half_precision_affines() -> None:
    """What an fp16 grid of positions would round by half a millimetre stays exact."""
    affine = torch.tensor([[2.0, 0, 1500], [0, 2, 1500], [0, 0, 1]], dtype=torch.float64)
    other = affine.clone()
    other[0, 2] += 0.6
    index, nearest, distance = nearest_correspondence(torch.stack([affine, other])[None], (4, 5))
    assert (2 * (index[0, 0, :, 0] - voxel_index((4, 5))[:, 0]) + 0.6).abs().max() < 1e-9
    assert torch.equal(nearest, torch.arange(20).expand(1, 2, 20))
    assert (distance - 0.6).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(5, 6), (4, 5, 6)])
def test_squared_distance(size: tuple[int, ...]) -> None:
    ndim = len(size)
    index = 6 * torch.rand(2, 3, 4, ndim, generator=torch.manual_seed(0), dtype=torch.float64) - 1
    spacing = torch.rand(2, 3, 1, ndim, generator=torch.manual_seed(1), dtype=torch.float64) + 0.5
    out = squared_distance(index, size, spacing)
    assert out.shape == (2, 3, 4, prod(size))
    for place in np.ndindex(2, 3, 4):
        for number, cell in enumerate(np.ndindex(*size)):
            mm = (index[place] - torch.tensor(cell)) * spacing[place[:2]][0]
            assert float(out[(*place, number)]) == pytest.approx(float((mm**2).sum()), abs=1e-9)


def test_squared_distance_by_hand() -> None:
    out = squared_distance(torch.tensor([[0.5, 1.0]]), (2, 3), torch.tensor([2.0, 3.0]))
    assert out.tolist() == [[10, 1, 10, 10, 1, 10]]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_squared_distance_forms_no_differences_of_coordinates() -> None:
    index = torch.rand(100, 3)
    with Largest() as largest:
        out = squared_distance(index, (8, 9, 10), torch.ones(3))
    assert largest.numel == out.numel() == 100 * 720


def test_no_value_is_read() -> None:
    """Tensors without values: whatever looked at one, or waited for a device, would fail."""
    index, nearest, distance = nearest_correspondence(torch.empty(2, 2, 4, 4, device="meta"), (5, 6, 7))
    assert (index.shape, nearest.shape, distance.shape) == ((2, 2, 210, 3), (2, 2, 210), (2, 2, 210))
    spacing = spacing_of(feature_affine(torch.empty(2, 2, 4, 4, device="meta"), (8, 8, 8), (4, 2, 8)))
    assert squared_distance(index, (5, 6, 7), spacing[:, :, None]).shape == (2, 2, 210, 210)
