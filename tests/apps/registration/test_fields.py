# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import warnings

import pytest
import torch
from monai.networks.blocks import DVF2DDF
from torch import Tensor

import monai_ssl.apps
import monai_ssl.apps.registration
import monai_ssl.apps.registration.result
from monai_ssl.apps import compose, folding, from_normalised, jacobian_determinant, to_ddf, to_normalised
from monai_ssl.apps.registration.fields import identity_field, sample_field
from monai_ssl.transforms.view_geometry import voxel_index


@pytest.mark.parametrize(
    "name", ["compose", "from_normalised", "jacobian_determinant", "to_ddf", "to_normalised", "Registration"]
)
def test_importable_from_everywhere(name: str) -> None:
    places = [monai_ssl.apps, monai_ssl.apps.registration, monai_ssl.apps.registration.result]
    assert len({id(getattr(place, name)) for place in places}) == 1


def test_normalised_coordinates() -> None:
    index = torch.tensor([[0, 0], [2, 1], [4, 2]])
    assert torch.equal(to_normalised(index, (5, 3)), torch.tensor([[-1.0, -1], [0, 0], [1, 1]]))
    assert torch.equal(from_normalised(to_normalised(index, (5, 3)), (5, 3)), index.float())
    assert torch.equal(from_normalised(torch.tensor([0.5, 2.0], dtype=torch.float64), (5, 3)).double(),
                       torch.tensor([3.0, 3.0], dtype=torch.float64))  # fmt: skip
    with pytest.raises(ValueError, match="at least 2 voxels"):
        to_normalised(index, (5, 1))


def test_identity_is_where_nodes_are() -> None:
    size = (3, 5, 2)
    field = identity_field(size, torch.zeros((), dtype=torch.float64))
    assert field.dtype == torch.float64
    assert field.shape == (1, 3, *size)
    torch.testing.assert_close(field[0].flatten(1).T, to_normalised(voxel_index(size).double(), size))


@pytest.mark.parametrize("size", [(5, 7), (4, 5, 6)])
def test_sample_field(size: tuple[int, ...]) -> None:
    n, coordinates = len(size), identity_field(size)
    places = 2 * torch.rand(1, n, 3, *[2] * (n - 1), generator=torch.Generator().manual_seed(0)) - 1
    torch.testing.assert_close(sample_field(coordinates, places), places)
    beyond = torch.full((1, n, *[1] * n), 3.0)
    assert sample_field(coordinates, beyond).flatten().tolist() == [1] * n
    assert sample_field(coordinates, beyond, "zeros").flatten().tolist() == [0] * n
    step = torch.tensor([2 / (length - 1) for length in size]).view(1, n, *[1] * n)
    assert torch.equal(sample_field(coordinates, coordinates + 0.4 * step, mode="nearest"), coordinates)


def test_compose() -> None:
    """Displacements 0.2 x + 0.1 and 0.3 x along the first axis: 0.2 (1.3 x) + 0.1 + 0.3 x, where 1.3 x is inside."""
    size = (9, 5)
    x = identity_field(size)[:, :1]
    d1, d2 = (torch.cat([d, torch.zeros_like(x)], 1) for d in (0.2 * x + 0.1, 0.3 * x))
    expected = 0.2 * (1.3 * x).clamp(-1, 1) + 0.1 + 0.3 * x  # d1 continues with its border value
    torch.testing.assert_close(compose(d1, d2)[:, :1], expected)
    assert not compose(d1, d2)[:, 1].any()
    reverse = 0.3 * (1.2 * x + 0.1).clamp(-1, 1) + 0.2 * x + 0.1
    torch.testing.assert_close(compose(d2, d1)[:, :1], reverse)


def test_to_ddf() -> None:
    ddf = to_ddf(2 * identity_field((5, 3)))
    assert torch.equal(ddf[0, 0], torch.tensor([-2.0, -1, 0, 1, 2])[:, None].expand(5, 3))
    assert torch.equal(ddf[0, 1], torch.tensor([-1.0, 0, 1]).expand(5, 3))


