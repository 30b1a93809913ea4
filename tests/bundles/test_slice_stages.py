# SPDX-License-Identifier: Apache-2.0
"""What the stages of the bundle of slices (arXiv 2006.10511) show their networks, and how stage 3 is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import UNet
from monai.transforms import Compose

from monai_ssl.networks import read_provenance, trained_prefixes, unet_features

from .running import copy_bundle, item, load_config, make, run
from .settings import CPU, SLICES

pytestmark = pytest.mark.parametrize("bundle", ["global_local_unet_mr"], indirect=True)
TINY = {**SLICES, "max_iterations": 2, "num_classes": 3}


def line_through(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """Slope, offset and largest distance of the voxels of y, drawn over those of x, where nothing was clipped."""
    inside = (x > 1e-3) & (x < 1.499) & (y > 1e-3) & (y < 1.499)
    assert int(inside.sum()) > 50
    design = torch.stack([x[inside], torch.ones(int(inside.sum()))], 1).double()
    fitted = torch.linalg.lstsq(design, y[inside].double()[:, None]).solution
    return float(fitted[0]), float(fitted[1]), float((design @ fitted - y[inside].double()[:, None]).abs().max())


@pytest.mark.parametrize("files", [("train.yaml",), ("train.yaml", "decoder.yaml")], ids=["stage 1", "stage 2"])
def test_views(bundle: Path, dataset: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    """In stage 2 one view is the other in other grey values, drawn for each slice; in stage 1 it is another part."""
    options = {**TINY, "dataset_dir": str(dataset), "pretrained": "", "num_decoder_blocks": 2 * (len(files) - 1)}
    batch = next(iter(item(make(copy_bundle(bundle, tmp_path), *files, **options), "train#dataloader")))
    assert batch["image"].shape == (8, 2, 1, 64, 64)
    lines = [line_through(*views) for views in batch["image"]]
    in_place = [distance < 1e-4 for _, _, distance in lines]
    assert all(in_place) if len(files) == 2 else not any(in_place)
    if len(files) == 2:
        assert len({round(slope, 4) for slope, _, _ in lines}) == 8


@pytest.mark.parametrize("mode", ["LR", "LD"])
@pytest.mark.parametrize("regions", ["lattice", "published"])
@pytest.mark.parametrize("matched", [False, True])
def test_level_of_chance_of_stage_2(bundle: Path, mode: str, regions: str, matched: bool) -> None:
    """What the curves show as chance is the loss where all regions look alike: 2 volumes, 4 slices, 2 views of each."""
    parser = ConfigParser(load_config(bundle, "train.yaml", "decoder.yaml"))
    parser.update({"mode": mode, "regions": regions, "matched_negatives": matched})
    parser.update({"batch_size": 2, "num_partitions": 4, "num_views": 2, "world_size": 1})
    parser.get_parsed_content("imports")
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(2))  # volume, partition, view
    ids = dict(zip(("volume", "partition", "view"), grid.unbind(1)))
    loss = parser.get_parsed_content("loss")(torch.ones(16, 3, 16, 16), grid[:, 0] * 4 + grid[:, 1], **ids)
    assert loss.item() == pytest.approx(parser.get_parsed_content("chance"), abs=1e-5)


def test_intensity_of_stage_3_reaches_images_and_no_labels(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """Without what moves voxels the label is that of the scan, and the image in other grey values."""
    options = {**CPU, "pixdim": [10.0] * 2, "plane_size": [64, 64], "channels": [8, 16, 32, 64], "num_classes": 16}
    options |= {"dataset_dir": str(dataset), "pretrained": None, "elastic_prob": 0.0, "random#3#prob": 0.0}
    options |= {"random#5#prob": 1.0, "random#6#prob": 1.0}
    workflow = make(copy_bundle(bundle, tmp_path), "finetune.yaml", **options)
    kinds = [type(transform).__name__ for transform in item(workflow, "random")]
    assert kinds[3:7] == ["RandAffined", "Rand2DElasticd", "RandShiftIntensityd", "RandScaleIntensityFixedMeand"]
    plain = {one["name"]: one for one in map(Compose(item(workflow, "deterministic")), item(workflow, "repeated"))}
    batch = next(iter(item(workflow, "train#dataloader")))
    slopes = []
    for image, label, name, number in zip(*(batch[key] for key in ("image", "label", "name", "slice_index"))):
        scan = plain[name]
        assert torch.equal(label, scan["label"].as_tensor()[..., number])
        slope, _, distance = line_through(scan["image"].as_tensor()[..., number], image)
        assert distance < 1e-4
        slopes.append(round(slope, 4))
    assert len(set(slopes)) == len(slopes) == 16


class BrightnessClasses(torch.nn.Module):
    """Class 0 to 3 where the image is 0, 1/3, 2/3 or 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x - torch.arange(4).view(1, 4, 1, 1) / 3).abs()


def test_dice_of_a_case_without_a_class(bundle: Path, tmp_path: Path) -> None:
    """It is NaN for that class, and the other classes stay in their columns."""
    whole = np.zeros((12, 20, 8), np.uint8)
    whole[1:5, 2:6, 1:5], whole[6:10, 2:6, 1:5], whole[2:8, 10:18, 2:6] = 1, 2, 3
    lacking = np.where(whole == 2, 0, whole)
    shown = {"whole": whole, "lacking": np.where((whole == 3) & (np.arange(20)[:, None] >= 14), 0, lacking)}
    for name, label in (("whole", whole), ("lacking", lacking)):
        for file, voxels in ((name, shown[name].astype(np.float32)), (f"{name}_label", label)):
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 3, 1])), tmp_path / f"{file}.nii.gz")
    items = [{"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"} for name in shown]
    (tmp_path / "again.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes())
    training = [{"image": "again.nii.gz", "label": "whole_label.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps({"training": training, "validation": items}))
    options: dict[str, Any] = {**CPU, "pixdim": [2.0, 2.0], "plane_size": [16, 24], "channels": [4, 8, 8]}
    options |= {"dataset_dir": str(tmp_path / "list.json"), "test_fraction": 0.0, "num_overlays": 0, "pretrained": None}
    workflow = make(copy_bundle(bundle, tmp_path), "finetune.yaml", **options)
    evaluator = item(workflow, "validate#evaluator")
    evaluator.network = BrightnessClasses()
    evaluator.run()
    found = evaluator.state.metric_details["mean_dice"].double()
    # half of class 3 is not shown in the second case: Dice 2 / 3
    expected = torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.nan, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-6, rtol=0)


def test_crops_in_3d(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """Two iterations on crops of 8 slices along the first axis and 32 x 24 in the plane; the file fits MONAI's U-Net
    with three axes."""
    root = copy_bundle(bundle, tmp_path)
    options = {**TINY, "plane_size": [32, 24], "thickness": 8, "slice_distance": -1.0, "axis": 0}
    workflow = run(make(root, "train.yaml", "crops_3d.yaml", **{**options, "dataset_dir": str(dataset)}))
    assert item(workflow, "train#trainer").state.iteration == 2
    size = [8, 32, 24]
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
