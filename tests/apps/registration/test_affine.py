# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import nibabel as nib
import pytest
import torch
from embedding_fields import GEOMETRY, PERMUTED, CoordinateNet, StridedNet, coordinate_image, inside
from monai.data import MetaTensor
from torch import Tensor
from voxel_fields import SIZE, affine, bent, border_mask, embedding, matcher, same_cells

from monai_ssl.apps import ImageEmbedding, PointMatcher, fit_affine, register_affine, register_coarse
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

MOVING, FIXED = embedding(), embedding(affine)
MASK = border_mask()
INSIDE = voxel_index(SIZE)[MASK.flatten()].double()


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm(dim=1).mean())


@pytest.mark.parametrize("method", ["lstsq", "huber", "ransac"])
def test_fourier_field(method: str) -> None:
    found = register_affine(matcher(), MOVING, FIXED, MASK, MASK, method)
    assert error(found.map_points(INSIDE), affine(INSIDE)) < 0.15
    released = register_affine(matcher(), MOVING, FIXED, MASK, MASK, "lstsq", matching="stable")
    # 0.26 with the released code
    assert error(released.map_points(INSIDE), affine(INSIDE)) == pytest.approx(0.26, abs=0.1)


def test_what_a_result_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = register_affine(matcher(), MOVING, FIXED, MASK, MASK)
    fixed, moving = found.points[:, 0], found.points[:, 1]
    # noise sits in the answers, so this direction is fitted
    assert torch.equal(found.affine, torch.linalg.inv(fit_affine(moving, fixed, "huber")))
    for method in ("lstsq", "ransac"):
        again, expected = (torch.Generator().manual_seed(4) for _ in range(2))
        other = register_affine(matcher(), MOVING, FIXED, MASK, MASK, method, generator=again)
        fitted = fit_affine(moving, fixed, method, generator=expected)
        assert torch.equal(other.affine, torch.linalg.inv(fitted))
    assert ((moving - 3) % 8 == 0).all()  # grid points
    assert found.displacement is None
    assert found.grid_size == SIZE
    assert torch.equal(found.grid_affine, torch.eye(4, dtype=torch.float64))
    report = found.report
    assert list(report["counts"]) == ["grid", "moving_mask", "score", "masks", "cycle"]
    assert report["counts"]["cycle"] == len(found.points) == len(found.scores)
    residual = (found.map_points(fixed) - moving).norm(dim=1)
    assert report["residual_mean_mm"] == pytest.approx(float(residual.mean()))
    assert report["residual_median_mm"] == pytest.approx(float(residual.median()))
    assert report["folding_share"] == 0
    assert list(report["seconds"]) == ["embed", "match", "affine"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [2, 3])
