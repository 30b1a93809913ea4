# SPDX-License-Identifier: Apache-2.0
"""What the classification bundle does beyond what every bundle does."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import SegResNetDS, UNet
from PIL import Image

from monai_ssl.networks import UNetEncoder, save_pretrained

from .running import BUNDLES, chain, copy_bundle, item, make, run
from .settings import CLASSIFICATION, SETTINGS

BUNDLE = BUNDLES / "classification_finetuning"
SMALL = ("train.yaml", "small.yaml")
QUICK = SETTINGS[BUNDLE.name].quick


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_bundle(BUNDLE, tmp_path)


def messages(error: BaseException) -> str:
    return "\n".join(map(str, chain(error)))


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_weights_count_in_a_batch_of_one_class(root: Path, dataset: Path) -> None:
    """Two classes of 2 and of 2 volumes weigh 1; with weights 1 and 3 an error on the second counts three times."""
    logits, ones = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(2, dtype=torch.long)
    plain = torch.nn.functional.cross_entropy(logits, ones).item()
    for weights, factor in (("balanced", 1.0), ([1, 3], 3.0), ("none", 1.0)):
        loss = item(make(root, *SMALL, **QUICK, dataset_dir=str(dataset), class_weights=weights), "loss")
        assert loss(logits, ones).item() == pytest.approx(factor * plain)
    loss = item(make(root, *SMALL, **QUICK, dataset_dir=str(dataset), class_weights=[1, 3]), "loss")
    mixed = loss(logits, torch.tensor([0, 1])).item()
    assert mixed == pytest.approx((plain - 1 + 3 * plain) / 2, rel=1e-5)  # log(1 + e) - 1 of the first


def test_label_smoothing(root: Path, dataset: Path) -> None:
    loss = item(make(root, *SMALL, **QUICK, dataset_dir=str(dataset), label_smoothing=0.2), "loss")
    logits, label = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    log = logits.log_softmax(1)[0]
    assert loss(logits, label).item() == pytest.approx(-(0.9 * log[0] + 0.1 * log[1]).item())


# ---- the encoder -----------------------------------------------------------------------------------------------------


def unet(seed: int) -> UNetEncoder:
    torch.manual_seed(seed)
    return UNetEncoder(UNet(3, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1))


def test_pretrained_and_frozen(root: Path, dataset: Path, tmp_path: Path) -> None:
    """The file's weights are there when training starts, do not move in the first epoch, and move in the second."""
    file = save_pretrained(unet(5), tmp_path / "encoder.pt", {"method": "test"})
    given = torch.load(file, weights_only=True)
    options = {**QUICK, "dataset_dir": str(dataset), "pretrained": str(file), "freeze_epochs": 1, "max_epochs": 2}
    workflow = make(root, *SMALL, **{**options, "weight_decay": 0.1})
    encoder, head = item(workflow, "encoder"), item(workflow, "head")
    before, seen = head.weight.clone(), []

    def same(_: Any) -> None:
        encoder_moved = not all(torch.equal(encoder.state_dict()[name], value) for name, value in given.items())
        seen.append((encoder_moved, not torch.equal(head.weight, before)))

    item(workflow, "train#trainer").add_event_handler(Events.EPOCH_STARTED | Events.COMPLETED, same)
    run(workflow)
    assert seen == [(False, False), (False, True), (True, True)]


def test_the_segresnet_of_the_pretraining_bundles_loads(root: Path, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = SegResNetDS(3, 4, 1, 2, blocks_down=(1, 2, 2, 4), norm="instance")
    file = save_pretrained(network.encoder, tmp_path / "encoder.pt", {"method": "test"})
    options = {**SETTINGS[BUNDLE.name].train, "dataset_dir": str(dataset), "pretrained": str(file)}
    encoder = item(make(root, "train.yaml", **options), "network_def").encoder
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in network.encoder.state_dict().items())


def test_checkpoint_of_another_network(root: Path, dataset: Path, tmp_path: Path) -> None:
    file = save_pretrained(unet(0), tmp_path / "encoder.pt", {"method": "test"})
    options = {**SETTINGS[BUNDLE.name].train, "dataset_dir": str(dataset), "pretrained": str(file)}
    with pytest.raises(Exception) as caught:
        make(root, "train.yaml", **options)
    assert "nothing was loaded, the file does not fit" in messages(caught.value)
    assert str(file) in messages(caught.value)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(dataset: Path, tmp_path: Path) -> Any:
    """The six volumes with other labels."""

    def write(*labels: str) -> str:
        folder = tmp_path / "labelled"
        folder.mkdir(exist_ok=True)
        files = sorted((dataset / "images").iterdir())
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
        rows = [f"{file.name},{label}" for file, label in zip(files, labels)]
        (folder / "labels.csv").write_text("\n".join(["file,label", *rows, ""]))
        return str(folder)

    return write


