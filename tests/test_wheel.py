# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import email
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import monai_ssl

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "monai_ssl"
# import name -> name on the package index, where they differ
DISTRIBUTIONS = {"ignite": "pytorch-ignite", "yaml": "pyyaml"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves a build folder beside its sources and packs what it finds there."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, source)
    for name in ("monai_ssl", "bundles", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "eval"))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def files(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="session")
def metadata(wheel: Path, files: list[str]) -> Message:
    name = next(name for name in files if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_wheel_holds_the_package_and_nothing_else(files: list[str]) -> None:
    sources = {path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py")}
    packed = {name for name in files if ".dist-info/" not in name}
    assert packed == sources | {"monai_ssl/py.typed"}
    assert {"monai_ssl/__main__.py", "monai_ssl/networks/nets/__init__.py"} <= packed


def test_wheel_metadata(metadata: Message, files: list[str]) -> None:
    assert metadata["Name"] == "monai-ssl"
    assert metadata["Version"] == monai_ssl.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_imports_are_declared(metadata: Message) -> None:
    declared = {Requirement(line) for line in metadata.get_all("Requires-Dist", [])}
    needed = {canonicalize_name(r.name) for r in declared if r.marker is None}
    imported: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            imported.update({name.split(".")[0]: path for name in names})
    third_party = set(imported) - set(sys.stdlib_module_names) - {"monai_ssl"}
    undeclared = {name: imported[name] for name in third_party if DISTRIBUTIONS.get(name, name) not in needed}
    assert not undeclared
