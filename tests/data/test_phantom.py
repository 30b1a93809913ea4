# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from monai_ssl.data import PHANTOM_LABELS, PhantomVolume, torso_phantom

NAMES = list(PHANTOM_LABELS)
SIZE = (48, 40, 36)


@pytest.fixture(scope="module")
def subjects() -> list[PhantomVolume]:
    return [torso_phantom(subject, SIZE) for subject in range(8)]


def centroids(volume: PhantomVolume) -> np.ndarray:
    """World centre (L, 3) in mm of every label."""
    out = []
    for value in PHANTOM_LABELS.values():
        index = np.argwhere(volume.label == value).mean(axis=0)
        out.append(volume.affine[:3, :3] @ index + volume.affine[:3, 3])
    return np.array(out)


def organ_of(landmark: str) -> str:
    return max((name for name in NAMES if landmark.startswith(name)), key=len)


def test_same_subject_is_the_same_whatever_was_drawn_before():
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    first = torso_phantom(5, (20, 17, 14), seed=2)
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(4)
    torso_phantom(0, (9, 8, 7))
    second = torso_phantom(5, (20, 17, 14), seed=2)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label, second.label)
    assert np.array_equal(first.affine, second.affine)
    assert first.landmarks.keys() == second.landmarks.keys()
    assert all(np.array_equal(point, second.landmarks[name]) for name, point in first.landmarks.items())


@pytest.mark.parametrize("other", [{"subject": 1, "seed": 0}, {"subject": 0, "seed": 1}])
def test_another_subject_or_seed_is_another_anatomy(subjects, other):
    ours, theirs = subjects[0], torso_phantom(size=SIZE, **other)
    body = (ours.label > 0) | (theirs.label > 0)
    assert (ours.label != theirs.label)[body].mean() > 0.1
    assert np.linalg.norm(ours.landmarks["liver"] - theirs.landmarks["liver"]) > 1


@pytest.mark.parametrize(
    ("size", "spacing", "shape", "step"),
    [
        ((40, 33, 28), None, (40, 33, 28), (384 / 40, 320 / 33, 384 / 28)),
        ((40, 33, 28), (7.5, 8, 11), (40, 33, 28), (7.5, 8, 11)),
        (16, 20.0, (16, 16, 16), (20, 20, 20)),
        ((1, 5, 3), [1, 2, 3], (1, 5, 3), (1, 2, 3)),
    ],
)
def test_size_and_spacing_are_those_asked_for(size, spacing, shape, step):
    volume = torso_phantom(0, size, spacing)
    assert volume.image.shape == volume.label.shape == shape
    assert (volume.image.dtype, volume.label.dtype) == (np.float32, np.uint8)
    assert nib.affines.voxel_sizes(volume.affine) == pytest.approx(step)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    middle = volume.affine @ [*(np.array(shape) - 1) / 2, 1]
    assert middle == pytest.approx([0, 0, 0, 1])


def test_anatomy_does_not_depend_on_the_grid():
    """Odd sizes share their middle voxel: every second voxel of the fine grid and a part of the coarse one coincide."""
    coarse = torso_phantom(3, (41, 35, 29), (9, 9, 12))
    fine = torso_phantom(3, (81, 69, 57), (4.5, 4.5, 6))
    part = torso_phantom(3, (21, 19, 17), (9, 9, 12))
    assert (fine.label[::2, ::2, ::2] != coarse.label).mean() < 1e-4
    assert (coarse.label[10:31, 8:27, 6:23] != part.label).mean() < 1e-4
    # what is left of the difference is noise: of this 6 spreads of 18 HU on either side is far too much
    assert np.abs(coarse.image[10:31, 8:27, 6:23] - part.image).max() < 150
    for volume in (fine, part):
        assert all(np.allclose(point, volume.landmarks[name]) for name, point in coarse.landmarks.items())


def test_organs_lie_at_the_same_place_at_two_resolutions():
    coarse, fine = centroids(torso_phantom(6, (40, 33, 28))), centroids(torso_phantom(6, (80, 72, 64)))
    inside = [name not in ("background", "pelvis") for name in NAMES]  # these two are cut by the border of the grid
    assert np.abs(coarse - fine)[inside].max() < 6  # less than a voxel of the coarse grid


def test_every_label_in_every_subject_and_nothing_else(subjects):
    for volume in subjects:
        assert np.unique(volume.label).tolist() == list(PHANTOM_LABELS.values())
    assert list(PHANTOM_LABELS.values()) == list(range(16))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("background", -1000, -880),
        ("lung_right", -870, -600),
        ("lung_left", -870, -600),
        ("heart", 10, 250),
        ("aorta", 10, 420),
        ("liver", 20, 200),
        ("spleen", 20, 200),
        ("kidney_right", 0, 260),
        ("kidney_left", 0, 260),
        ("spine", 200, 600),
        ("ribs", 200, 800),
        ("sternum", 150, 800),
        ("pelvis", 150, 800),
    ],
)
def test_mean_hu_of_each_label(subjects, name, low, high):
    for volume in subjects:
        assert low < volume.image[volume.label == PHANTOM_LABELS[name]].mean() < high