def linear_ddf(matrix: Tensor, size: tuple[int, ...]) -> Tensor:
    """(M - 1) i for every voxel i."""
    index = voxel_index(size).double()
    return (index @ (matrix - torch.eye(len(size), dtype=torch.float64)).T).T.reshape(1, -1, *size)


def test_jacobian_of_an_affine() -> None:
    scaled = jacobian_determinant(linear_ddf(1.03 * torch.eye(3, dtype=torch.float64), (4, 5, 6)).float())
    assert scaled.shape == (1, 4, 5, 6)
    torch.testing.assert_close(scaled, torch.full_like(scaled, 1.092727), rtol=0, atol=1e-6)
    matrix = torch.tensor([[1.1, 0.3, 0], [-0.2, 0.9, 0.1], [0.05, 0, 1.2]], dtype=torch.float64)
    sheared = jacobian_determinant(linear_ddf(matrix, (3, 4, 2)))
    torch.testing.assert_close(sheared, torch.full_like(sheared, float(torch.linalg.det(matrix))))
    plane = jacobian_determinant(linear_ddf(matrix[:2, :2], (3, 4)))
    torch.testing.assert_close(plane, torch.full_like(plane, 1.1 * 0.9 + 0.3 * 0.2))


def test_a_fold_of_known_size() -> None:
    """Nine planes go to 0, 1, 2, 5, 4, 3, 6, 7, 8: slopes 1, 1, 2, 1, -1, 1, 2, 1, 1 by central differences."""
    ddf = torch.zeros(1, 3, 4, 9, 5)
    ddf[0, 1] = (torch.tensor([0.0, 1, 2, 5, 4, 3, 6, 7, 8]) - torch.arange(9))[:, None]
    determinant = jacobian_determinant(ddf)
    assert torch.equal(determinant[0], torch.tensor([1.0, 1, 2, 1, -1, 1, 2, 1, 1])[:, None].expand(4, 9, 5))
    found = folding(ddf)
    assert found["folding_share"] == pytest.approx(1 / 9)
    # log det over the eight others: six times 0, twice ln 2
    assert found["sdlogj"] == pytest.approx(math.log(2) * math.sqrt(0.25 * 0.75))


def test_folding_of_what_does_not_fold_and_of_what_does_all_over() -> None:
    assert folding(torch.zeros(1, 2, 3, 4)) == {"folding_share": 0, "sdlogj": 0}
    flat = folding(linear_ddf(torch.diag(torch.tensor([0.0, 1], dtype=torch.float64)), (3, 4)))
    assert flat["folding_share"] == 1  # a determinant of 0 folds
    assert math.isnan(flat["sdlogj"])


@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 6), (1, 3, 4, 1, 6), (3, 4, 5, 6)])
def test_jacobian_needs_a_field(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ddf"):
        jacobian_determinant(torch.zeros(shape))


def test_velocity_in_voxels_is_the_normalised_one() -> None:
    """MONAI's DVF2DDF on velocity (N - 1) / 2 equals scaling and squaring in normalised coordinates."""
    size = (8, 10, 9)
    velocity = 0.4 * torch.sin(3 * identity_field(size, torch.zeros((), dtype=torch.float64)).flip(1))
    field = velocity / 2**7
    for _ in range(7):
        field = field + sample_field(field, identity_field(size, field) + field, "zeros")
    half = (torch.tensor(size, dtype=torch.float64) - 1).view(1, 3, 1, 1, 1) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native grid_sample")  # it works without the compiled extension
        layer = DVF2DDF(7, "bilinear", "zeros")
    torch.testing.assert_close(layer(velocity * half) / half, field, rtol=0, atol=1e-6)
    assert float((field - velocity).abs().max()) > 0.05  # the integral is not the velocity
