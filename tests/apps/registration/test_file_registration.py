# SPDX-License-Identifier: Apache-2.0
"""Images with two axes, and statistics of the Jacobian; the rest is in tests/test_registration_commands.py."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from known_transforms import AFFINE, GRID, SIZE, result, rough

from monai_ssl.apps import jacobian_determinant, register_files
from monai_ssl.apps.registration import fields
from monai_ssl.apps.registration.fields import jacobian_statistics
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet, make_provenance, save_pretrained


def test_determinant_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as at once, whatever the slabs; the affine's own where there is no displacement."""
    found = result(AFFINE, rough())
    whole = jacobian_determinant(found.ddf())
    for voxels in (1, 11 * 7 * 2, 11 * 7 * 4, 10**6):
        monkeypatch.setattr(fields, "_SLAB", voxels)
        torch.testing.assert_close(jacobian_determinant(found.ddf()), whole)
    assert whole.shape == (1, *SIZE)
    torch.testing.assert_close(
        jacobian_determinant(result(AFFINE).ddf()),
        torch.full((1, *SIZE), float(torch.linalg.det(AFFINE))),
        atol=1e-4,
        rtol=0,
    )
    assert found.grid_affine.equal(GRID)


def test_statistics_by_hand() -> None:
    determinant = torch.tensor([[1.0, 4.0], [0.0, -2.0]])
    log = np.log(4) / 2  # of 0 and log 4: both are this far from their mean
    assert jacobian_statistics(determinant) == pytest.approx(
        {"folding_share": 0.5, "sdlogj": log, "min": -2.0, "max": 4.0}
    )
    assert jacobian_statistics(-determinant[:1])["sdlogj"] is None


def test_what_the_steps_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images with the names of their files, the seed, and every further option as it is."""
    model, (moving, fixed) = embedding(tmp_path), (picture(tmp_path, name, (0, 0)) for name in ("moving", "fixed"))
    seen: list[dict[str, Any]] = []

    def fake(**options: Any) -> None:
        seen.append(options)
        raise KeyError

    monkeypatch.setattr(import_module("monai_ssl.apps.registration.file_registration"), "register", fake)
    for seed in (0, 7):
        with pytest.raises(KeyError):
            register_files(moving, fixed, model, tmp_path, " affine, coarse", seed=seed, stride=3, method="ransac")
    assert [call.pop("generator").initial_seed() for call in seen] == [0, 7]
    for name, file in (("moving", moving), ("fixed", fixed)):
        assert seen[0].pop(name).meta["filename_or_obj"] == str(file)
    assert seen[0].pop("matcher").spatial_dims == 2
    assert seen[0] == {"steps": ("affine", "coarse"), "network": None, "stride": 3, "method": "ransac"}


def embedding(folder: Path) -> Path:
    """An untrained network for images with two axes."""
    torch.manual_seed(0)
    encoder = AnisotropicResNet(2, base_channels=4)
    origin = make_provenance("SAM", "2012.02383", {}, {"spacing": 2.0, "percentiles": [0, 100]})
    net = AnatomicalEmbeddingNet(encoder, encoder.channels, 2, embed_dim=16)
    return save_pretrained(net.eval(), folder / "sam.pt", origin)


def picture(folder: Path, name: str, origin: tuple[float, float]) -> Path:
    """One picture of blobs, as NIfTI of two axes, somewhere in the world."""
    rows, columns = np.mgrid[:56, :64]
    generator = np.random.default_rng(0)
    places, heights = generator.uniform(5, 52, (25, 2)), generator.uniform(20, 200, 25)
    blobs = [h * np.exp(-((rows - a) ** 2 + (columns - b) ** 2) / 30) for (a, b), h in zip(places, heights)]
    affine = np.diag([2.0, 2.0, 1.0, 1.0])
    affine[:2, 3] = origin
    nib.save(nib.Nifti1Image(np.sum(blobs, 0).astype(np.float32), affine), folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


def test_images_with_two_axes(tmp_path: Path) -> None:
    """By default what can be written of them; ITK's formats are refused before anything is computed."""
    moving, fixed = picture(tmp_path, "moving", (100, -40)), picture(tmp_path, "fixed", (0, 0))
    given: dict[str, Any] = {"model": embedding(tmp_path), "output_dir": tmp_path / "out", "stride": 4}
    with pytest.raises(ValueError, match=r'in 2D formats must be \("warped",\)'):
        register_files(moving, fixed, **given, formats=["tfm"])
    assert not (tmp_path / "out").exists()
    report = register_files(moving, fixed, **given)
    assert report["files"] == ["moving_to_fixed_warped.nii.gz", "moving_to_fixed.png"]
    warped, truth = (nib.load(f).get_fdata() for f in (tmp_path / "out" / report["files"][0], fixed))
    assert np.abs(warped - truth)[6:-6, 6:-6].mean() < 0.2 * truth.std()  # about 0.1; 1 where they do not meet
    assert np.abs(truth[6:-6, 6:-6]).mean() > truth.std() / 2  # there is something to see
