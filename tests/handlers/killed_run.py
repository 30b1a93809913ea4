# SPDX-License-Identifier: Apache-2.0
"""Trains toy runs that kill themselves with SIGKILL, and prints the signal that each ended by.

Arguments: for each run its folder, the iteration in which it dies and whether that is while it writes a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from handler_toys import toy_trainer
from ignite.engine import Events


def run(directory: str, iteration: int, writing: bool) -> None:
    trainer = toy_trainer(Path(directory), every_iterations=2, resume=True)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_while_writing(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half a file")
        die()

    @trainer.on(Events.ITERATION_STARTED(once=iteration))
    def now() -> None:
        if writing:
            torch.save = die_while_writing
        else:
            die()

    trainer.run()


if __name__ == "__main__":
    arguments = iter(sys.argv[1:])
    for directory, iteration, writing in zip(arguments, arguments, arguments):
        pid = os.fork()  # spares each run the seconds of the imports
        if pid == 0:
            run(directory, int(iteration), writing == "True")
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
