# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch
from known_transforms import AFFINE, GRID, SIZE, rough, world
from torch import Tensor

from monai_ssl.apps.registration import voxel_sampling
from monai_ssl.apps.registration.displacements import (
    compose_displacement,
    invert_displacement,
    point_mapping,
    steps_on_grid,
)
from monai_ssl.apps.registration.voxel_sampling import fill_voxels, resample, sample_voxels
from monai_ssl.transforms.view_geometry import transform_points


def slow_linear(values: Tensor, place: list[float]) -> Tensor:
    """One place inside or beyond an image (C, *size), the border continuing."""
    total = torch.zeros(len(values), dtype=values.dtype)
    inside = [min(max(p, 0.0), s - 1.0) for p, s in zip(place, values.shape[1:])]
    for corner in itertools.product((0, 1), repeat=len(place)):
        cell = [min(int(p) + c, s - 1) for p, c, s in zip(inside, corner, values.shape[1:])]
        weight = 1.0
        for p, c in zip(inside, corner):
            weight *= (p - int(p)) if c else 1 - (p - int(p))
        total += weight * values[(slice(None), *cell)]
    return total


@pytest.mark.parametrize("size", [(4, 5), (3, 5, 4), (3, 1, 4)])
def test_samples_are_those_of_plain_loops(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, *size, generator=generator, dtype=torch.float64)
    index = torch.rand(60, len(size), generator=generator, dtype=torch.float64) * (torch.tensor(size) + 2) - 1.5
    expected = torch.stack([slow_linear(values, place) for place in index.tolist()], 1)
    torch.testing.assert_close(sample_voxels(values, index), expected)
    inside = torch.tensor([all(-0.5 <= p < s - 0.5 for p, s in zip(place, size)) for place in index.tolist()])
    beyond = torch.tensor([7.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(
        sample_voxels(values, index, beyond=beyond), torch.where(inside, expected, beyond[:, None])
    )
    assert 5 < int(inside.sum()) < 55


def test_the_nearest_voxel_of_labels() -> None:
    labels = torch.arange(5)[None] * 10
    index = torch.tensor([-9, -0.5, 0.49, 0.5, 1.5, 2.49, 3.5, 4.4, 9], dtype=torch.float64)[:, None]
    found = sample_voxels(labels[..., None], torch.cat([index, torch.zeros_like(index)], 1), "nearest")
    assert found.dtype == torch.int64
    assert found[0].tolist() == [0, 0, 0, 10, 20, 20, 40, 40, 40]
    outside = sample_voxels(
        labels[..., None], torch.cat([index, torch.zeros_like(index)], 1), "nearest", torch.tensor([-1])
    )
    assert outside[0].tolist() == [-1, 0, 0, 10, 20, 20, 40, 40, -1]


def test_voxels_are_filled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    size, sizes = (3, 4, 5), []

    def number(index: Tensor) -> Tensor:
        sizes.append(len(index))
        return (index @ torch.tensor([100.0, 10, 1], dtype=torch.float64))[None]

    whole = fill_voxels(torch.empty(1, *size), number)
    assert [whole[0, 2, 3, 4], whole[0, 1, 0, 2]] == [234, 102]
    monkeypatch.setattr(voxel_sampling, "_CHUNK", 7)
    assert torch.equal(fill_voxels(torch.empty(1, *size), number), whole)
    assert sizes == [60, *[7] * 8, 4]


def test_padding_of_resampled_images() -> None:
    image = torch.tensor([[[5.0, 7]], [[-3, -4]]])  # (2, 1, 2)
    where = torch.tensor([[0, 0], [0, 1.4], [0, 1.6]], dtype=torch.float64)

    def places(index: Tensor) -> Tensor:
        return where[index[:, 1].long()]

    expected = {"border": [[5, 7, 7], [-3, -4, -4]], "zeros": [[5, 7, 0], [-3, -4, 0]]}
    expected["background"] = [[5, 7, 5], [-3, -4, -4]]  # the lowest value of each channel
    for padding, values in expected.items():
        assert resample(image, (1, 3), places, padding_mode=padding)[:, 0].tolist() == values
        assert resample(image.int(), (1, 3), places, "nearest", padding)[:, 0].tolist() == values


def test_steps_on_a_grid() -> None:
    mapped = point_mapping(AFFINE, None, GRID, torch.device("cpu"))
    linear = torch.tensor([[0, 2.0, 0], [1, 0, 0], [0, 0, -1]], dtype=torch.float64)
    steps = steps_on_grid(mapped, GRID, SIZE, linear, torch.device("cpu"))
    x = world(GRID, SIZE)
    expected = ((transform_points(AFFINE, x) - x) @ linear.T).T.reshape(3, *SIZE)
    torch.testing.assert_close(steps, expected.float())


def test_composition_is_exact_at_nodes() -> None:
    d, v = rough(0).double(), rough(1, 3.0)
    composed = compose_displacement(d, v, GRID)
    index = torch.linalg.inv(GRID)
    for node in [(0, 0, 0), (4, 5, 3), (8, 10, 6), (2, 9, 1)]:
        step = v[(slice(None), *node)].double()
        place = transform_points(index, transform_points(GRID, torch.tensor([node])) + step)[0]
        torch.testing.assert_close(composed[(slice(None), *node)], slow_linear(d, place.tolist()) + step)
    assert composed.dtype == torch.float64


def test_inverse_of_a_displacement() -> None:
    d = rough(0, 0.2)
    inverse = invert_displacement(d, GRID)
    assert inverse.dtype == torch.float64
    both = compose_displacement(d.double(), inverse, GRID)  # d after its inverse
    assert float(both.abs().max()) < 1e-4 < 0.5 < float(d.abs().max())


def test_a_fold_has_no_inverse() -> None:
    with pytest.raises(ValueError, match=r"no inverse .* mm after 100 steps"):
        invert_displacement(rough(0, 10.0), GRID)
