# SPDX-License-Identifier: Apache-2.0
"""Trains the toy in two gloo processes, whole and interrupted and resumed; exits with 0 if all is as it should be."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from handler_toys import assert_same, everything, files, interrupt, toy_trainer

from monai_ssl.handlers import CurvesHandler, FreezeHandler, PretextPreview, PretrainedSaver, RunProgressBar
from monai_ssl.visualize import Panel


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    whole = toy_trainer(processes=2, num_items=12)
    whole.run()
    expected = everything(whole)
    states: list[torch.Tensor] = [torch.empty(0)] * 2
    dist.all_gather_object(states, expected["random"])
    assert not torch.equal(*states)  # else the test would not see states that are mixed up

    interrupt(folder / "runs", 6, processes=2, num_items=12, every_iterations=1)
    text = io.StringIO()
    looks = (
        lambda network, evaluator: CurvesHandler(folder / f"rank{rank}", 1, evaluator=evaluator),
        lambda network, evaluator: PretextPreview(lambda b: [Panel(b["image"][None])], folder / f"rank{rank}"),
        lambda network, evaluator: RunProgressBar(interval=1, first_gap=0.0, file=text),
        lambda network, evaluator: PretrainedSaver(network, folder / f"rank{rank}", network.student),
    )
    resumed = toy_trainer(folder / "runs", processes=2, num_items=12, resume=True, handlers=looks)
    resumed.run()
    assert_same(everything(resumed), expected)
    dist.barrier()
    assert files(folder / "runs") == ["checkpoint_iteration=000006.pt", "checkpoint_iteration=000009.pt"]
    assert (folder / f"rank{rank}").exists() == (rank == 0)
    assert bool(text.getvalue()) == (rank == 0)

    freeze = (lambda network, evaluator: FreezeHandler(network.student[:2], 1),)
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        toy_trainer(processes=2, num_items=12, handlers=freeze).run()
    frozen = toy_trainer(processes=2, num_items=12, handlers=freeze, find_unused_parameters=True)
    before = frozen.network.module.student[0].weight.detach().clone()
    frozen.state.max_epochs = 1
    frozen.run()
    assert torch.equal(frozen.network.module.student[0].weight, before)
    frozen.state.max_epochs = 2
    frozen.run()
    weights: list[torch.Tensor] = [torch.empty(0)] * 2
    dist.all_gather_object(weights, frozen.network.module.student[0].weight.detach())
    assert torch.equal(*weights)  # released, and still averaged over the processes
    assert not torch.equal(weights[0], before)
    dist.destroy_process_group()


if __name__ == "__main__":
    children = []
    for number in range(2):
        pid = os.fork()  # spares the second process the seconds of the imports
        if pid == 0:
            main(number, Path(sys.argv[1]))
            os._exit(0)
        children.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
