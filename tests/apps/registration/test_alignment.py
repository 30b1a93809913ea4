# SPDX-License-Identifier: Apache-2.0
"""What is known of pairs before a network sees them, and what its answer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_ssl.apps import (
    PointMatcher,
    align_pairs,
    embedding_transform,
    load_embedder,
    read_alignment,
    write_alignment,
)
from monai_ssl.apps.registration import AlignPaird, RegisteredPaird, Registration, initial_displacement
from monai_ssl.losses import RegistrationLoss
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet

SIZE = (9, 10, 12)
OBLIQUE = torch.tensor([[0.0, 1.5, 0.2, 7], [-2.0, 0, 0, 3], [0.3, 0, 3.0, -4], [0, 0, 0, 1]], dtype=torch.float64)
MOVING = torch.tensor([[1.0, 0, 0, -8], [0, -2.0, 0, 14], [0, 0, 2.5, -1], [0, 0, 0, 1]], dtype=torch.float64)


def registration(displacement: Tensor | None = None, shift: tuple[float, ...] = (1.0, -2.0, 0.5)) -> Registration:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] += torch.tensor([[0.05, 0.02, 0], [-0.03, -0.04, 0], [0, 0.01, 0.02]], dtype=torch.float64)
    affine[:3, 3] = torch.tensor(shift)
    points = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    return Registration(affine, displacement, OBLIQUE, SIZE, points, torch.ones(2), {"counts": 2})


def smooth_field(seed: int = 0, size: float = 1.0) -> Tensor:
    nodes = torch.randn(1, 3, 2, 2, 2, generator=torch.Generator().manual_seed(seed)) * size
    return nn.functional.interpolate(nodes, SIZE, mode="trilinear", align_corners=True)[0]


def coordinates(affine: Tensor, size: tuple[int, ...]) -> MetaTensor:
    """Each voxel's value is its place in the world, three channels."""
    index = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in size), indexing="ij"))
    world = torch.einsum("ij,j...->i...", affine[:3, :3], index) + affine[:3, 3].view(3, 1, 1, 1)
    return MetaTensor(world.float(), affine=affine)


