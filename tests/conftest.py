# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

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


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
