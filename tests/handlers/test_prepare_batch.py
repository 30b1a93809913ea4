# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_ssl.handlers import PrepareBatchTensor

BATCH = {
    "image": MetaTensor(torch.arange(30.0).reshape(1, 1, 5, 6), meta={"filename_or_obj": "PATIENT_0042"}),
    "label": MetaTensor(torch.tensor([[1.0]])),
    "image_base": torch.full((1, 2, 5, 6), 7.0),
    "name": ["PATIENT_0042"],
}


def test_image_and_label_become_plain() -> None:
    image, label = PrepareBatchTensor()(BATCH, "cpu")
    assert type(image) is torch.Tensor
    assert type(label) is torch.Tensor
    assert torch.equal(image, BATCH["image"].as_tensor())
    assert float(label) == 1.0


def test_absent_label_is_none() -> None:
    image, label = PrepareBatchTensor()({"image": BATCH["image"]}, "cpu")
    assert label is None
    assert image.shape == (1, 1, 5, 6)


@pytest.mark.parametrize("extra", ["image_base", ["image_base", "label"]])
def test_extra_keys_become_keyword_arguments(extra: str | list[str]) -> None:
    batch = {**BATCH, "label": MetaTensor(torch.tensor([[1.0]]))}
    image, label, args, kwargs = PrepareBatchTensor(extra_keys=extra)(batch, "cpu")
    assert args == ()
    assert list(kwargs) == (["image_base"] if extra == "image_base" else extra)
    assert all(type(value) is torch.Tensor for value in (image, label, *kwargs.values()))
    assert float(kwargs["image_base"].mean()) == 7.0


def test_arguments_of_to_are_passed_on() -> None:
    image, label = PrepareBatchTensor()(BATCH, "cpu", dtype=torch.float64)
    assert image.dtype == label.dtype == torch.float64


def test_other_keys() -> None:
    image, label = PrepareBatchTensor(image_key="image_base", label_key="image")(BATCH)
    assert image.shape == (1, 2, 5, 6)
    assert label.shape == (1, 1, 5, 6)


def test_several_images_and_labels() -> None:
    """Named after the tasks that they are for, or after themselves."""
    prepare = PrepareBatchTensor(image_key=["image", "image_base"], label_key={"task": "label"})
    image, label = prepare(BATCH, "cpu", dtype=torch.float64)
    assert list(image) == ["image", "image_base"]
    assert list(label) == ["task"]
    assert all(
        type(value) is torch.Tensor and value.dtype == torch.float64 for value in (*image.values(), *label.values())
    )
    assert torch.equal(image["image"], BATCH["image"].as_tensor().double())
    assert float(label["task"]) == 1.0
    assert PrepareBatchTensor(label_key={})(BATCH)[1] == {}


def test_of_several_labels_none_may_be_absent() -> None:
    with pytest.raises(KeyError, match="'label_jigsaw' is not in the batch"):
        PrepareBatchTensor(label_key={"rotation": "label", "jigsaw": "label_jigsaw"})(BATCH)


def test_absent_keys_are_named() -> None:
    with pytest.raises(KeyError, match="'scan' is not in the batch, which has"):
        PrepareBatchTensor(image_key="scan")(BATCH)
    with pytest.raises(KeyError, match="'image_2'"):
        PrepareBatchTensor(extra_keys="image_2")(BATCH)
    with pytest.raises(TypeError, match=r"batch\['name'\] must be a tensor, got list"):
        PrepareBatchTensor(extra_keys="name")(BATCH)
