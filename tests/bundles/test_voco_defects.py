# SPDX-License-Identifier: Apache-2.0
"""Defects of earlier VoCo code (arXiv 2402.17300) that only a bundle can repeat: schedule, validation, caching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from monai.transforms import CropForegroundd, Orientationd, RandomizableTrait, Resized, Spacingd, SpatialPadd

from .running import BUNDLES, copy_bundle, item, load_config, make, run
from .settings import BundleSettings

pytestmark = pytest.mark.parametrize("bundle", ["voco_swinunetr_ct"], indirect=True)
GEOMETRY = (CropForegroundd, Orientationd, Resized, Spacingd, SpatialPadd)


def test_schedule_ends_with_the_run(
    bundle: Path, settings: BundleSettings, quick: dict[str, Any], tmp_path: Path
) -> None:
    """Counted in iterations, as it is stepped: highest at the end of the warm-up, at most 1e-3 of that at the end."""
    options = {**quick, "max_epochs": 5, "warmup_steps": 3, "val_interval": 5}
    workflow = make(copy_bundle(bundle, tmp_path), *settings.quick_files, **options)
    trainer, optimizer = item(workflow, "train#trainer"), item(workflow, "optimizer")
    rates: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    run(workflow)
    assert len(rates) == trainer.state.iteration == 10
    assert max(rates) == rates[2] == item(workflow, "lr")
    assert rates[-1] <= 1e-3 * max(rates)


def test_skill_is_what_validation_shows(bundle: Path) -> None:
    metric = load_config(bundle, "train.yaml")["validate"]["key_metric"]
    assert list(metric) == ["skill"]
    assert metric["skill"]["metric_fn"]["statistic"] == "skill"


@pytest.mark.parametrize("window", ["random", "resize"])
def test_no_fixed_geometry_after_the_first_draw(bundle: Path, overrides: dict[str, Any], window: str) -> None:
    """What follows a random transform is never cached."""
    workflow = make(BUNDLES / bundle.name, "train.yaml", **{**overrides, "window": window})
    steps = item(workflow, "train#preprocessing").transforms
    first = next(i for i, step in enumerate(steps) if isinstance(step, RandomizableTrait))
    assert any(isinstance(step, GEOMETRY) for step in steps[:first])
    assert [type(step).__name__ for step in steps[first:] if isinstance(step, GEOMETRY)] == []
