# SPDX-License-Identifier: Apache-2.0
"""Names that bundles and users rely on: none is MONAI's, each leads to one class, each says what it is."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from monai.bundle import ComponentLocator
from monai.transforms import MapTransform

import monai_ssl

PACKAGES = {
    name: value for name, value in vars(monai_ssl).items() if name in monai_ssl.__all__ and inspect.ismodule(value)
}
PUBLIC = [(p, name, getattr(module, name)) for p, module in PACKAGES.items() for name in getattr(module, "__all__", ())]
CLASSES = {name: value for _, name, value in PUBLIC if inspect.isclass(value)}
COMPONENTS = {name: value for _, name, value in PUBLIC if inspect.isclass(value) or inspect.isfunction(value)}


def table(*excludes: str) -> dict[str, list[str]]:
    """MONAI's map from short names to modules; its own test for MONAI is that a module starts with "monai"."""
    locator = ComponentLocator(excludes=excludes)
    locator.get_component_module_name("any")
    assert locator._components_table
    return locator._components_table


def test_exports_exist_once() -> None:
    assert set(monai_ssl.__all__) - set(PACKAGES) == {"__version__"}
    for package, module in PACKAGES.items():
        names = list(getattr(module, "__all__", ()))
        assert len(names) == len(set(names)), package
    owners: dict[str, set[str]] = {}
    for package, name, _ in PUBLIC:
        owners.setdefault(name, set()).add(package)
    assert {name: places for name, places in owners.items() if len(places) > 1} == {}


def test_no_name_is_monais() -> None:
    monai = table("monai_ssl")
    assert "RandFlip" in monai  # the table is what it is taken for
    assert sorted(set(COMPONENTS) & set(monai)) == []


def test_each_name_leads_to_one_module() -> None:
    everything = table()
    for name, value in COMPONENTS.items():
        assert everything[name] == [value.__module__]


def test_dictionary_transforms_have_their_aliases() -> None:
    dictionary = {name for name, cls in CLASSES.items() if issubclass(cls, MapTransform) and name == cls.__name__}
    for name in dictionary:
        assert name.endswith("d")
        assert CLASSES[f"{name[:-1]}D"] is CLASSES[f"{name[:-1]}Dict"] is CLASSES[name]


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_docstring(name: str) -> None:
    assert (COMPONENTS[name].__doc__ or "").strip()


FIND = """
import json, sys
from monai.bundle import ConfigParser

assert "monai_ssl" not in sys.modules
names = json.loads(sys.argv[1])
config = {name: {"_target_": name, "_mode_": "callable"} for name in names}
parser = ConfigParser({"imports": ["$import monai_ssl"], **config})
parser.get_parsed_content("imports")
print(json.dumps({name: parser.get_parsed_content(name).__module__ for name in names}))
"""


def test_found_by_short_name_once_the_package_is_imported() -> None:
    command = [sys.executable, "-c", FIND, json.dumps(sorted(COMPONENTS))]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found == {name: value.__module__ for name, value in COMPONENTS.items()}


def test_packages_are_modules() -> None:
    assert all(isinstance(module, ModuleType) and module.__doc__ for module in PACKAGES.values())
