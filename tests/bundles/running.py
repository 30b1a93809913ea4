# SPDX-License-Identifier: Apache-2.0
"""Runs of bundles in this process and in others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow

from .settings import SETTINGS, BundleSettings

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLES = Path(os.environ.get("MONAI_SSL_TEST_BUNDLES", REPOSITORY / "bundles"))
NAMES = sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/metadata.json"))
# the workflows that every bundle has, and the fine-tuning that some have; further files are variants of the first
ROLES = ("train.yaml", "evaluate.yaml", "multi_gpu_train.yaml", "inference.yaml", "tracking_mlflow.yaml")
FINETUNE = ("finetune.yaml", "finetune_published.yaml")
# workflows of single bundles, which stand alone or go over others than train.yaml
FURTHER = (
    "all_stages.yaml",
    "finetune_evaluate.yaml",
    "match.yaml",
    "register.yaml",
    "track_lesions.yaml",
    "two_dimensions.yaml",
)
TIME_LIMIT = 300


def settings_of(bundle: Path) -> BundleSettings:
    return SETTINGS.get(bundle.name, BundleSettings())


def variants(bundle: Path) -> list[str]:
    return sorted(
        path.name for path in (bundle / "configs").glob("*.yaml") if path.name not in ROLES + FINETUNE + FURTHER
    )


def copy_bundle(bundle: Path, parent: Path) -> Path:
    """A copy without what earlier runs in the checkout have left."""
    ignore = shutil.ignore_patterns("models", "eval", "__pycache__")
    return shutil.copytree(bundle, parent / bundle.name, ignore=ignore)


def load_config(bundle: Path, *files: str) -> dict[str, Any]:
    return deepcopy(_load_config(bundle, *files))


@cache
def _load_config(bundle: Path, *files: str) -> dict[str, Any]:
    return ConfigParser.load_config_files([str(bundle / "configs" / file) for file in files])


def make(bundle: Path, *files: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    """A workflow of the given configuration files, initialized."""
    paths = [str(bundle / "configs" / file) for file in files]
    workflow = ConfigWorkflow(paths, logging_file=False, workflow_type=kind, bundle_root=str(bundle), **overrides)
    workflow.initialize()
    return workflow


def run(workflow: ConfigWorkflow) -> ConfigWorkflow:
    """Run an initialized workflow; ``run`` puts the bundle on the module path, which is taken back."""
    path = list(sys.path)
    try:
        workflow.run()
        workflow.finalize()
    finally:
        sys.path[:] = path
    return workflow


def item(workflow: ConfigWorkflow, name: str) -> Any:
    return workflow.parser.get_parsed_content(name)


@contextmanager
def power_cut(workflow: ConfigWorkflow, iteration: int) -> Iterator[None]:
    """The trainer dies at the start of an iteration."""

    def die(engine: Engine) -> None:
        raise PowerCut(f"at iteration {engine.state.iteration}")

    item(workflow, "train#trainer").add_event_handler(Events.ITERATION_STARTED(once=iteration), die)
    with pytest.raises(RuntimeError) as caught:
        yield
    assert any(isinstance(error, PowerCut) for error in chain(caught.value)), "another error came first"


class PowerCut(RuntimeError):
    pass


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from, last one first; MONAI wraps each in the expression that was evaluated."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def command_line(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as ``python -m monai.bundle run`` takes them."""
    return [word for key, value in overrides.items() for word in (f"--{key}", f"{value}")]


def start(command: Sequence[str], cwd: Path, *module_path: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end or to the time limit, on the CPU with one thread per process."""
    path = os.pathsep.join([str(REPOSITORY), *module_path, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=TIME_LIMIT)
