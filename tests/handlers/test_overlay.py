# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from monai.data import MetaTensor

from monai_ssl.handlers import OverlayHandler


def case(name: str) -> tuple[dict, dict]:
    label = torch.zeros(2, 12, 9, 10)
    label[1, 3:8, 2:6, 4:7] = 1
    label[0] = 1 - label[1]
    image = MetaTensor(torch.rand(1, 12, 9, 10), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    return {"name": name}, {"image": image, "label": label, "pred": label.roll(1, dims=1)}


def engine(*names: str) -> SimpleNamespace:
    batch, output = zip(*(case(name) for name in names))
    return SimpleNamespace(state=SimpleNamespace(batch=list(batch), output=list(output)))


def test_first_cases_only_and_again_at_the_next_evaluation(tmp_path: Path) -> None:
    handler = OverlayHandler(tmp_path / "overlays", max_items=2)
    for names in (("a/x.nii.gz",), ("b/x.nii.gz", "c/y.nii.gz")):
        handler(engine(*names))
    # equal names in other folders do not overwrite each other
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == ["01_x.png", "02_x.png"]
    assert imread(tmp_path / "overlays" / "01_x.png").std() > 0.05
    handler._reset(None)
    handler(engine("y.nii.gz"))
    assert (tmp_path / "overlays" / "01_y.png").is_file()


@pytest.mark.parametrize("max_items", [0])
def test_nothing_is_drawn(tmp_path: Path, max_items: int) -> None:
    OverlayHandler(tmp_path / "overlays", max_items=max_items)(engine("x.nii.gz"))
    assert not (tmp_path / "overlays").exists()
