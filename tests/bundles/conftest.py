# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import pytest

from monai_ssl.data import torso_phantom

from .running import BUNDLES, NAMES, copy_bundle, item, make, run, settings_of
from .settings import CLASSES, NUM_VOLUMES, PATIENT, VOLUME_SIZE, BundleSettings

WARNINGS_OF_MONAI = (
    # torch 2.13 with numpy 2.2: a tensor is assigned to the pixdim of every NIfTI header
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # MetricsSaver summarises a class that no case has
    "ignore:Mean of empty slice:RuntimeWarning",
    "ignore:All-NaN:RuntimeWarning",
    "ignore:Degrees of freedom:RuntimeWarning",
)


# Bundles that differ from cpc_segresnet_ct in their task alone: what takes longest and has nothing to do with the task
# is run for that one at every commit, and for these under `make test-slow`
ALIKE = tuple(f"{name}_segresnet_ct" for name in ("exemplar", "jigsaw", "pgl", "rotation", "rpl"))
ONCE_FOR_ALIKE = (
    "test_federated_learning",
    "test_fewer_volumes_than_a_batch",
    "test_skip_bad_goes_on",
    "test_without_data_the_phantom_is_used",
)
# what starts processes, ten seconds and more; the further two are made of parts of others
STARTS_PROCESSES = (
    "test_command_line_writes_below_the_working_directory",
    "test_encoder_loads_without_this_package",
    "test_two_processes",
)
MADE_OF_OTHERS = ("classification_finetuning", "multi_task_pretraining")
FAILS_AT_EVERY_COMMIT = ("segmentation_finetuning", "voco_swinunetr_ct")  # a failing process, which all bundles share
# many patches of 32 voxels, which the windows of Swin fill badly; two other bundles do it at every commit. What jigsaw
# and rotation do with a UNet, rpl and exemplar do too. The released settings of VoCo differ in loss and augmentation,
# which are tested by themselves
SLOW_VARIANTS = (
    "cpc_segresnet_ct-swin_unetr.yaml",
    "jigsaw_segresnet_ct-swin_unetr.yaml",
    "jigsaw_segresnet_ct-unet.yaml",
    "multi_task_pretraining-swin_unetr.yaml",
    "pgl_segresnet_ct-swin_unetr.yaml",
    "rotation_segresnet_ct-swin_unetr.yaml",
    "rotation_segresnet_ct-unet.yaml",
    "rpl_segresnet_ct-swin_unetr.yaml",
    "voco_swinunetr_ct-released_cvpr.yaml",
    "voco_swinunetr_ct-released_v1.yaml",
    "voco_swinunetr_ct-released_v2.yaml",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for entry in items:
        if Path(__file__).parent in entry.path.parents:
            entry.add_marker(pytest.mark.filterwarnings(*WARNINGS_OF_MONAI))
            name, _, case = entry.name.partition("[")
            started = name in STARTS_PROCESSES and case.startswith(ALIKE + MADE_OF_OTHERS)
            once = name in ONCE_FOR_ALIKE and case.startswith(ALIKE)
            once |= name == "test_resume" and case.startswith(ALIKE) and case.endswith("after an epoch]")
            once |= name == "test_the_process_fails" and not case.startswith(FAILS_AT_EVERY_COMMIT)
            if started or once or case.rstrip("]") in SLOW_VARIANTS:
                entry.add_marker(pytest.mark.slow)


class Trained(NamedTuple):
    """A bundle after a whole training."""

    root: Path
    files: tuple[str, ...]
    overrides: dict[str, Any]
    working_directory: Path
    iterations: int


@pytest.fixture(scope="session", params=NAMES)
def bundle(request: pytest.FixtureRequest) -> Path:
    """Every folder of bundles/ in turn."""
    return BUNDLES / request.param


@pytest.fixture(scope="session")
def settings(bundle: Path) -> BundleSettings:
    return settings_of(bundle)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small phantom volumes with label maps and with classes, in files that are named after patients."""
    root = tmp_path_factory.mktemp("dataset")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for index in range(NUM_VOLUMES):
        phantom = torso_phantom(index, size=VOLUME_SIZE)
        for folder, voxels in (("images", phantom.image), ("labels", phantom.label)):
            image = nibabel.Nifti1Image(voxels, phantom.affine)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, root / folder / f"{PATIENT}{42 + index}.nii.gz")
    rows = [f"images/{PATIENT}{42 + index}.nii.gz,{CLASSES[index % 2]}" for index in range(NUM_VOLUMES)]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows, ""]))
    return root


@pytest.fixture(scope="session")
def scans(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the volumes, without labels."""
    root = tmp_path_factory.mktemp("scans")
    for path in sorted((dataset / "images").iterdir())[:2]:
        shutil.copy(path, root)
    return root


@pytest.fixture(scope="session")
def overrides(settings: BundleSettings, dataset: Path) -> dict[str, Any]:
    """What makes train.yaml small, on the data of the tests."""
    return {**settings.train, "dataset_dir": str(dataset)}


@pytest.fixture(scope="session")
def quick(settings: BundleSettings, dataset: Path) -> dict[str, Any]:
    """What makes the quick variant small, on the data of the tests."""
    return {**settings.quick, "dataset_dir": str(dataset)}


def train(bundle: Path, files: tuple[str, ...], overrides: dict[str, Any], factory: pytest.TempPathFactory) -> Trained:
    """Train a copy of the bundle from a working directory that has nothing to do with it."""
    root = copy_bundle(bundle, factory.mktemp("trained"))
    elsewhere = factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        workflow = run(make(root, *files, **overrides))
    return Trained(root, files, overrides, elsewhere, item(workflow, "train#trainer").state.iteration)


@pytest.fixture(scope="session")
def trained(bundle: Path, overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """With the bundle's own network: two iterations."""
    return train(bundle, ("train.yaml",), overrides, tmp_path_factory)


@pytest.fixture(scope="session")
def quickly_trained(
    bundle: Path, settings: BundleSettings, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """With a network that costs nothing: two epochs of two iterations."""
    return train(bundle, settings.quick_files, quick, tmp_path_factory)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Undo what a bundle's logging.conf does to the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
