# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


class ProcessPair:
    """Two processes of one gloo group, which stay, since starting them takes far longer than any check."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD_SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies ends the wait for its answer
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, check: Callable[[int], None]) -> None:
        """Call `check(rank)` in both; the errors of either are raised here."""
        for pipe in self.pipes:
            pipe.send(check)
        errors = [pipe.recv() for pipe in self.pipes]
        assert not any(errors), "\n".join(filter(None, errors))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    # an error in one process leaves the other waiting for it: not for the half hour that is the default
    store, timeout = f"file://{rendezvous}", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    while (check := pipe.recv()) is not None:
        try:
            check(rank)
            pipe.send(None)
        except Exception:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
    dist.destroy_process_group()


def half(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of a joined batch that a process holds."""
    return x.chunk(WORLD_SIZE)[rank]
