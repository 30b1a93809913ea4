# SPDX-License-Identifier: Apache-2.0
"""The wheel alone, in an empty environment with the pinned versions, trains every bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .running import NAMES, REPOSITORY, command_line, copy_bundle
from .settings import BundleSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SOURCES = ("setup.cfg", "pyproject.toml", "LICENSE", "README.md")


def execute(command: Sequence[str], cwd: Path) -> str:
    """Run a command that sees nothing of this checkout; its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The interpreter of an environment that holds the wheel and what it requires."""
    pytest.importorskip("setuptools", minversion="77")
    root = tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        shutil.copy(REPOSITORY / name, root)
    shutil.copytree(REPOSITORY / "monai_ssl", root / "monai_ssl", ignore=shutil.ignore_patterns("__pycache__"))
    execute([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."], root)
    shutil.rmtree(root / "monai_ssl")
    execute([sys.executable, "-m", "venv", "venv"], root)
    interpreter = str(root / "venv" / "bin" / "python")
    wheel = next((root / "dist").glob("*.whl"))
    constraints = str(REPOSITORY / "constraints.txt")
    execute([interpreter, "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel)], root)
    yield interpreter
    shutil.rmtree(root)


def test_import(python: str, tmp_path: Path) -> None:
    place = execute([python, "-c", "import monai_ssl; print(monai_ssl.__file__)"], tmp_path).strip()
    assert Path(place).is_relative_to(Path(python).parents[1])
    assert (Path(place).parent / "py.typed").is_file()
    assert "export_bundle" in execute([python, "-m", "monai_ssl", "--help"], tmp_path)


@pytest.mark.parametrize("bundle", NAMES, indirect=True)
def test_bundle(python: str, bundle: Path, settings: BundleSettings, dataset: Path, tmp_path: Path) -> None:
    root = copy_bundle(bundle, tmp_path)
    files = str([str(root / "configs" / file) for file in settings.quick_files])
    options = {**settings.quick, "max_epochs": 1, "bundle_root": str(root), "dataset_dir": str(dataset)}
    execute([python, "-m", "monai.bundle", "run", "--config_file", files, *command_line(options)], tmp_path)
    assert (root / "models" / "model.pt").is_file()
    execute([python, "-m", "monai_ssl", "export_bundle", str(root), str(tmp_path / "release")], tmp_path)
