# SPDX-License-Identifier: Apache-2.0
"""The three stages of arXiv 2006.10511 in the bundle: what each file holds, what stays as it was, and one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet

from monai_ssl.networks import load_pretrained, read_provenance, trained_prefixes, unet_features, unet_stages

from .running import copy_bundle, item, make, run
from .settings import CPU, SLICES

pytestmark = pytest.mark.parametrize("bundle", ["global_local_unet_mr"], indirect=True)
TINY = {**SLICES, "max_iterations": 2, "num_classes": 3}
LABELLED = {**CPU, "pixdim": [10.0] * 2, "plane_size": [64, 64], "channels": [8, 16, 32, 64], "num_classes": 16}
LABELLED |= {"max_iterations": 2, "val_interval": 1, "val_fraction": 0.17, "test_fraction": 0.17, "num_overlays": 0}


def unet() -> UNet:
    torch.manual_seed(5)
    return UNet(2, 1, 16, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2, norm="BATCH", act="PRELU")


def loaded(file: Path, num_blocks: int) -> UNet:
    network = unet()
    stages = unet_stages(network)
    load_pretrained(network, file, exclude=[*stages.decoder[num_blocks:], *stages.head])
    return network.eval()


def stage_2(root: Path, dataset: Path, **more: Any) -> Any:
    options = {**TINY, "num_classes": 16, "dataset_dir": str(dataset), "num_decoder_blocks": 2, **more}
    return run(make(root, "train.yaml", "decoder.yaml", **options))


def test_files_of_the_stages(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """Each file holds what its stage has trained; stage 2 leaves the encoder as it is, its statistics too."""
    root, network = copy_bundle(bundle, tmp_path), unet()
    run(make(root, "train.yaml", **{**TINY, "num_classes": 16, "dataset_dir": str(dataset)}))
    workflow = stage_2(root, dataset)
    files = [root / "models" / name for name in ("unet_encoder.pt", "unet_decoder.pt")]
    states = [torch.load(file, weights_only=True) for file in files]
    for file, state, blocks in zip(files, states, (0, 2)):
        prefixes = tuple(trained_prefixes(network, blocks))
        assert set(state) == {name for name in network.state_dict() if name.startswith(prefixes)}
        assert read_provenance(file)["settings"]["num_decoder_blocks"] == blocks
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name  # num_batches_tracked included
    image = torch.rand(2, 1, 64, 64)
    trained = item(workflow, "unet").eval()
    with torch.no_grad():
        for blocks in (0, 2):
            assert torch.equal(unet_features(loaded(files[1], 2), image, blocks), unet_features(trained, image, blocks))
    assert not any(torch.equal(v, network.state_dict()[n]) for n, v in states[1].items() if n.endswith("conv.weight"))


def test_stage_3_from_each_file_and_from_scratch(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    root = copy_bundle(bundle, tmp_path)
    run(make(root, "train.yaml", **{**TINY, "num_classes": 16, "dataset_dir": str(dataset)}))
    file = root / "models" / "unet_encoder.pt"
    options = {**LABELLED, "dataset_dir": str(dataset)}
    workflow = make(root, "finetune.yaml", **options, pretrained=str(file))
    state, own = torch.load(file, weights_only=True), item(workflow, "network_def").state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert workflow.check_properties() == []
    scratch = make(root, "finetune.yaml", **options, pretrained="null")
    assert item(scratch, "load_encoder") is None
    assert item(scratch, "total_steps") == item(workflow, "total_steps")
    run(workflow)
    evaluated = run(make(root, "finetune.yaml", "finetune_evaluate.yaml", **options))
    assert "mean_dice" in item(evaluated, "validate#evaluator").state.metrics
    assert len(list((root / "eval" / "finetune" / "predictions").iterdir())) > 0


@pytest.mark.parametrize("labelled", [1, 2])
def test_few_labelled_volumes_fill_a_batch(bundle: Path, dataset: Path, tmp_path: Path, labelled: int) -> None:
    options = {**LABELLED, "dataset_dir": str(dataset), "num_labelled": labelled, "pretrained": None}
    workflow = make(copy_bundle(bundle, tmp_path), "finetune.yaml", **options)
    batch = next(iter(item(workflow, "train#dataloader")))
    assert batch["image"].shape == (16, 1, 64, 64)
    assert len(set(batch["name"])) == labelled
    assert set(batch["label"].unique().tolist()) <= set(range(16))


@pytest.mark.parametrize("axis", [2, 0])
def test_crops_in_3d(bundle: Path, dataset: Path, tmp_path: Path, axis: int) -> None:
    """Two iterations on crops of 32 x 24 in the plane and 8 slices; the file fits MONAI's U-Net with three axes."""
    root = copy_bundle(bundle, tmp_path)
    options = {**TINY, "plane_size": [32, 24], "thickness": 8, "slice_distance": -1.0, "axis": axis}
    workflow = run(make(root, "train.yaml", "crops_3d.yaml", **{**options, "dataset_dir": str(dataset)}))
    assert item(workflow, "train#trainer").state.iteration == 2
    size = [8, 32, 24] if axis == 0 else [32, 24, 8]
    batch = next(iter(item(workflow, "train#dataloader")))
    assert batch["image"].shape == (2 * 4, 2, 1, *size)
    assert batch["partition"].tolist() == [0, 1, 2, 3] * 2
    file = root / "models" / "unet_encoder.pt"
    network = UNet(3, 1, 3, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2, norm="BATCH", act="PRELU")
    report = network.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert report.unexpected_keys == []
    assert set(report.missing_keys) == {
        name for name in network.state_dict() if not name.startswith(tuple(trained_prefixes(network, 0)))
    }
    image = torch.rand(2, 1, *size)
    with torch.no_grad():
        assert torch.equal(unet_features(network.eval(), image), item(workflow, "network_def").eval()(image))
    provenance = read_provenance(file)
    assert (provenance["network"]["spatial_dims"], provenance["preprocessing"]["roi_size"]) == (3, size)
    assert (root / "eval" / "preview_epoch=0001.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # of MONAI, for every run by name
def test_one_command_runs_all_stages_and_goes_on(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    root = copy_bundle(bundle, tmp_path)
    options = {
        "dataset_dir": str(dataset),
        "overrides": {**TINY, "num_classes": 16},
        "decoder_overrides": {"num_decoder_blocks": 2},
        "finetune_overrides": LABELLED,
    }
    run(make(root, "all_stages.yaml", **options))
    models = root / "models"
    files = [models / "unet_encoder.pt", models / "unet_decoder.pt", models / "finetune" / "model.pt"]
    written = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    run(make(root, "all_stages.yaml", **options))  # the first two are done, the third goes on from its checkpoint
    assert [file.stat().st_mtime_ns for file in files[:2]] == written[:2]
    assert files[2].is_file()
