# SPDX-License-Identifier: Apache-2.0
"""A scan and the same scan elsewhere in the world, stored along other axes: what registration must find is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from nibabel.affines import apply_affine

from monai_ssl.__main__ import main
from monai_ssl.apps import register_files
from monai_ssl.data import torso_phantom
from monai_ssl.networks import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    EmbeddingRegistrationNet,
    RegistrationUNet,
    make_provenance,
    save_pretrained,
)

SIZE, SHIFT = (44, 36, 48), np.array([120.0, -1000.0, 30.0])
ENDINGS = ["_affine.tfm", ".h5", "_displacement.nii.gz", "_warped.nii.gz", ".png"]
QUICK = ["--stride", "4", "--device", "cpu"]


def stored(array: np.ndarray, affine: np.ndarray, file: Path) -> None:
    """Along the axes left, superior, posterior."""
    order = nib.orientations.axcodes2ornt("LSP")
    image = nib.Nifti1Image(array, affine)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), order)), file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans and label maps, an embedding in sam.pt and a registration bundle."""
    root = tmp_path_factory.mktemp("registration")
    volume = torso_phantom(0, SIZE, 8.0)
    moved = volume.affine.copy()
    moved[:3, 3] += SHIFT
    nib.save(nib.Nifti1Image(volume.image.astype(np.int16), volume.affine), root / "fixed.nii.gz")
    stored(volume.image.astype(np.int16), moved, root / "moving.nii.gz")
    nib.save(nib.Nifti1Image(volume.label, volume.affine), root / "fixed_label.nii.gz")
    stored(volume.label, moved, root / "moving_label.nii.gz")
    stored((volume.label > 0).astype(np.uint8), moved, root / "moving_mask.nii.gz")
    torch.manual_seed(0)
    encoder = AnisotropicResNet(base_channels=4)
    embedder = AnatomicalEmbeddingNet(encoder, encoder.channels, embed_dim=16).eval()
    unet = RegistrationUNet(feature_channels=27, channels=(2, 2), up_channels=(2, 2))
    origin = make_provenance("any", "2109.11572", {}, {"spacing": 8.0})
    save_pretrained(embedder, root / "sam.pt", origin)
    network = EmbeddingRegistrationNet(embedder, unet)
    save_pretrained(network, root / "bundle" / "models" / "model.pt", origin)
    return root


def command(folder: Path, *arguments: str, **files: str) -> int:
    given: dict[str, str] = {"moving": "moving.nii.gz", "fixed": "fixed.nii.gz", "model": "sam.pt", **files}
    return main(["register", *(f"--{key}={folder / value}" for key, value in given.items()), *QUICK, *arguments])


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def check_found(out: Path, folder: Path) -> None:
    """T is the shift, in each of the files."""
    text = (out / "moving_to_fixed_affine.tfm").read_text()
    numbers = [float(v) for v in text.split("Parameters: ")[1].splitlines()[0].split()]
    np.testing.assert_allclose(np.reshape(numbers[:9], (3, 3)), np.eye(3), atol=0.02)
    fixed = nib.load(folder / "fixed.nii.gz")
    field = nib.load(out / "moving_to_fixed_displacement.nii.gz")
    inner = np.asarray(field.dataobj)[8:-8, 8:-8, 8:-8, 0]
    assert np.abs(inner * [-1, -1, 1] - SHIFT).mean() < 1  # voxels have 8 mm
    warped = nib.load(out / "moving_to_fixed_warped.nii.gz")
    np.testing.assert_allclose(warped.affine, fixed.affine)
    difference = np.abs(np.asarray(warped.dataobj) - np.asarray(fixed.dataobj))[4:-4, 4:-4, 4:-4]
    assert difference.mean() < 25  # HU, of 1000 from air to tissue


