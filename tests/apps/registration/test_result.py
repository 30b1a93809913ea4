# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from known_transforms import AFFINE, GRID, SIZE, coordinates, oblique, result, rough, world
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import ResampleToMatch
from torch import Tensor

from monai_ssl.apps import Registration
from monai_ssl.apps.registration import voxel_sampling
from monai_ssl.transforms.view_geometry import transform_points

LIKE = oblique((1.1, 1.3, 1.9), (-38, 25, 302)), (10, 8, 9)  # inside GRID
AWAY = oblique((1.2, 1.7, 2.5), (950, 700, -1200), (0.1, 0.2, -0.3)), (44, 36, 27)  # the moving image's grid, 1 m away


def to_away() -> Tensor:
    """The fixed world to the middle of the moving image 1 m away, with shear."""
    matrix = AFFINE.clone()
    fixed, moving = (world(grid, size).mean(0, keepdim=True) for grid, size in ((GRID, SIZE), AWAY))
    matrix[:3, 3] += (moving - transform_points(matrix, fixed))[0]
    return matrix


def warped_by_monai(image: Tensor, ddf: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native grid_sample")  # it works without the compiled extension
        return Warp(mode="bilinear", padding_mode="border")(image[None], ddf)[0]


def test_fields_are_kept_in_their_precision() -> None:
    found = Registration(AFFINE.float(), rough().double().half(), GRID.float(), [*SIZE], torch.zeros(4, 2, 3),
                         torch.zeros(4, dtype=torch.float64), {})  # type: ignore[arg-type]  # fmt: skip
    assert (found.affine.dtype, found.grid_affine.dtype, found.points.dtype) == (torch.float64,) * 3
    assert found.displacement is not None
    assert found.displacement.dtype == torch.float32
    assert found.grid_size == SIZE
    kept = result(displacement=rough().double()).displacement
    assert kept is not None
    assert kept.dtype == torch.float64
    with pytest.raises(AttributeError):
        found.affine = AFFINE  # type: ignore[misc]
    assert torch.equal(pickle.loads(pickle.dumps(found)).displacement, found.displacement)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid_size": (9, 11)}, "affine must be"),
        ({"grid_size": (9,)}, "grid_size must be 2 or 3"),
        ({"grid_size": (9, 11, 0)}, "grid_size must be 2 or 3"),
        ({"affine": torch.eye(3)}, "affine must be"),
        ({"affine": torch.diag(torch.tensor([1.0, 1, 0, 1]))}, "can be inverted"),
        ({"affine": torch.eye(4) + torch.eye(4)[:, [3, 0, 1, 2]]}, "last row"),
        ({"grid_affine": torch.full((4, 4), float("nan"))}, "grid_affine must be"),
        ({"displacement": torch.zeros(1, 3, *SIZE)}, "displacement must be"),
        ({"displacement": torch.zeros(3, 11, 9, 7)}, "displacement must be"),
        ({"displacement": torch.full((3, *SIZE), float("inf"))}, "finite"),
        ({"points": torch.zeros(4, 3)}, "points must be"),
        ({"scores": torch.zeros(3)}, "scores"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    given = {
        "affine": AFFINE,
        "displacement": rough(),
        "grid_affine": GRID,
        "grid_size": SIZE,
        "points": torch.zeros(4, 2, 3),
        "scores": torch.zeros(4),
        "report": {},
    }
    Registration(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Registration(**given | changed)  # type: ignore[arg-type]


def test_points_by_hand() -> None:
    """In 1 mm along x and 2 mm along y: d = (4 i, 0), and A doubles x and adds 10 to y."""
    field = torch.zeros(2, 3, 5)
    field[0] = 4.0 * torch.arange(3)[:, None]
    affine = torch.tensor([[2.0, 0, 0], [0, 1, 10], [0, 0, 1]])
    found = result(affine, field, torch.diag(torch.tensor([1.0, 2, 1])), (3, 5))
    points = [[0.0, 0], [0.5, 3], [2.4, 8.9], [2.6, 0], [-0.4, 0], [1, -1.1]]
    expected = [[0, 10], [5, 13], [2 * 10.4, 18.9], [5.2, 10], [-0.8, 10], [2, 8.9]]  # the last three but one: d is 0
    torch.testing.assert_close(found.map_points(points), torch.tensor(expected, dtype=torch.float64))
    assert found.map_points(torch.zeros(4, 0, 2)).shape == (4, 0, 2)
    assert found.map_points(torch.tensor([1, 2])).tolist() == [10, 12]
    with pytest.raises(ValueError, match=r"points must be \(..., 2\)"):
        found.map_points(torch.zeros(4, 3))


def test_the_transform_at_nodes() -> None:
    d = rough()
    found, x = result(AFFINE, d), world(GRID, SIZE)
    torch.testing.assert_close(found.map_points(x), transform_points(AFFINE, x + d.flatten(1).T.double()))


def test_then_inner() -> None:
    v, x = rough(1, 0.7), world(GRID, SIZE)
    found = result(AFFINE, rough())
    both = found.then_inner(v)
    inner = x + v.flatten(1).T.double()
    place = transform_points(torch.linalg.inv(GRID), inner)
    within = ((place >= -0.5) & (place <= torch.tensor(SIZE) - 0.501)).all(1)
    assert within.double().mean() > 0.8
    torch.testing.assert_close(both.map_points(x)[within], found.map_points(inner[within]), rtol=0, atol=1e-4)
    assert torch.equal(both.affine, found.affine)
    alone = result(AFFINE).then_inner(v)
    torch.testing.assert_close(alone.map_points(x), transform_points(AFFINE, inner))
    with pytest.raises(ValueError, match="v must be"):
        found.then_inner(v[None])


def test_beyond_its_grid_the_border_of_d_continues_in_a_composition() -> None:
    d, v = torch.ones(2, 4, 5), torch.full((2, 4, 5), 100.0)
    both = result(None, d, torch.eye(3), (4, 5)).then_inner(v)
    assert both.displacement is not None
    assert torch.equal(both.displacement, d + v)


@pytest.mark.parametrize("like", [None, LIKE])
def test_ddf_in_voxels(like: Any) -> None:
    found = result(AFFINE, rough())
    grid, size = like or (GRID, SIZE)
    ddf = found.ddf(None if like is None else MetaTensor(torch.zeros(1, *size), affine=grid))
    assert ddf.shape == (1, 3, *size)
    assert ddf.dtype == torch.float32
    x = world(grid, size)
    steps = (found.map_points(x) - x) @ torch.linalg.inv(grid[:3, :3]).T
    torch.testing.assert_close(ddf[0].flatten(1).T, steps.float())


@pytest.mark.parametrize("displacement", [None, rough()])
def test_warp_samples_the_moving_image_where_the_points_go(displacement: Tensor | None) -> None:
    """The moving image's values are its world coordinates, so the warped ones are T(x), whatever the grids."""
    found = result(to_away(), displacement)
    moving, like = coordinates(*AWAY), coordinates(*LIKE)
    for given, (grid, size) in ((like, LIKE), (None, (GRID, SIZE))):
        warped = found.warp(moving, like=given)
        assert isinstance(warped, MetaTensor)
        assert torch.equal(warped.affine, grid)
        assert warped.dtype == torch.float32
        expected = found.map_points(world(grid, size))
        place = transform_points(torch.linalg.inv(AWAY[0]), expected)
        assert ((place >= 0) & (place <= torch.tensor(AWAY[1]) - 1)).all()
        assert warped.shape == (3, *size)
        torch.testing.assert_close(warped.as_tensor().flatten(1).T, expected.float(), rtol=0, atol=1e-3)


def test_warp_equals_monais_warp_of_a_smooth_image() -> None:
    found = result(torch.eye(4) + 0.02 * torch.eye(4)[:, [1, 0, 2, 3]] * torch.tensor([1.0, 1, 0, 0])[:, None],
                   0.3 * torch.ones(3, *SIZE))  # fmt: skip
    places = world(*LIKE).T.reshape(3, *LIKE[1])
    grid, size = oblique((1.0, 1.2, 1.4), (-40, 22, 300)), (16, 14, 17)
    points = world(grid, size)
    moving = MetaTensor(torch.sin((points - places.flatten(1).T.mean(0)) / 9).sum(1).reshape(1, *size), affine=grid)
    like = MetaTensor(torch.zeros(1, *LIKE[1]), affine=LIKE[0])
    direct = found.warp(moving, like).as_tensor()
    resampled = ResampleToMatch(mode="bilinear", padding_mode="border")(moving, like)
    twice = warped_by_monai(resampled.as_tensor().float(), found.ddf(like))
    index = transform_points(torch.linalg.inv(grid), found.map_points(world(*LIKE)))
    own = transform_points(torch.linalg.inv(LIKE[0]), found.map_points(world(*LIKE)))
    seen = ((index >= 0) & (index <= torch.tensor(size) - 1) & (own >= 0) & (own <= torch.tensor(LIKE[1]) - 1)).all(1)
    assert seen.double().mean() > 0.4
    difference = (direct - twice).flatten()[seen].abs().max()
    assert difference < 0.02 * (moving.max() - moving.min())
    assert (direct - resampled).flatten()[seen].abs().max() > 2 * difference  # something moves


def test_a_shift_by_one_voxel() -> None:
    """T moves points by one voxel along the second axis, so that the warped image shows there what lies one on."""
    step = torch.eye(4, dtype=torch.float64)
    step[:3, 3] = GRID[:3, 1]
    field = GRID[:3, 1].float().view(3, 1, 1, 1).expand(3, *SIZE)
    image = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(0))
    for found in (result(step), result(None, field)):
        ddf = found.ddf()
        one = torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1, 1).expand_as(ddf)
        torch.testing.assert_close(ddf, one, rtol=0, atol=1e-5)
        torch.testing.assert_close(warped_by_monai(image, ddf)[:, :, :-1], image[:, :, 1:], rtol=0, atol=1e-4)
        warped = found.warp(MetaTensor(image, affine=GRID), like=MetaTensor(image, affine=GRID))
        torch.testing.assert_close(warped.as_tensor()[:, :, :-1], image[:, :, 1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(warped.as_tensor()[:, :, -1], image[:, :, -1], rtol=0, atol=1e-5)  # border


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_stay_labels(dtype: torch.dtype) -> None:
    largest = torch.iinfo(dtype).max  # which no float32 holds, from int32 on
    labels = largest - torch.randint(0, 4, (1, *AWAY[1]), generator=torch.Generator().manual_seed(0)).to(dtype)
    found = result(to_away(), rough())
    warped = found.warp(MetaTensor(labels, affine=AWAY[0]), mode="nearest")
    assert warped.dtype == dtype
    place = transform_points(torch.linalg.inv(AWAY[0]), found.map_points(world(GRID, SIZE)))
    cells = (place + 0.5).floor().long()
    assert torch.equal(warped.as_tensor().flatten(), labels[0][tuple(cells.T)])


def test_padding_beyond_the_moving_image() -> None:
    """The moving image covers three of seven columns; the fixed ones at its faces show its border."""
    moving = MetaTensor(torch.tensor([[5.0, -2, 7], [5, -2, 7]])[None] + 100, affine=torch.eye(3))
    like = MetaTensor(torch.zeros(1, 2, 7), affine=torch.tensor([[1.0, 0, 0], [0, 1, -2.4], [0, 0, 1]]))
    found = result(grid=torch.eye(3), size=(2, 3))
    inner = [105 - 7 * 0.6, 98 + 9 * 0.6]  # at 0.6 and 1.6; -0.4 and 2.6 are next
    rows = {p: found.warp(moving, like, padding_mode=p).as_tensor()[0, 0] for p in ("border", "zeros", "background")}
    for padding, value in (("border", None), ("zeros", 0.0), ("background", 98.0)):
        before, after = (105, 107) if value is None else (value, value)
        expected = torch.tensor([before, before, 105, *inner, after, after], dtype=torch.float32)
        torch.testing.assert_close(rows[padding], expected)
    shifted = found.warp(
        MetaTensor(moving.as_tensor() - moving.as_tensor().min(), affine=torch.eye(3)), like, padding_mode="zeros"
    )
    torch.testing.assert_close(rows["background"], shifted.as_tensor()[0, 0] + moving.as_tensor().min())


def test_channels_do_not_mix_and_parts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    found, moving = result(to_away(), rough()), coordinates(*AWAY)
    whole, ddf = found.warp(moving), found.ddf()
    single = found.warp(MetaTensor(moving.as_tensor()[1:2], affine=AWAY[0]))
    assert torch.equal(single.as_tensor()[0], whole.as_tensor()[1])
    monkeypatch.setattr(voxel_sampling, "_CHUNK", 100)
    torch.testing.assert_close(found.warp(moving).as_tensor(), whole.as_tensor(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.ddf(), ddf, rtol=0, atol=1e-5)


def test_images_from_files(tmp_path: Path) -> None:
    found = result(to_away(), rough())
    moving, like = coordinates(*AWAY, torch.float32)[:1], coordinates(*LIKE, torch.float32)[:1]
    for name, image, (grid, _) in (("moving", moving, AWAY), ("like", like, LIKE)):
        nib.save(nib.Nifti1Image(image.as_tensor()[0].numpy(), grid.numpy()), tmp_path / f"{name}.nii.gz")
    files = [str(tmp_path / "moving.nii.gz"), tmp_path / "like.nii.gz"]
    warped = found.warp(files[0], like=files[1])
    torch.testing.assert_close(warped.as_tensor(), found.warp(moving, like).as_tensor(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.ddf(files[1]), found.ddf(like), rtol=0, atol=1e-3)
    assert "filename_or_obj" not in warped.meta  # of a patient, perhaps
    with pytest.raises(FileNotFoundError):
        found.warp(tmp_path / "none.nii.gz")


def test_warp_refuses() -> None:
    found, moving = result(), coordinates(GRID, SIZE)
    with pytest.raises(ValueError, match="mode must be"):
        found.warp(moving, mode="bicubic")
    with pytest.raises(ValueError, match="padding_mode"):
        found.warp(moving, padding_mode="reflection")
    with pytest.raises(ValueError, match="3 axes"):
        found.warp(MetaTensor(torch.zeros(4, 5)))
    with pytest.raises(ValueError, match="affine"):
        found.warp(torch.zeros(1, *SIZE))


def test_the_inverse_of_an_affine() -> None:
    points = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    inverse = Registration(AFFINE, None, GRID, SIZE, points, torch.ones(5), {"counts": {"grid": 9}}).inverse()
    x = world(GRID, SIZE)
    torch.testing.assert_close(inverse.map_points(transform_points(AFFINE, x)), x)
    assert torch.equal(inverse.points, points.flip(1).double())
    assert inverse.report == {"counts": {"grid": 9}}


def test_the_inverse_of_a_displacement() -> None:
    waves = torch.sin(world(GRID, SIZE)[:, [1, 2, 0]] / 6)  # of 38 mm
    found = result(AFFINE, waves.T.reshape(3, *SIZE))
    inverse = found.inverse()
    x = world(GRID, SIZE).reshape(*SIZE, 3)[1:-1, 1:-1, 1:-1]
    moved = (found.map_points(x) - transform_points(AFFINE, x)).norm(dim=-1)
    assert (inverse.map_points(found.map_points(x)) - x).norm(dim=-1).max() < 0.05 < 1 < moved.max()
    y = transform_points(AFFINE, x.reshape(-1, 3))  # at the nodes of the inverse's own grid it is exact
    torch.testing.assert_close(found.map_points(inverse.map_points(y)), y, rtol=0, atol=1e-3)


def test_two_dimensions() -> None:
    grid, size = torch.tensor([[1.5, 0.4, -3], [-0.5, 1.2, 7], [0, 0, 1]]), (9, 6)
    affine = torch.tensor([[1.02, -0.1, 2], [0.1, 0.97, -1], [0, 0, 1]])
    found = result(affine, rough(0, 0.5, size), grid, size)
    moving = coordinates(torch.tensor([[1.1, 0, -15], [0, 1.3, -6], [0, 0, 1]], dtype=torch.float64), (30, 24))
    points = world(grid.double(), size)
    warped = found.warp(moving).as_tensor()
    torch.testing.assert_close(warped.flatten(1).T, found.map_points(points).float(), rtol=0, atol=1e-4)
    steps = (found.map_points(points) - points) @ torch.linalg.inv(grid.double()[:2, :2]).T
    torch.testing.assert_close(found.ddf()[0].flatten(1).T, steps.float(), rtol=0, atol=1e-5)
    world_4x4 = MetaTensor(moving.as_tensor(), affine=torch.eye(4, dtype=torch.float64))
    world_4x4.affine[:2, :2], world_4x4.affine[:2, 3] = moving.affine[:2, :2], moving.affine[:2, 2]
    assert torch.equal(found.warp(world_4x4).as_tensor(), warped)  # as image files give it
