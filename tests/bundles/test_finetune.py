# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of what the patch pretexts give: their own finetune.yaml, and the bundle segmentation_finetuning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from monai_ssl.networks import save_pretrained

from .conftest import Trained
from .running import BUNDLES, FINETUNE, NAMES, chain, copy_bundle, item, load_config, make, run, settings_of

WITH_FINETUNE = [name for name in NAMES if (BUNDLES / name / "configs" / "finetune.yaml").is_file()]
PATCH_BUNDLES = [name for name in WITH_FINETUNE if "unet_mr" not in name]  # that one is fine-tuned on slices
CPU = {"device": "$torch.device('cpu')", "num_workers": 0, "cache": "none"}
TINY = {**CPU, "pixdim": [12.0] * 3, "roi_size": [32] * 3, "batch_size": 2, "num_samples": 1, "init_filters": 8}
TINY |= {"val_interval": 2, "log_interval": 1, "val_fraction": 0.17, "test_fraction": 0.17, "num_overlays": 0}
DOWNSTREAM = {  # variant of the pretraining bundle -> variant of segmentation_finetuning, and what makes both narrow
    "": ("segresnet_ds.yaml", {"init_filters": 8}),
    "unet.yaml": ("unet.yaml", {}),
    "swin_unetr.yaml": ("swin_vit.yaml", {"feature_size": 12}),
    "small.yaml": ("small.yaml", {}),
}


def tiny(dataset: Path, **more: Any) -> dict[str, Any]:
    return {**TINY, "dataset_dir": str(dataset), **more}


def test_one_file_for_all() -> None:
    """But for the window of intensities, which is that of the pretraining."""
    for file in FINETUNE:
        paths = [BUNDLES / name / "configs" / file for name in PATCH_BUNDLES]
        texts = [path.read_text() for path in paths if path.is_file()]
        assert len({re.sub(r"(?m)^a_(min|max): \S+ *", "", text) for text in texts}) == 1


@pytest.mark.parametrize("name", PATCH_BUNDLES)
def test_window_is_that_of_the_pretraining(name: str) -> None:
    windows = [load_config(BUNDLES / name, file) for file in ("train.yaml", "finetune.yaml", "inference.yaml")]
    assert len({(config["a_min"], config["a_max"]) for config in windows}) == 1


def test_scratch_has_the_same_schedule() -> None:
    """Equal for both: the only parameter that tells them apart is the file."""
    config = load_config(BUNDLES / PATCH_BUNDLES[0], "finetune.yaml")
    users = [key for key, value in config.items() if "@pretrained" in str(value)]
    assert users == ["load_encoder"]


@pytest.mark.parametrize("bundle", PATCH_BUNDLES, indirect=True)
def test_frozen_then_free(bundle: Path, trained: Trained, dataset: Path, tmp_path: Path) -> None:
    """The encoder has the bits of the file until `freeze_epochs` are over, and moves in the next epoch."""
    file = trained.root / "models" / "encoder.pt"
    root = copy_bundle(bundle, tmp_path)
    workflow = make(root, "finetune.yaml", **tiny(dataset, pretrained=str(file), freeze_epochs=2, max_epochs=3))
    assert workflow.check_properties() == []
    state = torch.load(file, weights_only=True)
    encoder, head = item(workflow, "encoder"), item(workflow, "network_def").up_layers
    same: list[bool] = []
    moved: list[bool] = []
    before = {name: value.clone() for name, value in head.state_dict().items()}

    def note(engine: Engine) -> None:
        same.append(all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items()))
        moved.append(any(not torch.equal(value, before[name]) for name, value in head.state_dict().items()))

    item(workflow, "train#trainer").add_event_handler(Events.EPOCH_COMPLETED, note)
    assert encoder.state_dict().keys() == state.keys()
    run(workflow)
    assert same == [True, True, False]
    assert moved == [True, True, True]
    assert (root / "models" / "finetune" / "model.pt").is_file()


@pytest.mark.parametrize("word", ["null", "", None])
def test_from_scratch_by_any_word(word: str | None, dataset: Path, tmp_path: Path) -> None:
    """MONAI's command line hands `null` over as the word."""
    root = copy_bundle(BUNDLES / PATCH_BUNDLES[0], tmp_path)
    assert item(make(root, "finetune.yaml", **tiny(dataset, pretrained=word)), "load_encoder") is None


def test_published_protocol(dataset: Path, tmp_path: Path) -> None:
    root = copy_bundle(BUNDLES / PATCH_BUNDLES[0], tmp_path)
    workflow = make(root, *FINETUNE, **tiny(dataset, pretrained=None, max_epochs=1))
    trainer = item(workflow, "train#trainer")
    assert [group["lr"] for group in item(workflow, "optimizer").param_groups] == [0.0, 0.001]
    run(workflow)
    assert 0 < trainer.state.output["loss"] < 1


