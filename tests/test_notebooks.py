# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
AT_EVERY_COMMIT = ("voco",)  # half a minute each


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat").read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_imports_what_exists(path: Path) -> None:
    cells = read(path).cells
    assert len(cells) <= 15
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    code = "\n".join(line for line in lines if not line.startswith("%"))
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert any((node.module or "").startswith("monai_ssl") for node in imported)
    for node in imported:
        module = importlib.import_module(node.module or "")
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in AT_EVERY_COMMIT else pytest.mark.slow, id=p.stem) for p in NOTEBOOKS],
)
def test_notebook_runs(path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.execution_count = None
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
