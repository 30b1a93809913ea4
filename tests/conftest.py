# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MONAI_SSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real volumes; the test skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real volumes not found at {DATA}; set MONAI_SSL_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def metadata_schema(test_data: Path) -> Path:
    """MONAI's metadata schema, which lies beside the real volumes."""
    path = test_data.parent / "model_zoo" / "meta_schema_20240725.json"
    if not path.is_file():
        pytest.skip(f"metadata schema not found at {path}")
    return path


@pytest.fixture(scope="session")
def bundles() -> Path:
    return REPOSITORY / "bundles"


# what takes longest, which two workers share out best when it comes first
LONG = ("tests/integration/", "tests/test_notebooks.py", "tests/bundles/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker gets all tests of a bundle, which is then trained once, or of a file."""
    from xdist.scheduler import LoadScopeScheduling

    names = [path.name for path in (REPOSITORY / "bundles").iterdir()]

    class ByBundleOrFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return next((name for name in names if f"[{name}" in test), file)

    return ByBundleOrFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        file = item.path.relative_to(REPOSITORY).as_posix()
        return next((at for at, start in enumerate(LONG) if file.startswith(start)), len(LONG))

    items.sort(key=rank)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
