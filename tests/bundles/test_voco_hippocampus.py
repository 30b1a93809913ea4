# SPDX-License-Identifier: Apache-2.0
"""The small VoCo recipe (arXiv 2402.17300) on real volumes: position is learnt beyond every constant prediction."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .running import copy_bundle, item, make, run


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["voco_swinunetr_ct"], indirect=True)
def test_small_recipe_learns(bundle: Path, test_data: Path, tmp_path: Path) -> None:
    """29 training and 8 held-out volumes, 161 steps; the constant prediction has skill 0, the fixed cell 0.144."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in sorted((test_data / "hippocampus" / "images").iterdir())[:37]:
        os.symlink(path, scans / path.name)
    options = {"dataset_dir": str(scans), "val_fraction": 8 / 37, "max_epochs": 23, "val_interval": 23}
    workflow = run(make(copy_bundle(bundle, tmp_path), "train.yaml", "small.yaml", **options))
    assert item(workflow, "train#trainer").state.iteration == 161
    metrics = item(workflow, "validate#evaluator").state.metrics
    assert metrics["skill"] > 0.1
    assert metrics["position_accuracy"] > 0.144
    assert metrics["cross_volume_skill"] > 0
