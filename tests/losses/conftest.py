# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from .processes import ProcessPair


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPair]:
    """Calls a function of the rank in two processes of one gloo group."""
    pair = ProcessPair(tmp_path_factory.mktemp("gloo"))
    yield pair
    pair.close()
