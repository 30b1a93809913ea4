# SPDX-License-Identifier: Apache-2.0
"""The three stages of arXiv 2006.10511 in the bundle: what each file holds, what stays as it was, and one command."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet

from monai_ssl.networks import (
    load_pretrained,
    read_provenance,
    save_pretrained,
    trained_prefixes,
    unet_features,
    unet_stages,
)

from .running import chain, copy_bundle, item, make, run
from .settings import CPU, PATIENT, SLICES

pytestmark = pytest.mark.parametrize("bundle", ["global_local_unet_mr"], indirect=True)
BAD = f"{PATIENT}44.nii.gz"
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


DECODER = ("train.yaml", "decoder.yaml")
OTHER_NETWORK = r"nothing was loaded, the file does not fit\n.*/other.pt -> UNet(.|\n)*built with other arguments"
# configuration, overrides, change of the stored voxels of one scan, and what the error says
REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], Callable[[np.ndarray], np.ndarray] | None, str]] = {
    "channels": (("train.yaml",), {}, lambda x: np.stack([x, x], -1), f"{BAD}: 2 channels, where in_channels is 1"),
    "slices": (("train.yaml",), {}, lambda x: x[..., :3], f"{BAD}: too small: .* x 3 voxels.*lower .*num_partitions"),
    "slices of stage 3": (("finetune.yaml",), {"pretrained": ""}, lambda x: x[..., :3], f"{BAD}: too small: .* x 3 v"),
    "thick crops": (("train.yaml", "crops_3d.yaml"), {"thickness": 24, "slice_distance": -1.0}, None,
                    "too small: .* 2 x 2 x 52 needed: lower .*num_partitions"),
    "network of stage 2": (DECODER, {"pretrained": "other.pt"}, None, OTHER_NETWORK),
    "network of stage 3": (("finetune.yaml",), {"pretrained": "other.pt"}, None, OTHER_NETWORK),
    "stage 1 has not run": (DECODER, {"num_decoder_blocks": 2}, None, "no such checkpoint: run .*/unet_encoder.pt"),
    "stage 2 has not run": (("finetune.yaml",), {}, None, "no such checkpoint: run .*/unet_decoder.pt"),
    "a file of no stage": (("finetune.yaml",), {"pretrained": "plain.pt"}, None, "plain.pt does not say how many"),
    "small maps": (DECODER, {"num_decoder_blocks": 1, "pretrained": "", "plane_size": [48, 56]}, None,
                   r"map after 1 decoder blocks has \(12, 14\) cells, regions of 3 need 15"),
    "stride": (("train.yaml",), {"plane_size": [60, 64]}, None, r"plane_size \(60, 64\) must be a multiple of"),
    "stride of stage 3": (("finetune.yaml",), {"pretrained": "", "plane_size": [60, 64]}, None,
                          r"plane_size \(60, 64\) must be a multiple of"),
    "classes": (("finetune.yaml",), {"pretrained": "", "num_classes": 4}, None,
                "values from 0 to 15, where num_classes 4 allows 0 to 3"),
    "mode": (("train.yaml",), {"mode": "LR"}, None, "mode must be one of GR, GD-, GD, got 'LR'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_is_wrong(bundle: Path, dataset: Path, tmp_path: Path, case: str) -> None:
    """Before the first step, with the file or the argument and what to do about it."""
    files, more, change, message = REFUSED[case]
    scans = shutil.copytree(dataset, tmp_path / "scans")
    if change is not None:
        spoil(scans, change)
    narrow = UNet(2, 1, 16, channels=(4, 8, 16, 32), strides=(2, 2, 2), num_res_units=2, norm="BATCH", act="PRELU")
    settings = {"settings": {"num_decoder_blocks": 0}}
    save_pretrained(narrow, tmp_path / "other.pt", settings, include=trained_prefixes(narrow, 0))
    torch.save(unet().state_dict(), tmp_path / "plain.pt")
    if more.get("pretrained"):
        more = {**more, "pretrained": str(tmp_path / more["pretrained"])}
    options = LABELLED if files == ("finetune.yaml",) else {**TINY, "num_classes": 16}
    blocks = {"num_decoder_blocks": 2} if files == DECODER else {}
    root = copy_bundle(bundle, tmp_path)
    with pytest.raises(Exception) as caught:
        run(make(root, *files, **{**options, **blocks, "dataset_dir": str(scans), **more}))
    told = [str(error) for error in chain(caught.value)]
    assert any(re.search(message, text) for text in told), told
    assert not list(root.rglob("*.pt"))


def spoil(scans: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """In storage the slices of this scan and its label lie along another axis of the patient than those of others."""
    for folder in ("images", "labels"):
        file = scans / folder / BAD
        voxels = np.asarray(nibabel.load(file).dataobj)
        voxels = change(voxels) if folder == "images" or change(voxels).ndim == 3 else voxels
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)[[2, 0, 1, 3]]), file)


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
    written = files[0].stat().st_mtime_ns
    states = [torch.load(file, weights_only=True) for file in files]
    for file in files[1:]:
        file.unlink()
    run(make(root, "all_stages.yaml", **options))  # the first is done, the others go on from their checkpoints
    assert files[0].stat().st_mtime_ns == written
    for file, state in zip(files, states):
        again = torch.load(file, weights_only=True)
        assert all(torch.equal(again[name], value) for name, value in state.items())
