# SPDX-License-Identifier: Apache-2.0
"""Between two logging iterations nothing of ours reads a value back from the device, which would make a GPU wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.networks.nets import UNet
from monai.optimizers import WarmupCosineSchedule
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl.handlers import (
    CurvesHandler,
    EmbeddingMonitor,
    FiniteLossHandler,
    GradientClipHandler,
    MomentumUpdateHandler,
    PrepareBatchTensor,
    RunProgressBar,
)
from monai_ssl.losses import VoCoLoss
from monai_ssl.networks import UNetEncoder, VoCoNet

LOGGING = 4
READING_OPERATORS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
READING_METHODS = ("tolist", "numpy", "cpu")


class CountReads(TorchDispatchMode):
    """Counts what hands values of a tensor to Python, or gives a result whose shape depends on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name in READING_METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        if func in READING_OPERATORS or any(mask is not None and mask.dtype is torch.bool for mask in masks):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [lambda x: x.max().item(), lambda x: bool(x.all()), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: x.numpy()],
    ids=["item", "bool", "tolist", "mask", "numpy"],
)
def test_a_read_is_seen(read: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with CountReads(monkeypatch) as mode:
        read(torch.ones(3))
    assert mode.counts


@pytest.mark.parametrize(("variant", "teacher"), [("v2", "projector"), ("v1", "full"), ("cvpr", "none")])
def test_an_iteration_reads_nothing(
    variant: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet(3, 1, 2, (4, 6, 8), (2, 2), num_res_units=1, norm="instance")
    net = VoCoNet(UNetEncoder(unet), 18, 12, 10, teacher=teacher)
    # on a CPU Adam reads its step count, which a GPU leaves in host memory
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3)
    schedule = WarmupCosineSchedule(optimizer, 2, 8)
    batch = {"image": torch.rand(2, 3, 1, 8, 8, 8), "image_base": torch.rand(2, 4, 1, 8, 8, 8)}
    batch["label"] = torch.rand(2, 3, 4).softmax(-1)
    handlers = [
        FiniteLossHandler(interval=LOGGING),
        MomentumUpdateHandler(net, 0.9, final_momentum=None, event="iteration_started"),
        LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
        GradientClipHandler(optimizer, 1.0),
        EmbeddingMonitor(net.embed, interval=LOGGING, flatten=2),
        CurvesHandler(tmp_path, interval=LOGGING, optimizer=optimizer),
        RunProgressBar(optimizer=optimizer, interval=LOGGING),
    ]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch] * (2 * LOGGING),
        network=net,
        loss_function=VoCoLoss(variant),
        optimizer=optimizer,
        prepare_batch=PrepareBatchTensor(extra_keys=["image_base"]),
        train_handlers=handlers if teacher != "none" else [handlers[0], *handlers[2:]],
        decollate=False,
    )
    mode, reads = CountReads(monkeypatch), {}

    def note(engine: Engine) -> None:
        reads[engine.state.iteration] = dict(mode.counts)
        mode.counts.clear()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    with mode:
        trainer.run()
    assert {iteration: counts for iteration, counts in reads.items() if iteration % LOGGING} == {
        iteration: {} for iteration in range(1, 2 * LOGGING) if iteration % LOGGING
    }
    assert reads[LOGGING]  # the loss is looked at there