def test_a_registration_comes_back_from_its_file(tmp_path: Path) -> None:
    """To the bit without displacement; a trilinear one exactly too, since nodes of 2 lie at the corners."""
    plain = registration()
    write_alignment(tmp_path / "deep" / "a.pt", plain)
    found = read_alignment(tmp_path / "deep" / "a.pt")
    for name in ("affine", "grid_affine", "points", "scores"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert found.displacement is None
    assert found.grid_size == SIZE
    bent = registration(smooth_field())
    write_alignment(tmp_path / "b.pt", bent)
    torch.testing.assert_close(read_alignment(tmp_path / "b.pt").displacement, bent.displacement, atol=1e-5, rtol=0)
    assert (tmp_path / "b.pt").stat().st_size < 8000


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds no registration"):
        read_alignment(tmp_path / "model.pt")


def test_the_network_is_shown_the_moving_image_where_the_alignment_puts_it() -> None:
    """On coordinate images: what is shown at fixed voxel x is T(x), exactly where the moving image reaches."""
    earlier = registration(smooth_field(1))
    moving, fixed = coordinates(MOVING, (40, 30, 32)), coordinates(OBLIQUE, SIZE)
    d = AlignPaird()({"moving": moving, "fixed": fixed, "alignment": earlier})
    assert d["image"].shape == (6, *SIZE)
    torch.testing.assert_close(d["image"].affine, OBLIQUE)
    world = fixed.as_tensor().flatten(1).T.double()
    there = earlier.map_points(world).T.reshape(3, *SIZE).float()
    index = torch.einsum(
        "ij,j...->i...", torch.linalg.inv(MOVING)[:3, :3].float(), there - MOVING[:3, 3].float().view(3, 1, 1, 1)
    )
    inside = ((index >= 0) & (index <= torch.tensor([39.0, 29, 31]).view(3, 1, 1, 1))).all(0)
    assert inside.float().mean() > 0.7
    torch.testing.assert_close(d["image"].as_tensor()[:3][:, inside], there[:, inside], atol=2e-3, rtol=0)
    assert torch.equal(d["image"].as_tensor()[3:], fixed.as_tensor())


def test_the_loss_sees_the_alignment_that_the_network_is_shown() -> None:
    """With no velocity the loss compares the fixed image with what AlignPaird shows of the moving one."""
    earlier = registration(smooth_field(2))
    generator = torch.Generator().manual_seed(0)
    moving = MetaTensor(torch.rand(1, 20, 22, 24, generator=generator), affine=MOVING)
    fixed = MetaTensor(torch.rand(1, *SIZE, generator=generator), affine=OBLIQUE)
    d = AlignPaird()({"moving": moving, "fixed": fixed, "alignment": earlier})
    target = {"moving": moving.as_tensor()[None], "fixed": fixed.as_tensor()[None], "initial": d["initial"][None]}
    loss = RegistrationLoss(smoothness_weight=0.0)(torch.zeros(1, 3, *SIZE), target)
    shown, seen = d["image"].as_tensor().flatten(1).double()
    expected = 1 - torch.corrcoef(torch.stack([shown, seen]))[0, 1]
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("padded", [SIZE, (12, 12, 16)], ids=["own grid", "padded"])
def test_an_answer_of_one_voxel_moves_the_fixed_side_by_one_voxel(padded: tuple[int, ...]) -> None:
    earlier = registration(smooth_field(3, 0.2))
    fixed, moving = coordinates(OBLIQUE, padded), coordinates(MOVING, (20, 22, 24))
    answer = torch.zeros(3, *padded)
    answer[1] = 1.0
    d = RegisteredPaird(num_steps=0)({"pred": answer, "fixed": fixed, "moving": moving, "alignment": earlier})
    inner = torch.tensor([[3.0, 4.0, 5.0], [2.5, 3.0, 7.0]], dtype=torch.float64)
    step = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    world, beside = ((OBLIQUE[:3, :3] @ v.T + OBLIQUE[:3, 3:]).T for v in (inner, inner + step))
    torch.testing.assert_close(d["registration"].map_points(world), earlier.map_points(beside), atol=2e-3, rtol=0)
    assert d["ddf"].shape == (3, *padded)
    assert d["moved"].shape == d["target"].shape == (3, *padded)


def write(path: Path, values: np.ndarray, affine: Tensor) -> str:
    image = nibabel.Nifti1Image(values, affine.numpy())
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return str(path)


def test_labels_points_and_scans_are_judged_on_the_fixed_scan(tmp_path: Path) -> None:
    """The moving scan is the fixed one 2 voxels further along the first axis: moved there, labels agree."""
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    label = np.zeros((10, 8, 7), np.uint8)
    label[2:5, 2:6, 1:5] = 2
    moved = np.roll(label, 2, 0)
    pair = {
        f"{role}_label": write(tmp_path / f"{role}.nii.gz", v, affine)
        for role, v in (("moving", moved), ("fixed", label))
    }
    pair |= {f"{role}_file": pair[f"{role}_label"] for role in ("moving", "fixed")}
    image = MetaTensor(torch.from_numpy(label.astype(np.float32))[None], affine=affine)
    known = Registration(torch.eye(4).double(), None, affine, (10, 8, 7), torch.zeros(0, 2, 3), torch.zeros(0), {})
    answer = torch.zeros(3, 10, 8, 7)
    answer[0] = 2.0
    points = {"fixed_points": torch.tensor([[6.0, 9, 8]]), "moving_points": torch.tensor([[10.0, 9, 8]])}
    item: dict[str, Any] = {"pred": answer, "fixed": image, "moving": image, "alignment": known, **pair, **points}
    d = RegisteredPaird(num_steps=0, num_classes=3, warp=True)(item)
    assert torch.equal(d["pred"], d["label"])
    assert d["pred"].shape == (3, 10, 8, 7)
    assert float((d["before"][2] * d["label"][2]).sum() / d["label"][2].sum()) == pytest.approx(1 / 3)
    torch.testing.assert_close(d["points"], d["target_points"])
    assert float((d["points_before"] - d["target_points"]).norm()) == pytest.approx(4.0)
    assert np.array_equal(d["warped"].as_tensor()[0].numpy(), label)
    assert d["warped"].meta["filename_or_obj"] == pair["fixed_file"]


def embedder(width: int = 8) -> AnatomicalEmbeddingNet:
    encoder = AnisotropicResNet(base_channels=width)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, embed_dim=6)


def test_embedder_is_named_loaded_and_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embedder_file is empty"):
        load_embedder(embedder(), "")
    source, target = embedder(), embedder()
    assert load_embedder(target, "random") is target
    for prefix, name in (("", "sam.pt"), ("embedder.", "samreg.pt")):
        state = {f"{prefix}{k}": v for k, v in source.state_dict().items()}
        state |= {"unet.flow.bias": torch.zeros(3)} if prefix else {}
        torch.save(state, tmp_path / name)
        found = load_embedder(embedder(), tmp_path / name)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in found.state_dict().items())
        with pytest.raises(ValueError, match=name):
            load_embedder(embedder(width=4), tmp_path / name)
    with pytest.raises(
        ValueError, match=r"samreg.pt is another network: size mismatch .*\. Give base_channels and"
    ) as e:
        load_embedder(embedder(width=4), tmp_path / "samreg.pt")
    assert "\n" not in str(e.value)


