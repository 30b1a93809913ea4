# SPDX-License-Identifier: Apache-2.0
"""What is written, byte for byte, and what ITK and SimpleITK make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from known_transforms import AFFINE, GRID, LPS, SIZE, coordinates, oblique, result, rough, world
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.apps import Registration
from monai_ssl.apps.preprocessing import load_image
from monai_ssl.apps.registration import transform_files
from monai_ssl.apps.registration.transform_files import to_lps
from monai_ssl.data.dicom import itk_loading
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

TRANSFORMS = ("tfm", "h5", "nifti")
MAPS = {"affine": result(AFFINE), "deformed": result(AFFINE, rough()), "exact": result(AFFINE, rough().double())}


def moving_image(channels: int = 1) -> MetaTensor:
    """Noise in [0, 1] over most of what the transforms reach."""
    noise = torch.rand(channels, 14, 11, 12, generator=torch.Generator().manual_seed(0))
    return MetaTensor(noise, affine=oblique((1.4, 1.7, 2.5), (-40, 32, 322), (0.2, -0.1, 0.4)))


def fixed_image() -> MetaTensor:
    return MetaTensor(torch.zeros(1, 13, 10, 12), affine=oblique((1.1, 1.3, 1.9), (-38, 25, 302)))


def grid_points(margin: float) -> Tensor:
    """Places in the grid, or beyond it by so many voxels, RAS mm."""
    share = torch.rand(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return transform_points(GRID, share * (torch.tensor(SIZE) - 1 + 2 * margin) - margin)


def mapped_by(transform: Any, points: Tensor) -> Tensor:
    """RAS -> RAS by a transform of ITK or SimpleITK."""
    rows = [list(transform.TransformPoint(point)) for point in (points * LPS).tolist()]
    return torch.tensor(rows, dtype=torch.float64) * LPS


def read_by_itk(file: Path) -> Any:
    with itk_loading():  # loads ITK's transforms on first use, for some 10 s
        itk = pytest.importorskip("itk")
        (transform,) = itk.transformread(str(file))
    return transform


def read_by_sitk(file: Path) -> Any:
    with itk_loading():
        return pytest.importorskip("SimpleITK").ReadTransform(str(file))


READERS = {"itk": read_by_itk, "SimpleITK": read_by_sitk}


def sitk_image(image: MetaTensor) -> Any:
    with itk_loading():
        sitk = pytest.importorskip("SimpleITK")
    made = sitk.GetImageFromArray(image.as_tensor()[0].permute(2, 1, 0).double().numpy())
    axes = LPS[:, None] * image.affine[:3, :3]
    spacing = axes.norm(dim=0)
    made.SetSpacing(spacing.tolist())
    made.SetOrigin((LPS * image.affine[:3, 3]).tolist())
    made.SetDirection((axes / spacing).flatten().tolist())
    return made


def test_affine_as_text(tmp_path: Path) -> None:
    (file,) = result(AFFINE, rough()).save(tmp_path, "pair", ("tfm",))
    assert file.name == "pair_affine.tfm"
    assert file.read_text() == (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1.05 0.02 0 -0.03 0.95 -0.04 0 0.02 1.08 -3 2 4\nFixedParameters: 0 0 0\n"
    )
    precise = result(torch.eye(4, dtype=torch.float64) + torch.full((4, 4), 1e-9 / 3).triu(1))
    text = precise.save(tmp_path, "pair", ("tfm",))[0].read_text().splitlines()[3].split()
    assert [float(v) for v in text[1:4]] == (precise.affine[0, :3] * torch.tensor([1.0, 1, -1])).tolist()
    assert "e" not in "".join(text[1:])


def test_ras_and_lps() -> None:
    x = world(GRID, SIZE)
    torch.testing.assert_close(transform_points(to_lps(AFFINE), x * LPS), transform_points(AFFINE, x) * LPS)
    assert torch.equal(to_lps(to_lps(AFFINE)), AFFINE)


def test_composite_as_hdf5(tmp_path: Path) -> None:
    d = rough()
    (file,) = result(AFFINE, d).save(tmp_path, "pair", ("h5",))
    assert file.name == "pair.h5"
    with h5py.File(file) as content:
        assert sorted(content) == ["HDFVersion", "ITKVersion", "OSName", "OSVersion", "TransformGroup"]
        kinds = [content[key] for key in ("HDFVersion", "ITKVersion", "OSName", "OSVersion")]
        group = content["TransformGroup"]
        assert sorted(group) == ["0", "1", "2"]
        assert list(group["0"]) == ["TransformType"]
        kinds += [group[number]["TransformType"] for number in "012"]
        for text in kinds:
            info = h5py.check_string_dtype(text.dtype)
            assert (text.shape, info.encoding, info.length) == ((1,), "ascii", None)  # of variable length
        assert [kind[0] for kind in kinds[4:]] == [
            b"CompositeTransform_double_3_3", b"AffineTransform_double_3_3", b"DisplacementFieldTransform_double_3_3"
        ]  # fmt: skip
        for number in "12":
            assert {group[number][key].dtype for key in ("TransformParameters", "TransformFixedParameters")} == {
                np.dtype("float64")
            }
        assert group["1"]["TransformParameters"][:].tolist() == [
            1.05, 0.02, 0, -0.03, 0.95, -0.04, 0, 0.02, 1.08, -3, 2, 4
        ]  # fmt: skip
        assert group["1"]["TransformFixedParameters"][:].tolist() == [0, 0, 0]
        buffer = group["2"]["TransformParameters"][:].reshape(7, 11, 9, 3)  # z, y, x, component
        for i, j, k in [(0, 0, 0), (8, 0, 0), (0, 10, 3), (5, 2, 6)]:
            assert buffer[k, j, i].tolist() == (d[:, i, j, k].double() * LPS).tolist()
        fixed = group["2"]["TransformFixedParameters"][:]
    assert fixed[:3].tolist() == [9, 11, 7]
    assert fixed[3:6].tolist() == [40, -25, 300]
    np.testing.assert_allclose(fixed[6:9], [1.5, 2, 3])
    direction = fixed[9:].reshape(3, 3)  # columns are the directions of the axes
    np.testing.assert_allclose(direction * fixed[6:9], (LPS[:, None] * GRID[:3, :3]).numpy(), atol=1e-12)


def test_affine_alone_as_hdf5(tmp_path: Path) -> None:
    (file,) = result(AFFINE).save(tmp_path, "pair", ("h5",))
    with h5py.File(file) as content:
        assert list(content["TransformGroup"]) == ["0"]
        assert content["TransformGroup/0/TransformType"][0] == b"AffineTransform_double_3_3"
        assert len(content["TransformGroup/0/TransformParameters"]) == 12


def test_displacement_as_nifti(tmp_path: Path) -> None:
    found = result(AFFINE, rough())
    (file,) = found.save(tmp_path, "pair", ("nifti",))
    assert file.name == "pair_displacement.nii.gz"
    image = nib.load(file)
    assert image.shape == (*SIZE, 1, 3)
    assert image.get_data_dtype() == np.float32
    assert image.header["intent_code"] == 1007
    assert image.header.get_xyzt_units()[0] == "mm"
    for matrix, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(matrix, GRID.numpy(), atol=1e-4)
    x = world(GRID, SIZE)
    total = (found.map_points(x) - x) * LPS  # the affine included
    np.testing.assert_allclose(image.get_fdata()[:, :, :, 0].reshape(-1, 3), total.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("reader", sorted(READERS))
@pytest.mark.parametrize("name", sorted(MAPS))
def test_points_mapped_by_others(tmp_path: Path, name: str, reader: str) -> None:
    found, read = MAPS[name], READERS[reader]
    assert [file.name for file in found.save(tmp_path, "pair")] == [
        "pair_affine.tfm", "pair.h5", "pair_displacement.nii.gz",
    ]  # fmt: skip
    text, composite = found.save(tmp_path, "pair", ("tfm", "h5"))
    points = grid_points(margin=2)  # beyond the grid the affine alone acts
    torch.testing.assert_close(mapped_by(read(text), points), transform_points(AFFINE, points), rtol=0, atol=1e-9)
    torch.testing.assert_close(mapped_by(read(composite), points), found.map_points(points), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(MAPS))
def test_displacement_read_by_others(tmp_path: Path, name: str) -> None:
    with itk_loading():
        sitk = pytest.importorskip("SimpleITK")
    (file,) = MAPS[name].save(tmp_path, "pair", ("nifti",))
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(file), sitk.sitkVectorFloat64))
    nodes = world(GRID, SIZE).reshape(*SIZE, 3)[1:-1, 1:-1, 1:-1].reshape(-1, 3)
    points = torch.cat([nodes, grid_points(margin=-0.01)])
    torch.testing.assert_close(mapped_by(transform, points), MAPS[name].map_points(points), rtol=0, atol=1e-4)


def test_displacement_read_by_itk(tmp_path: Path) -> None:
    with itk_loading():
        itk = pytest.importorskip("itk")
        found = MAPS["deformed"]
        (file,) = found.save(tmp_path, "pair", ("nifti",))
        field = itk.imread(str(file), itk.Vector[itk.F, 3])
        vectors = torch.from_numpy(itk.array_from_image(field)).permute(2, 1, 0, 3).reshape(-1, 3)  # z, y, x
        places = [list(field.TransformIndexToPhysicalPoint(index)) for index in voxel_index(SIZE)[::37].tolist()]
    x = world(GRID, SIZE)
    np.testing.assert_allclose(places, (x[::37] * LPS).numpy(), atol=1e-4)
    torch.testing.assert_close(vectors, ((found.map_points(x) - x) * LPS).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "tolerance"), [("bilinear", 1e-5), ("nearest", 1e-7)])
@pytest.mark.parametrize("name", sorted(MAPS))
def test_images_resampled_by_sitk(tmp_path: Path, name: str, mode: str, tolerance: float) -> None:
    found, moving, fixed = MAPS[name], moving_image(), fixed_image()
    with itk_loading():
        sitk = pytest.importorskip("SimpleITK")
    (file,) = found.save(tmp_path, "pair", ("h5",))
    interpolator = {"bilinear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}[mode]
    images = sitk_image(moving), sitk_image(fixed)
    theirs = sitk.Resample(*images, read_by_sitk(file), interpolator, 0.0, sitk.sitkFloat64)
    ours = found.warp(moving, fixed, mode, "zeros")
    theirs = torch.from_numpy(sitk.GetArrayFromImage(theirs)).permute(2, 1, 0)
    assert 0.5 < (theirs != 0).double().mean() < 1  # some lies beyond the moving image
    torch.testing.assert_close(ours.as_tensor()[0].double(), theirs, rtol=0, atol=tolerance)


def test_images_resampled_by_itk(tmp_path: Path) -> None:
    found, moving, fixed = MAPS["deformed"], moving_image(), fixed_image()
    (file,) = found.save(tmp_path, "pair", ("h5",))
    transform = read_by_itk(file)
    with itk_loading():
        itk = pytest.importorskip("itk")
        images = []
        for image in (moving, fixed):
            made = itk.image_from_array(image.as_tensor()[0].permute(2, 1, 0).contiguous().numpy())
            axes = LPS[:, None] * image.affine[:3, :3]
            made.SetSpacing(axes.norm(dim=0).tolist())
            made.SetOrigin((LPS * image.affine[:3, 3]).tolist())
            made.SetDirection((axes / axes.norm(dim=0)).numpy())
            images.append(made)
        theirs = itk.resample_image_filter(
            images[0], transform=transform, use_reference_image=True, reference_image=images[1]
        )
        theirs = torch.from_numpy(itk.array_from_image(theirs)).permute(2, 1, 0)
    ours = found.warp(moving, fixed, padding_mode="zeros").as_tensor()[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_shift_by_one_voxel(tmp_path: Path) -> None:
    """T(x) is one voxel along the second axis away from x, in every file."""
    step = GRID[:3, 1]
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = step
    for found in (result(affine), result(None, step.view(3, 1, 1, 1).expand(3, *SIZE))):
        text, composite, displacement, warped = found.save(
            tmp_path, "pair", moving=coordinates(GRID, SIZE), like=coordinates(GRID, SIZE)
        )
        offsets = [float(v) for v in text.read_text().splitlines()[3].split()[-3:]]
        with h5py.File(composite) as content:
            group = content["TransformGroup"]
            if found.displacement is None:
                offset = group["0/TransformParameters"][-3:]
            else:
                assert offsets == [0, 0, 0]
                offset = offsets = group["2/TransformParameters"][:].reshape(-1, 3)[77]
        for values in (offsets, offset, nib.load(displacement).get_fdata()[3, 2, 1, 0]):
            np.testing.assert_allclose(values, (step * LPS).numpy(), atol=1e-6)
        shown = load_image(warped, 3).as_tensor()[:, :, :-1].reshape(3, -1).T
        here = world(GRID, SIZE).reshape(*SIZE, 3)[:, :-1].reshape(-1, 3)
        torch.testing.assert_close(shown.double(), here + step, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_warped_image(tmp_path: Path, channels: int) -> None:
    found, moving, fixed = MAPS["deformed"], moving_image(channels), fixed_image()
    (file,) = found.save(tmp_path, "pair", ("warped",), moving=moving, like=fixed)
    assert file.name == "pair_warped.nii.gz"
    image = nib.load(file)
    assert image.shape == (13, 10, 12) if channels == 1 else (13, 10, 12, 3)
    assert image.get_data_dtype() == np.float32
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    read = load_image(file)
    assert torch.equal(read.as_tensor(), found.warp(moving, fixed).as_tensor())
    torch.testing.assert_close(read.affine, fixed.affine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(tmp_path: Path, channels: int) -> None:
    """2D knows no file of ITK, but images."""
    found = result(torch.eye(3), rough(0, 1.0, (5, 7)), torch.eye(3), (5, 7))
    moving = MetaTensor(torch.rand(channels, 6, 8, generator=torch.Generator().manual_seed(0)), affine=torch.eye(3))
    (file,) = found.save(tmp_path, "pair", ("warped",), moving, moving)
    read = load_image(file).as_tensor()
    assert torch.equal(read.reshape(channels, 6, 8), found.warp(moving, moving).as_tensor())
    for form in TRANSFORMS:
        with pytest.raises(ValueError, match="in 2D"):
            found.save(tmp_path, "other", ("warped", form), moving, moving)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_all_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    files = MAPS["deformed"].save(str(folder), "pair.1", moving=moving_image(), like=fixed_image())
    names = ["pair.1_affine.tfm", "pair.1.h5", "pair.1_displacement.nii.gz", "pair.1_warped.nii.gz"]
    assert files == [folder / name for name in names]
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "deep", folder, *files])


@pytest.mark.parametrize("name", ["", "../pair", "a/pair", "/pair"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name must be"):
        MAPS["affine"].save(tmp_path / "out", name, ("tfm",))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ("mat",)}, "formats must be"),
        ({"formats": "h5"}, "formats must be a sequence"),
        ({"formats": ("tfm", "warped")}, r"moving=\.\.\. and like"),
        ({"moving": moving_image()}, r"moving=\.\.\. and like"),
        ({"like": fixed_image()}, r"moving=\.\.\. and like"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAPS["deformed"].save(tmp_path / "out", "pair", **arguments)
    assert not list(tmp_path.iterdir())


def test_shear(tmp_path: Path) -> None:
    sheared = GRID.clone()
    sheared[:3, 1] += 1e-3 * sheared[:3, 0]
    found = result(AFFINE, rough(), sheared)
    for form in ("h5", "nifti"):
        with pytest.raises(ValueError, match="not orthogonal"):
            found.save(tmp_path, "pair", (form,))
    assert not list(tmp_path.iterdir())
    found.save(tmp_path, "pair", ("tfm", "warped"), moving_image(), fixed_image())  # need no grid of ITK
    rounded = GRID.clone()
    rounded[:3, 1] += 1e-5 * rounded[:3, 0]  # as headers round
    result(AFFINE, rough(), rounded).save(tmp_path, "pair", ("h5", "nifti"))


@pytest.mark.parametrize("broken", ["write_composite", "write_image"])
def test_what_fails_leaves_the_files_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def save(found: Registration) -> None:
        found.save(tmp_path, "pair", moving=moving_image(), like=fixed_image())

    save(MAPS["affine"])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    original: Callable[..., None] = getattr(transform_files, broken)

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"monai_ssl.apps.registration.result.{broken}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(MAPS["deformed"])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_without_h5py_the_format_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_files, "_HAS_H5PY", False)
    with pytest.raises(ValueError, match="pip install h5py"):
        transform_files.check_formats(("tfm", "h5"), torch.eye(4))
    transform_files.check_formats(("tfm", "nifti", "warped"), torch.eye(4))