def test_exact_on_grids_that_share_nothing(rank: int) -> None:
    """Other shape, spacing, orientation, and an origin one metre away."""
    turn = torch.eye(rank + 1, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    fixed_world = turn @ torch.diag(torch.tensor([1.5, 2, 2.5, 1][4 - rank - 1 :], dtype=torch.float64))
    moving_world = torch.diag(torch.tensor([2.5, -1, -2, 1][4 - rank - 1 :], dtype=torch.float64))
    fixed_world[:rank, rank], moving_world[:rank, rank] = 300, torch.tensor([1000.0, -1100, 900][:rank]).double()
    size = (5, 6, 8)[:rank]
    moving, fixed, true = same_cells(size, fixed_world, moving_world)
    for method in ("lstsq", "huber", "ransac"):
        found = register_affine(matcher(), moving, fixed, method=method, stride=2, matching="stable")
        places = transform_points(fixed_world, voxel_index(fixed.size))
        torch.testing.assert_close(found.map_points(places), transform_points(true, places), atol=1e-6, rtol=0)
        assert torch.equal(found.grid_affine, fixed_world)
        assert found.grid_size == fixed.size


def test_images_and_masks_from_files(tmp_path: Path) -> None:
    """From files to a result: permuted axes against an oblique grid a metre away, masks on grids of their own."""
    turned = torch.tensor([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    world = turned @ torch.diag(torch.tensor([2.0, 2.2, 3, 1], dtype=torch.float64))
    sizes = (60, 40, 90), (62, 50, 34)
    true = torch.tensor(
        [[1.04, 0.02, 0, 0], [-0.03, 0.96, 0.04, 0], [0, -0.02, 1.05, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    middle = [inside(a, s, 1, 0.5)[0] for a, s in ((PERMUTED, sizes[0]), (world, sizes[1]))]
    true[:3, 3] = middle[0] - true[:3, :3] @ middle[1]
    moving, fixed = coordinate_image(PERMUTED, sizes[0]), coordinate_image(world, sizes[1], true)
    mask = torch.zeros(30, 20, 30, dtype=torch.uint8)
    mask[2:-2, 2:-2, 3:-3] = 1
    own = PERMUTED @ torch.diag(torch.tensor([2.0, 2, 3, 1], dtype=torch.float64))
    nib.save(nib.Nifti1Image(mask.numpy(), own.numpy()), tmp_path / "mask.nii.gz")
    fixed_mask = MetaTensor(torch.zeros(sizes[1], dtype=torch.bool), affine=world)
    fixed_mask[4:-4, 4:-4, 3:-3] = True
    net = StridedNet()
    images = PointMatcher(net, GEOMETRY)
    found = register_affine(images, moving, fixed, tmp_path / "mask.nii.gz", fixed_mask)
    places = inside(world, sizes[1])
    assert error(found.map_points(places), transform_points(true, places)) < 0.6  # cells of 4 mm
    embedded = images.embed(fixed)
    assert torch.equal(found.grid_affine, embedded.affine)
    assert found.grid_size == embedded.size
    assert found.points[:, 1].abs().min() > 1300
    coarse = register_coarse(images, moving, fixed, found)
    assert error(coarse.map_points(places), transform_points(true, places)) < 1
    unmatched = dataclasses.replace(found, points=found.points[:0], scores=found.scores[:0])
    masks = {"moving_mask": tmp_path / "mask.nii.gz", "fixed_mask": fixed_mask}
    again = register_coarse(images, moving, fixed, unmatched, **masks)  # type: ignore[arg-type]
    torch.testing.assert_close(again.displacement, coarse.displacement)
    assert net.calls == 2  # each image once, for all of it


def test_seeds_and_chunks() -> None:
    fixed = embedding(bent)

    def once(seed: int, chunk_size: int = 64) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return register_affine(matcher(chunk_size), MOVING, fixed, MASK, MASK, "ransac", generator=g).affine

    assert torch.equal(once(0), once(0))
    torch.testing.assert_close(once(0, 7), once(0, 10**6), atol=1e-4, rtol=0)
    plain = [register_affine(matcher(size), MOVING, fixed, MASK, MASK).affine for size in (5, 10**6)]
    torch.testing.assert_close(*plain, atol=1e-4, rtol=0)


def shrunk(share: float) -> Tensor:
    """Voxel of a fixed image -> voxel of the moving one, about the middle."""
    middle = torch.tensor(SIZE).double() / 2
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] *= share
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle
    return matrix


def test_transforms_that_no_patient_has() -> None:
    mirror = torch.eye(4, dtype=torch.float64)
    mirror[0, 0], mirror[0, 3] = -1, SIZE[0] - 1
    with pytest.raises(ValueError, match=r"it mirrors.* grid 192, moving_mask 192"):
        register_affine(matcher(), MOVING, embedding(lambda p: transform_points(mirror, p)))
    wide = torch.diag(torch.tensor([3.5, 3.5, 3.5, 1], dtype=torch.float64))  # spacing that a header has wrong
    with pytest.raises(ValueError, match=r"scales by 3.5 to 3.5, allowed are 0.333 to 3; .*cycle \d+; check"):
        register_affine(matcher(), MOVING, embedding(world=wide))
    flat = torch.diag(torch.tensor([1, 1, 0.3, 1], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales by 0.3 to 1,"):
        register_affine(matcher(), MOVING, embedding(world=flat))
    half = torch.diag(torch.tensor([0.5, 0.5, 2, 1], dtype=torch.float64))
    found = register_affine(matcher(), MOVING, embedding(world=half))
    torch.testing.assert_close(found.affine.diagonal(), 1 / half.diagonal(), atol=0.01, rtol=0.02)


def test_images_that_are_no_pair() -> None:
    for shows in (lambda p: p + 500, lambda p: p[:, [2, 0, 1]] * 7 - 300, lambda p: p * 0 + 20):
        fixed = embedding(shows)
        for matching, min_score in (("cycle", 0.7), ("cycle", -1.0), ("stable", 0.7)):
            with pytest.raises(ValueError, match="grid 192"):
                register_affine(matcher(), MOVING, fixed, matching=matching, min_score=min_score)


def test_confident_matches_that_do_not_agree() -> None:
    """Cells of the fixed image are shuffled, so that matches are exact and anywhere: all of them, or a part."""
    world = torch.diag(torch.tensor([10.0, 10, 10, 1])).double()
    moving, _, _ = same_cells((6, 7, 8), world, world)
    values = moving.maps[0].flatten(1)

    def registered(share: float, method: str) -> Tensor:
        g, order = torch.Generator().manual_seed(0), torch.arange(values.shape[1])
        moved = torch.randperm(len(order), generator=g)[: int(share * len(order))]
        order[moved.sort().values] = order[moved]
        shown = values[:, order].reshape(moving.maps[0].shape)
        fixed = ImageEmbedding([shown], moving.affine, moving.size, moving.affine)
        return register_affine(matcher(), moving, fixed, method=method, stride=2, matching="stable", generator=g).affine

    with pytest.raises(ValueError, match=r"scales by 0\.0.* masks 336; .*ransac"):
        registered(1.0, "lstsq")
    with pytest.raises(ValueError, match=r"misses half of them by .* mm or more.* masks 336; .*ransac"):
        registered(0.5, "lstsq")
    with pytest.raises(ValueError, match="misses half of them"):  # by 0.45 of their distance from the middle
        registered(0.3, "lstsq")
    assert torch.linalg.svdvals(registered(0.1, "lstsq")[:3, :3])[-1] > 0.8  # by 0.14
    assert (registered(0.4, "ransac") - torch.eye(4)).abs().max() < 1e-6


def test_refusals_come_before_the_work(tmp_path: Path) -> None:
    images = PointMatcher(CoordinateNet())
    for options, message in (
        ({"min_score": 1.5}, "min_score 1.5 accepts nothing"),
        ({"method": "ols"}, "method must be one of"),
        ({"matching": "mutual"}, "matching must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            register_affine(images, tmp_path / "absent.nii", tmp_path / "absent.nii", **options)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"absent\.nii"):
        register_affine(images, tmp_path / "absent.nii", FIXED)
    with pytest.raises(ValueError, match="fixed_mask is empty"):
        register_affine(matcher(), MOVING, FIXED, fixed_mask=torch.zeros(SIZE))


def test_two_dimensions() -> None:
    size, strides = (48, 64), ((2, 2), (8, 16))
    turn = torch.tensor([[math.cos(0.12), -math.sin(0.12), 4], [math.sin(0.12), math.cos(0.12), -2], [0, 0, 1]])
    moving = embedding(size=size, strides=strides)
    fixed = embedding(lambda p: transform_points(turn.double(), p), size, strides=strides)
    mask = border_mask(size, (6, 6))
    found = register_affine(matcher(), moving, fixed, mask, mask, stride=4)
    places = voxel_index(size)[mask.flatten()].double()
    assert found.affine.shape == (3, 3)
    assert error(found.map_points(places), transform_points(turn, places)) < 0.15