def test_wrong_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """Two channels do not fit one: an error, not random weights."""
    root = copy_bundle(BUNDLES / PATCH_BUNDLES[0], tmp_path)
    settings = settings_of(root)
    other = make(root, "train.yaml", **{**settings.train, "dataset_dir": str(dataset), "in_channels": 2})
    file = tmp_path / "two_channels.pt"
    save_pretrained(item(other, "encoder"), file, {})
    with pytest.raises(Exception) as caught:
        make(root, "finetune.yaml", **tiny(dataset, pretrained=str(file)))
    assert any(file.name in str(error) for error in chain(caught.value))


class BrightnessClasses(torch.nn.Module):
    """Class 0, 1 or 2 where the windowed image is 0, 0.5 or 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x - torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1, 1)).abs()


def hand_made(folder: Path) -> Path:
    """Two volumes whose brightness is the prediction: Dice 0.75 and 1, and 1 and 0, for classes 1 and 2."""
    truth = np.zeros((16, 12, 10), np.uint8)
    truth[2:6, 2:6, 2:6], truth[9:13, 3:7, 4:8] = 1, 2
    moved, lost = truth.copy(), truth.copy()
    moved[truth == 1] = 0
    moved[3:7, 2:6, 2:6] = 1  # one voxel further: 48 of 64 remain
    lost[truth == 2] = 0
    for name, image in (("moved", moved), ("lost", lost)):
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), np.diag([-2.0, -2, 3, 1])), folder / f"{name}.nii")
        nibabel.save(nibabel.Nifti1Image(truth, np.diag([-2.0, -2, 3, 1])), folder / f"{name}_label.nii")
    items = {name: {"image": f"{name}.nii", "label": f"{name}_label.nii"} for name in ("moved", "lost")}
    (folder / "again.nii").write_bytes((folder / "moved.nii").read_bytes())
    training = [{"image": "again.nii", "label": "moved_label.nii"}]
    (folder / "list.json").write_text(json.dumps({"training": training, "validation": list(items.values())}))
    return folder / "list.json"


@pytest.mark.parametrize("file", ["finetune.yaml", "segmentation_finetuning"])
def test_dice_of_a_hand_made_case(file: str, tmp_path: Path) -> None:
    """Per case and class, without the background: pooled over voxels it would be 0.77, with the background higher."""
    name, config = (PATCH_BUNDLES[0], file) if file.endswith(".yaml") else (file, "train.yaml")
    options = {**CPU, "pixdim": [2.0, 2.0, 3.0], "roi_size": [16] * 3, "a_min": 0.0, "a_max": 2.0, "num_classes": 3}
    options |= {"test_fraction": 0.0, "num_overlays": 0, "pretrained": None, "overlap": 0.0}
    workflow = make(copy_bundle(BUNDLES / name, tmp_path), config, dataset_dir=str(hand_made(tmp_path)), **options)
    evaluator = item(workflow, "validate#evaluator")
    evaluator.network = BrightnessClasses()
    evaluator.run()
    assert evaluator.state.metrics["mean_dice"] == pytest.approx((0.75 + 1 + 1 + 0) / 4)


def test_label_fractions_are_nested(dataset: Path, tmp_path: Path) -> None:
    root = copy_bundle(BUNDLES / PATCH_BUNDLES[0], tmp_path)

    def chosen(fraction: float, seed: int) -> list[str]:
        options = tiny(
            dataset, pretrained=None, label_fraction=fraction, seed=seed, val_fraction=0.0, test_fraction=0.0
        )
        return [entry["name"] for entry in item(make(root, "finetune.yaml", **options), "data")["training"]]

    small, large = chosen(0.34, 0), chosen(0.67, 0)
    assert len(small) == 2
    assert len(large) == 4
    assert set(small) < set(large)
    assert {tuple(sorted(chosen(0.34, seed))) for seed in range(4)} != {tuple(sorted(small))}


@pytest.mark.parametrize("variant", DOWNSTREAM)
@pytest.mark.parametrize("name", PATCH_BUNDLES)
def test_encoder_fills_the_downstream_network(name: str, variant: str, dataset: Path, tmp_path: Path) -> None:
    downstream, narrow = DOWNSTREAM[variant]
    settings = settings_of(BUNDLES / name)
    _, more = settings.variants.get(variant, ([], {}))
    options = {**settings.train, **more, **narrow, "dataset_dir": str(dataset)}
    pretraining = make(BUNDLES / name, "train.yaml", *filter(None, [variant]), **options)
    encoder = item(pretraining, "encoder")
    file = tmp_path / "encoder.pt"
    save_pretrained(encoder, file, item(pretraining, "provenance"))
    finetuning = make(
        BUNDLES / "segmentation_finetuning",
        *("train.yaml", downstream),
        **{**CPU, **narrow, "dataset_dir": str(dataset), "pretrained": str(file), "ckpt_dir": str(tmp_path)},
    )
    filled = item(finetuning, "encoder").state_dict()
    assert filled.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, filled[key]) for key, value in encoder.state_dict().items())
    network = item(finetuning, "network_def").state_dict()
    pointers = {value.data_ptr() for value in network.values()}
    assert {value.data_ptr() for value in filled.values()} <= pointers, "a view of the network that is trained"