@pytest.mark.parametrize(
    "labels, options, expected",
    [
        (("0", "1", "2"), {}, r"labels are none of class_names"),
        (("0", "1", ""), {}, "1 of 3 volumes have no label"),
        (("0",) * 6, {}, "none of them of class venous: raise num_labelled"),
        (("0", "1") * 3, {"num_labelled": 1}, "1 volumes for training, none of them of class"),
        (("0", "1"), {"class_names": ["a", "b", "c"], "val_fraction": 0.0}, "none of them of class c"),
        (("0", "1") * 3, {"class_weights": "inverse"}, "class_weights must be balanced, none or 2 positive numbers"),
        (("0", "1") * 3, {"window": "middle"}, "middle"),
    ],
    ids=["out of range", "missing", "one class", "draw", "fewer volumes than classes", "weights", "window"],
)
def test_errors(root: Path, labelled: Any, labels: tuple[str, ...], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(Exception) as caught:
        run(make(root, *SMALL, **{**QUICK, "dataset_dir": labelled(*labels), **options}))
    assert expected in messages(caught.value)
    assert not list(root.rglob("*.pt"))


def test_draw_has_each_class(root: Path, dataset: Path) -> None:
    options = {**QUICK, "val_fraction": 0.0, "dataset_dir": str(dataset), "num_labelled": 2}
    for seed in range(4):
        drawn = item(make(root, *SMALL, **options, label_seed=seed), "data")["training"]
        assert sorted(case["label"] for case in drawn) == [0, 1]


def test_validation_of_one_class_does_not_stop_the_run(
    root: Path, labelled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One volume of the second class: it is for training."""
    options = {**QUICK, "dataset_dir": labelled("0", "0", "0", "0", "0", "1"), "max_epochs": 1}
    with caplog.at_level(logging.WARNING):
        workflow = run(make(root, *SMALL, **options))
    assert np.isnan(item(workflow, "validate#evaluator").state.metrics["auc"])
    assert "evaluated cases have none of class 1" in caplog.text
    assert {"model.pt", "model_best.pt"} <= {path.name for path in (root / "models").iterdir()}


# ---- a whole run -----------------------------------------------------------------------------------------------------


def predictions(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_two_dimensions_from_pictures_to_predictions(root: Path, tmp_path: Path) -> None:
    """Squares on the left and on the right in a folder per class: learnt, evaluated and told of new pictures."""
    state, data = np.random.RandomState(0), tmp_path / "data"
    for k, name in enumerate(("left", "right")):
        (data / name).mkdir(parents=True)
        for n in range(12):
            picture = state.randint(0, 60, (20, 26)).astype(np.uint8)
            picture[5:14, 3 + 12 * k : 11 + 12 * k] += np.uint8(100)
            Image.fromarray(picture).save(data / name / f"{name}{n}.png")
    names = {"class_names": ["left", "right"], "spatial_dims": 2, "pixdim": None, "window": "resize"}
    names |= {"roi_size": [24, 28], "num_workers": 0, "device": "$torch.device('cpu')"}
    options = {
        **CLASSIFICATION,
        **names,
        "dataset_dir": str(data),
        "max_epochs": 12,
        "val_interval": 12,
        "batch_size": 4,
    }
    files = ("train.yaml", "small.yaml")
    run(make(root, *files, **options))
    metrics = item(run(make(root, *files, "evaluate.yaml", **options)), "validate#evaluator").state.metrics
    assert metrics["balanced_accuracy"] == metrics["auc"] == 1.0
    rows = predictions(root / "eval" / "predictions.csv")
    assert len(rows) == 8
    assert all(row["true"] == row["predicted"] in row["name"] for row in rows)
    new = {**names, "dataset_dir": str(data / "right"), "output_dir": str(tmp_path / "new")}
    run(make(root, "inference.yaml", "small.yaml", kind="infer", **new))
    told = predictions(tmp_path / "new" / "predictions.csv")
    assert len(told) == 12
    assert {row["predicted"] for row in told} == {"right"}


def test_learns_the_phase_of_contrast(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 subjects, told of 8 others: a guess has a balanced accuracy of 1/3 and an area of 1/2."""
    monkeypatch.setenv("MONAI_SSL_CACHE", str(tmp_path / "cache"))
    options = {"phantom": {"num_subjects": 40, "size": [32, 27, 32], "seed": 0}, "pixdim": [12.0] * 3}
    options |= {"roi_size": [32, 28, 32], "device": "$torch.device('cpu')", "test_fraction": 0.0}
    window = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -175, "a_max": 250, "b_min": 0, "b_max": 1}
    workflow = make(root, *SMALL, **options, intensity={**window, "clip": True}, max_epochs=15, val_interval=15)
    metrics = item(run(workflow), "validate#evaluator").state.metrics
    assert item(workflow, "train#trainer").state.iteration == 120
    assert metrics["balanced_accuracy"] > 0.6
    assert metrics["auc"] > 0.7
