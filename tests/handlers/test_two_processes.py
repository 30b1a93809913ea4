# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from handler_toys import toy_trainer


def test_two_processes_then_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(here / "two_processes.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    resumed = toy_trainer(tmp_path / "runs", resume=True, num_items=6, max_epochs=4)  # 3 iterations per epoch as there
    resumed.run()
    assert resumed.state.iteration == 12
    assert "Checkpoint of 2 processes, now there are 1: fresh random states" in caplog.text