def test_values_are_whole_hounsfield_units_of_a_scanner(subjects):
    for volume in subjects:
        assert np.array_equal(volume.image, np.rint(volume.image))
        assert volume.image.min() >= -1024
        assert volume.image.max() <= 3071
        assert volume.image.max() > 300  # bone, though thinner than these voxels


def test_air_in_front_and_a_table_behind(subjects):
    for volume in subjects:
        assert volume.image[:, -2:].mean() < -970
        assert not volume.label[:, -2:].any()
        assert not volume.label[:, :3].any()
        table = (volume.image > -700) & (volume.label == 0)
        assert table[:, :8].any(axis=(1, 2)).mean() > 0.8  # across the field of view
        assert table[:, :8].any(axis=(0, 1)).all()  # along the whole of it
        assert not table[:, -2:].any()


def test_organs_lie_where_anatomy_has_them(subjects):
    for volume in subjects:
        at = dict(zip(NAMES, centroids(volume)))
        for organ in ("lung", "kidney"):
            assert at[f"{organ}_right"][0] > 30  # +x is the patient's right
            assert at[f"{organ}_left"][0] < -30
        assert at["liver"][0] > 30
        assert at["spleen"][0] < -50
        assert at["stomach"][0] < -20
        assert at["heart"][0] < 0
        assert at["sternum"][1] > at["heart"][1] > at["spine"][1]
        assert at["aorta"][1] > at["spine"][1]
        heights = [at[name][2] for name in ("lung_right", "heart", "liver", "kidney_right", "bowel", "pelvis")]
        assert heights == sorted(heights, reverse=True)


def test_landmarks_lie_in_their_organ(subjects):
    for volume in [*subjects, *(torso_phantom(subject, (64, 54, 64), seed=11) for subject in range(6))]:
        inverse = np.linalg.inv(volume.affine)
        for name, point in volume.landmarks.items():
            voxel = np.rint(inverse @ [*point, 1])[:3].astype(int)
            assert NAMES[volume.label[tuple(voxel)]] == organ_of(name), name


def test_landmarks_of_the_spine_go_down_by_one_vertebra_after_the_other(subjects):
    for volume in subjects:
        heights = [volume.landmarks[f"spine_{name}"][2] for name in ("T2", "T6", "T10", "T12", "L1", "L2", "L3")]
        assert (np.diff(heights) < -15).all()


def test_subjects_differ_in_place_size_and_contrast(subjects):
    centres = np.array([centroids(volume) for volume in subjects])  # (S, L, 3)
    counts = np.array([np.bincount(volume.label.ravel(), minlength=16) for volume in subjects])
    for name in ("liver", "spleen", "kidney_right", "kidney_left", "heart", "lung_right", "stomach"):
        value = PHANTOM_LABELS[name]
        assert np.linalg.norm(centres[:, value].std(axis=0)) > 4, name  # mm
        assert counts[:, value].std() / counts[:, value].mean() > 0.07, name
    # not merely larger or smaller people: organs vary against each other
    for one, other in (("kidney_right", "kidney_left"), ("liver", "heart")):
        ratio = counts[:, PHANTOM_LABELS[one]] / counts[:, PHANTOM_LABELS[other]]
        assert np.log(ratio).std() > 0.13, (one, other)
    aorta = [volume.image[volume.label == PHANTOM_LABELS["aorta"]].mean() for volume in subjects]
    assert np.ptp(aorta) > 80


def test_lungs_hold_vessels():
    volume = torso_phantom(1, (96, 80, 64))
    for name in ("lung_right", "lung_left"):
        inside = binary_erosion(volume.label == PHANTOM_LABELS[name], iterations=2)
        assert 0.02 < (volume.image[inside] > -600).mean() < 0.15
        assert np.median(volume.image[inside]) < -750


def test_tissue_has_texture_and_noise(subjects):
    """Neighbours in the liver differ by noise; the mean over blocks still varies, which white noise would not allow."""
    volume = torso_phantom(0, (96, 80, 64))
    liver = np.where(volume.label == PHANTOM_LABELS["liver"], volume.image, np.nan)
    assert 4 < np.nanstd(np.diff(liver, axis=2)) < 40
    blocks = liver.reshape(24, 4, 20, 4, 32, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 32)
    blocks = blocks[~np.isnan(blocks).any(axis=1)].mean(axis=1)
    assert len(blocks) > 50
    assert blocks.std() > 2 * np.nanstd(np.diff(liver, axis=2)) / np.sqrt(2 * 32)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("subject", {"subject": -1}),
        ("subject", {"subject": 0.5}),
        ("seed", {"subject": 0, "seed": -1}),
        ("size", {"subject": 0, "size": (4, 4)}),
        ("size", {"subject": 0, "size": (4, 0, 4)}),
        ("size", {"subject": 0, "size": 4.5}),
        ("spacing", {"subject": 0, "size": 4, "spacing": (1, 2)}),
        ("spacing", {"subject": 0, "size": 4, "spacing": (1, -2, 3)}),
        ("spacing", {"subject": 0, "size": 4, "spacing": float("nan")}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        torso_phantom(**arguments)