def test_register(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All files, right ones, named in what is printed; the label map on the fixed grid."""
    out, before = tmp_path / "out", tree(folder)
    assert command(folder, f"--out={out}", f"--labels={folder / 'moving_label.nii.gz'}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["embed", "affine", "coarse", "folding", f"results in {out}"]
    names = [*(f"moving_to_fixed{e}" for e in [*ENDINGS[:4], "_labels.nii.gz", ENDINGS[4]]), "report.json"]
    assert lines[-1] == f"results in {out}: {', '.join(names)}"
    assert sorted(file.name for file in tree(tmp_path)) == sorted(names)
    assert tree(folder) == before
    report = json.loads((out / "report.json").read_text())
    assert report["files"] == names[:-1]
    assert report["chosen_steps"] == ["affine", "coarse"]
    matches = f"{report['counts']['cycle']} matches kept of {report['counts']['grid']} grid points, "
    for line, (step, beginning) in zip(lines[1:3], (("affine", matches), ("coarse", ""))):
        measured = report["steps"][step]
        residual = f"residual {measured['residual_mean_mm']:.1f} mm, median {measured['residual_median_mm']:.1f} mm"
        assert line == f"{step}: {beginning}{residual}, {measured['seconds']:.1f} s"
    jacobian = report["jacobian"]
    assert (
        lines[3] == f"folding: {100 * jacobian['folding_share']:.2g} % of the voxels, SDlogJ {jacobian['sdlogj']:.3f}"
    )
    assert jacobian["min"] <= 1 <= jacobian["max"]
    check_found(out, folder)
    labels, truth = nib.load(out / "moving_to_fixed_labels.nii.gz"), nib.load(folder / "fixed_label.nii.gz")
    assert labels.get_data_dtype() == np.int16
    np.testing.assert_allclose(labels.affine, truth.affine)
    assert (np.asarray(labels.dataobj) == np.asarray(truth.dataobj)).mean() > 0.95


def test_all_steps_of_a_registration_bundle(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deform is a step of its own accord where the model can; an untrained network moves nothing."""
    assert command(folder, f"--out={tmp_path / 'a'}", "--no_picture", model="bundle") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][:4] == [
        "embed", "affine", "coarse", "deform",
    ]  # fmt: skip
    check_found(tmp_path / "a", folder)
    assert not list((tmp_path / "a").glob("*.png"))
    steps = ["--steps", "affine, instance", "--instance_steps", "2", "--formats", "tfm", "--no_picture"]
    assert command(folder, f"--out={tmp_path / 'b'}", *steps, model="bundle") == 0
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["chosen_steps"] == ["affine", "instance"]
    assert report["files"] == ["moving_to_fixed_affine.tfm"]
    assert set(report["seconds"]) == {"embed", "match", "affine", "instance"}


class Recorder:
    """In place of `register_files`."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        self.arguments, self.options = arguments, options
        return {"steps": {}, "files": [], "jacobian": {"folding_share": 0.25, "sdlogj": None}}


def bundle_run(bundle: Path, overrides: Mapping[str, Any]) -> Any:
    parser = ConfigParser(ConfigParser.load_config_files([str(bundle / "configs" / "register.yaml")]))
    parser.update({**overrides, "bundle_root": str(bundle)})
    return parser.get_parsed_content("run")[0]


def test_the_bundle_does_the_same(tmp_path: Path, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`register.yaml` and the command call one function with one meaning of every option."""
    calls = [Recorder(), Recorder()]
    monkeypatch.setattr("monai_ssl.registration_commands.register_files", calls[0])
    monkeypatch.setattr("monai_ssl.apps.register_files", calls[1])
    options = {"method": "ransac", "matching": "stable", "min_score": 0.6, "node_spacing": 6, "smoothness": 0.3}
    options |= {"max_residual": 25.0, "instance_steps": 2, "instance_smoothness": 900.0, "seed": 3, "stride": 5}
    options |= {"moving": "a", "fixed": "b", "model": "m", "moving_mask": "c", "fixed_mask": "d", "labels": "e"}
    options |= {"formats": "tfm,h5", "cache_dir": "f", "slab_size": 8, "spacing": 3.0, "device": "cpu"}
    given = [f"--{key}={value}" for key, value in options.items()]
    given += ["--out=o", "--steps=affine,coarse", "--coarse_steps=9", "--no_picture", "--percentiles", "1", "99"]
    assert main(["register", *given]) == 0
    overrides = {**options, "output_dir": "o", "stages": "affine,coarse", "steps": 9, "picture": False}
    bundle_run(bundles / "samreg_unet_ct", {**overrides, "percentiles": [1.0, 99.0]})
    assert calls[0].arguments == calls[1].arguments == ("a", "b", "m", "o", "affine,coarse")
    assert calls[0].options.pop("provenance") is None
    assert calls[0].options == calls[1].options
    main(["register", "--moving=a", "--fixed=b", "--model=m", "--out=o"])
    bundle_run(bundles / "samreg_unet_ct", {"moving": "a", "fixed": "b", "model": "m", "output_dir": "o"})
    assert calls[0].options.pop("provenance") is None
    for call in calls:
        call.options["matcher_options"].pop("device")
    assert calls[0].options == calls[1].options  # the defaults
    assert calls[0].arguments == calls[1].arguments


