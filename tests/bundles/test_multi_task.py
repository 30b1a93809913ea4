# SPDX-License-Identifier: Apache-2.0
"""The bundle of several pretext tasks: they are added, removed and reweighted in YAML alone."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Trained, train
from .running import BUNDLES, command_line, make, run, settings_of, start

NAME = "multi_task_pretraining"
TASKS = {"rotation": 2.0, "jigsaw": 0.0, "rpl": 1.0, "cpc": 1.0, "mine": 1.0}
OWN = """
tasks#voco: null
tasks#jigsaw#weight: 0.0
tasks#rotation#weight: 2.0
"""


@pytest.fixture(scope="module")
def other_tasks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two epochs of two iterations: without VoCo, with other weights, two tasks that come with the bundle and the one
    that its README writes."""
    readme = (BUNDLES / NAME / "docs" / "README.md").read_text()
    (task,) = re.findall(r"```yaml\n(tasks#mine:.*?)```", readme, re.DOTALL)
    own = tmp_path_factory.mktemp("own") / "own.yaml"
    own.write_text(task + OWN)
    settings = settings_of(BUNDLES / NAME)
    files = (*settings.quick_files, "add_rpl.yaml", "add_cpc.yaml", str(own))
    return train(BUNDLES / NAME, files, {**settings.quick, "dataset_dir": str(dataset)}, tmp_path_factory)


def columns(trained: Trained) -> list[dict[str, float]]:
    """The numbers of each row of the curves."""
    rows = csv.DictReader((trained.root / "eval" / "curves.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_other_tasks_train(other_tasks: Trained) -> None:
    assert other_tasks.iterations == 4
    provenance = json.loads((other_tasks.root / "models" / "encoder.json").read_text())
    assert provenance["method"] == "multi-task: rotation, jigsaw, rpl, cpc, mine"
    assert list((other_tasks.root / "eval").glob("preview_epoch=*.png"))


@pytest.mark.parametrize("prefix", ["", "val_"])
def test_the_whole_is_the_weighted_sum_of_its_parts(other_tasks: Trained, prefix: str) -> None:
    """In training and in validation, where the task of the README has no metrics."""
    rows = [row for row in columns(other_tasks) if f"{prefix}loss" in row]
    assert len(rows) == (2 if prefix else 4)
    for row in rows:
        named = {name: row.get(f"{prefix}{name}_loss") for name in TASKS}
        assert [name for name, value in named.items() if value is None] == (["mine"] if prefix else [])
        known = sum(TASKS[name] * value for name, value in named.items() if value is not None)
        if prefix:
            assert row["val_loss"] > known
        else:
            assert row["loss"] == pytest.approx(known, rel=1e-5)
        assert f"{prefix}voco_loss" not in row


def test_evaluation_tells_the_level_of_chance(other_tasks: Trained, tmp_path: Path) -> None:
    options = {**other_tasks.overrides, "output_dir": str(tmp_path)}
    run(make(other_tasks.root, *other_tasks.files, "evaluate.yaml", **options))
    rows = csv.reader((tmp_path / "metrics.csv").read_text().splitlines())
    found = {name: float(value) for name, value in rows}
    levels = {"rotation_loss": math.log(10), "rotation_accuracy": 0.1, "jigsaw_loss": math.log(10)}
    levels |= {"rpl_loss": math.log(26), "rpl_accuracy": 1 / 26}
    for name, level in levels.items():
        assert found[f"{name}_by_chance"] == pytest.approx(level)
        assert name in found
    assert "cpc_accuracy" in found
    assert not [name for name in found if "voco" in name]
    assert sorted(path.stem for path in tmp_path.glob("confusion_*.csv")) == ["confusion_jigsaw", "confusion_rotation"]


def test_tasks_on_the_command_line(dataset: Path, tmp_path: Path) -> None:
    """Left out or reweighted without a file."""
    settings = settings_of(BUNDLES / NAME)
    files = str([str(BUNDLES / NAME / "configs" / file) for file in settings.quick_files])
    options: dict[str, Any] = {**settings.quick, "dataset_dir": str(dataset), "max_epochs": 1}
    options |= {"tasks#jigsaw": "null", "tasks#voco#weight": 0.5}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *command_line(options)]
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    provenance = json.loads((tmp_path / "models" / "encoder.json").read_text())
    assert provenance["method"] == "multi-task: rotation, voco"
    assert provenance["settings"]["weights"] == {"rotation": 1.0, "voco": 0.5}
