# SPDX-License-Identifier: Apache-2.0
"""Runs every speed and memory benchmark: ``python -m benchmarks``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STUDIES = {"label_efficiency", "landmarks", "registration"}  # hours, on volumes that the command line names
OTHERS = {"__init__", "__main__", "timing"} | STUDIES

if __name__ == "__main__":
    failed = 0
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in OTHERS:
            print(f"\n== {path.stem}", flush=True)
            failed += subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], check=False).returncode != 0
    sys.exit(failed)