def test_the_bundle_runs(folder: Path, tmp_path: Path, bundles: Path) -> None:
    """Names of stages as fire reads them from the command line; nothing is written outside of output_dir."""
    bundle = shutil.copytree(bundles / "samreg_unet_ct" / "configs", tmp_path / "bundle" / "configs").parent
    shutil.copytree(folder / "bundle" / "models", bundle / "models")
    before = tree(tmp_path)
    overrides = {"moving": str(folder / "moving.nii.gz"), "fixed": str(folder / "fixed.nii.gz"), "picture": False}
    overrides |= {"stages": ("affine", "deform"), "formats": ["tfm"], "stride": 4, "device": "cpu"}
    report = bundle_run(bundle, {**overrides, "output_dir": str(tmp_path / "out")})
    assert tree(tmp_path) - before == {tmp_path / "out" / n for n in ("moving_to_fixed_affine.tfm", "report.json")}
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["steps"]) == {"embed", "affine", "deform"}


def test_options_reach_the_steps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the command line is an argument of `register_files`, and none is lost."""
    call = Recorder()
    monkeypatch.setattr("monai_ssl.registration_commands.register_files", call)
    given = ["--spacing", "3", "--percentiles", "1", "99", "--cache_dir", "c", "--slab_size", "8", "--seed", "5"]
    given += ["--provenance", "p.json", "--fixed_mask", "m", "--smoothness", "0.5", "--coarse_steps", "7"]
    assert command(folder, f"--out={tmp_path}", "--steps", "affine", *given) == 0
    assert call.arguments[1:] == (str(folder / "fixed.nii.gz"), str(folder / "sam.pt"), str(tmp_path), "affine")
    assert call.options == {
        "labels": None, "formats": None, "picture": True, "provenance": "p.json", "seed": 5, "stride": 4,
        "preprocessing": {"spacing": 3.0, "percentiles": [1.0, 99.0]}, "moving_mask": None, "fixed_mask": "m",
        "matcher_options": {"device": "cpu", "cache_dir": "c", "slab_size": 8}, "method": "huber", "matching": "cycle",
        "min_score": 0.7, "node_spacing": 16, "coarse_smoothness": 0.5, "max_residual": None, "coarse_steps": 7,
        "instance_steps": 50, "instance_smoothness": 1000.0,
    }  # fmt: skip


def test_cached_embeddings_and_masks(folder: Path, tmp_path: Path) -> None:
    options = ["--steps", "affine", "--formats", "tfm", "--no_picture", "--cache_dir", str(tmp_path / "cache")]
    counts = []
    for mask in ([], [f"--moving_mask={folder / 'part.nii.gz'}"]):
        whole = nib.load(folder / "moving_mask.nii.gz")
        part = np.asarray(whole.dataobj).copy()
        part[:, 3 * part.shape[1] // 4 :] = 0
        nib.save(nib.Nifti1Image(part, whole.affine), folder / "part.nii.gz")
        assert command(folder, f"--out={tmp_path / 'out'}", *options, *mask) == 0
        counts.append(json.loads((tmp_path / "out" / "report.json").read_text())["counts"]["moving_mask"])
    assert 0.5 * counts[0] < counts[1] < 0.9 * counts[0]
    assert len(list((tmp_path / "cache").iterdir())) == 2


FAULTS = [
    (
        ["--steps", "affine,corse"],
        "steps must be some of affine, coarse, deform, instance, each once and in this order",
    ),
    (["--steps", "coarse,affine"], "each once and in this order, got ('coarse', 'affine')"),
    (["--steps", ""], "steps must be some of"),
    (["--steps", "affine,deform"], "sam.pt holds an embedding alone: leave deform out of steps, or give a model of"),
    (["--formats", "tfm,hdf"], "formats must be a sequence of tfm, h5, nifti, warped, got ('tfm', 'hdf')"),
    (["--min_score", "1.3"], "min_score 1.3 accepts nothing"),
    (["--min_score", "1"], "points after each step"),
    (["--stride", "0"], "stride must be at least 1"),
    (["--node_spacing", "0"], "node_spacing must be at least 1"),
    (["--slab_size", "30"], "slab_size must be a whole number"),
    (["--device", "cuda:77"], "device cuda:77 cannot be used"),
    (["--spacing", "-2"], "preprocessing {'orientation': 'SPL', 'spacing': -2.0"),
    (["--labels", "none.nii"], "labels none.nii does not exist"),
    (["--fixed_mask", "none.nii"], "fixed_mask none.nii does not exist"),
]


@pytest.mark.parametrize("arguments, message", FAULTS)
def test_faults(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """One line each; nothing is written."""
    assert command(folder, f"--out={tmp_path / 'out'}", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_faults_of_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str, **files: str) -> str:
        assert command(folder, f"--out={tmp_path / 'out'}", *arguments, **files) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    fixed = nib.load(folder / "fixed.nii.gz")
    values = np.asarray(fixed.dataobj).astype(np.float32)
    values[5, 6, 7] = np.nan
    nib.save(nib.Nifti1Image(values, fixed.affine), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(np.full(SIZE, 2.5, np.float32), fixed.affine), folder / "halves.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(SIZE, np.uint8), fixed.affine), folder / "empty.nii.gz")
    (folder / "text.nii.gz").write_text("no image")
    assert "moving " in (text := error(moving="none.nii.gz"))
    assert "none.nii.gz does not exist" in text
    assert "text.nii.gz cannot be read as an image" in error(fixed="text.nii.gz")
    for role in ("moving", "fixed"):
        assert "nan.nii.gz holds NaN or infinite values: repair it" in error(**{role: "nan.nii.gz"})
    label = error(f"--labels={folder / 'fixed_label.nii.gz'}")
    assert "fixed_label.nii.gz (1, 44, 36, 48) must be one channel on the grid of moving" in label
    assert "resample it to that scan, by nearest neighbour" in label
    elsewhere = np.asarray(fixed.dataobj) > 0, nib.load(folder / "moving.nii.gz").affine  # same size, other place
    nib.save(nib.Nifti1Image(elsewhere[0].astype(np.uint8), elsewhere[1]), folder / "elsewhere.nii.gz")
    assert "on the grid of moving" in error(f"--labels={folder / 'elsewhere.nii.gz'}", moving="fixed.nii.gz")
    assert "holds values that are not whole numbers: is it a label map?" in error(
        f"--labels={folder / 'halves.nii.gz'}", moving="fixed.nii.gz"
    )
    assert "fixed_mask is empty" in error(f"--fixed_mask={folder / 'empty.nii.gz'}")
    assert "moving_mask" in error(f"--moving_mask={folder / 'fixed_label.nii.gz'}")  # far away in the world
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), folder / "other.pt")
    assert "other.pt holds no network that can be recognised" in error(model="other.pt")
    assert "none.pt" in error(model="none.pt")


def test_a_scan_onto_itself_may_have_one_name(folder: Path, tmp_path: Path) -> None:
    """Bytes of a label map with large and negative numbers survive."""
    fixed = nib.load(folder / "fixed.nii.gz")
    numbers = np.where(np.asarray(fixed.dataobj) > 0, 40000, -7).astype(np.int32)
    nib.save(nib.Nifti1Image(numbers, fixed.affine), folder / "large.nii.gz")
    scan = folder / "fixed.nii.gz"
    report = register_files(
        scan, scan, folder / "sam.pt", tmp_path, "affine", labels=folder / "large.nii.gz", formats=(), stride=4,
        picture=False,
    )  # fmt: skip
    assert report["files"] == ["fixed_to_fixed_labels.nii.gz"]
    found = np.asarray(nib.load(tmp_path / report["files"][0]).dataobj)
    assert found.dtype == np.int32
    assert (found == numbers)[2:-2, 2:-2, 2:-2].mean() > 0.98


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["register", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--moving MOVING" in text
    assert "voxels between the points that are matched; 8" in text


def test_places_of_the_test(folder: Path) -> None:
    """Both files show the same place at points that differ by the shift."""
    fixed, moving = nib.load(folder / "fixed.nii.gz"), nib.load(folder / "moving.nii.gz")
    place = apply_affine(fixed.affine, [20, 11, 30]) + SHIFT
    index = tuple(np.rint(apply_affine(np.linalg.inv(moving.affine), place)).astype(int))
    assert moving.shape == (SIZE[0], SIZE[2], SIZE[1])
    assert np.asarray(moving.dataobj)[index] == np.asarray(fixed.dataobj)[20, 11, 30]