def pairs_of(tmp_path: Path) -> list[dict[str, str]]:
    generator = np.random.default_rng(0)
    files = [
        write(tmp_path / f"{n}.nii.gz", generator.normal(0, 200, (20, 24, 22)).astype(np.float32), 4 * torch.eye(4))
        for n in "ab"
    ]
    return [
        {"moving": files[0], "fixed": files[1], "name": "a to b"},
        {"moving": files[1], "fixed": files[0], "name": "b to a"},
    ]


def test_pairs_are_aligned_once_and_those_that_cannot_be_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_ssl.apps.registration import alignment

    calls: list[str] = []

    def register(moving: str, fixed: str, *_: Any, **__: Any) -> Registration:
        calls.append(moving)
        if moving.endswith("b.nii.gz"):
            raise ValueError("3 of 20 matches are left")
        return registration()

    monkeypatch.setattr(alignment, "register", register)
    pairs, matcher, folder = pairs_of(tmp_path), PointMatcher(embedder(), device="cpu"), tmp_path / "kept"
    for _ in range(2):  # the second time from the files, the refusal too
        with pytest.warns(UserWarning, match=r"1 of 2 pairs cannot be aligned.*b to a \(3 of 20"):
            found = align_pairs(pairs, matcher, folder, progress=False, min_score=0.5)
        assert [pair["name"] for pair in found] == ["a to b"]
        assert torch.equal(read_alignment(found[0]["alignment"]).affine, registration().affine)
    assert len(calls) == 2
    with pytest.warns(UserWarning, match="left out"):
        align_pairs(pairs, matcher, folder, progress=False, min_score=0.6)  # other options, other files
    assert len(calls) == 4
    again = PointMatcher(matcher.network, embedding_transform(), "cpu", body_threshold=-17.4)  # as another process does
    with pytest.warns(UserWarning, match="left out"):
        align_pairs(pairs, again, folder, progress=False, min_score=0.6)
    assert len(calls) == 4
    finer = PointMatcher(matcher.network, embedding_transform({"spacing": 1.0}), "cpu", body_threshold=-17.4)
    with pytest.warns(UserWarning, match="left out"):
        align_pairs(pairs, finer, folder, progress=False, min_score=0.6)  # another input of the network, too
    assert len(calls) == 6
    with pytest.raises(ValueError, match=r"none of 1 pairs can be aligned; b to a: 3 of 20"):
        align_pairs(pairs[1:], matcher, folder, progress=False, min_score=0.5)


def test_each_process_takes_its_share_whatever_the_others_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process has written its pair before the second one looks for files: that one still does its own."""
    from monai_ssl.apps.registration import alignment

    calls: list[str] = []

    def register(moving: str, *_: Any, **__: Any) -> Registration:
        calls.append(moving)
        return registration()

    monkeypatch.setattr(alignment, "register", register)
    pairs, matcher, folder = pairs_of(tmp_path), PointMatcher(embedder(), device="cpu"), tmp_path / "kept"
    align_pairs(pairs[:1], matcher, folder, progress=False)
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2, "barrier": None}.items():
        monkeypatch.setattr(alignment.dist, name, lambda value=value: value)
    found = align_pairs(pairs, matcher, folder, progress=False)
    assert [pair["name"] for pair in found] == ["a to b", "b to a"]
    assert calls == [pairs[0]["moving"], pairs[1]["moving"]]


def test_a_transform_that_cannot_be_told_again_is_refused(tmp_path: Path) -> None:
    matcher = PointMatcher(embedder(), lambda image: image, device="cpu")
    with pytest.raises(ValueError, match=r"transform of matcher .* lambda"):
        align_pairs(pairs_of(tmp_path), matcher, tmp_path / "kept", steps=(), progress=False)


def test_without_steps_scans_lie_in_one_world_and_known_alignments_are_kept(tmp_path: Path) -> None:
    pairs, matcher = pairs_of(tmp_path), PointMatcher(embedder(), device="cpu")
    write_alignment(tmp_path / "known.pt", registration())
    given = [pairs[0], {**pairs[1], "alignment": str(tmp_path / "known.pt")}]
    found = align_pairs(given, matcher, tmp_path / "kept", steps=(), progress=False)
    first = read_alignment(found[0]["alignment"])
    assert torch.equal(first.affine, torch.eye(4, dtype=torch.float64))
    assert first.grid_size == tuple(matcher.prepare(pairs[0]["fixed"]).shape[1:])
    assert found[1]["alignment"] == str(tmp_path / "known.pt")


def test_initial_displacement_of_a_scan_in_itself_is_nothing() -> None:
    image = coordinates(OBLIQUE, SIZE)
    still = Registration(torch.eye(4).double(), None, OBLIQUE, SIZE, torch.zeros(0, 2, 3), torch.zeros(0), {})
    assert float(initial_displacement(still, image, image).abs().max()) < 1e-6
