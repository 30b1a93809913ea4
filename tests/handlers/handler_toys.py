# SPDX-License-Identifier: Apache-2.0
"""A training run of seconds in which everything that a checkpoint must hold matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import monai.utils
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Loss
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from monai_ssl.data import KeyedDataset, KeyedSampler
from monai_ssl.handlers import MomentumUpdateHandler, PrepareBatchTensor, ResumeHandler


class ToyNet(nn.Module):
    """Dropout draws, BatchNorm counts, a teacher follows."""

    def __init__(self, hidden: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )
        self.teacher = deepcopy(self.student).requires_grad_(False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(image)
        return self.student(image) + 0.1 * target

    def update_teacher(self, momentum: float) -> None:
        for old, new in zip(self.teacher.parameters(), self.student.parameters()):
            old.data.lerp_(new.data, 1 - momentum)


def toy_items(number: int) -> list[dict[str, Any]]:
    return [
        {
            "image": torch.tensor([float(i), i % 3, 1.0]) / number,
            "label": torch.tensor([i / number]),
            "name": f"{i}.nii.gz",
        }
        for i in range(number)
    ]


def toy_trainer(
    directory: Path | None = None,
    *,
    resume: bool = False,
    max_epochs: int = 3,
    num_items: int = 10,
    accumulation_steps: int = 1,
    num_workers: int = 0,
    hidden: int = 4,
    processes: int = 1,
    find_unused_parameters: bool = False,
    saver_last: bool = False,
    handlers: Sequence[Any] = (),
    trainer_kwargs: Mapping[str, Any] | None = None,
    **resume_kwargs: Any,
) -> SupervisedTrainer:
    """A trainer of ``num_items / 2 / processes`` iterations per epoch, built anew from the seed at each call.

    ``handlers``: handlers, or functions that make one from the toy's network and evaluator.
    """
    monai.utils.set_determinism(seed=3)
    network = ToyNet(hidden)
    optimizer = torch.optim.AdamW(network.student.parameters(), lr=0.05)
    dataset = Dataset(toy_items(num_items), Compose([RandGaussianNoised("image", prob=1.0, std=0.1)]))
    loader = DataLoader(
        KeyedDataset(dataset, seed=5),
        sampler=KeyedSampler(dataset, processes, dist.get_rank() if processes > 1 else 0, seed=5),
        batch_size=2,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # the harder case: they outlive an epoch
    )
    steps = max_epochs * len(loader)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=steps)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(toy_items(4)), batch_size=2),
        network=network,
        prepare_batch=PrepareBatchTensor(),
        key_val_metric={"mse": Loss(nn.MSELoss(), output_transform=lambda o: (o["pred"], o["label"]))},
        decollate=False,
    )
    objects = {"network": network, "optimizer": optimizer, "lr_scheduler": scheduler, "evaluator": evaluator}
    saving = [ResumeHandler(objects, directory, resume=resume, **resume_kwargs)] if directory is not None else []
    own = [
        *([] if saver_last else saving),  # first in the list: the checkpoint must still hold what the others do
        MomentumUpdateHandler(network, 0.9, None, every=accumulation_steps, event="iteration_started"),
        ValidationHandler(1, evaluator),
        LrScheduleHandler(scheduler, print_lr=False, epoch_level=accumulation_steps > 1),
    ]
    wrapped: nn.Module = network
    if processes > 1:
        wrapped = nn.parallel.DistributedDataParallel(network, find_unused_parameters=find_unused_parameters)
        torch.manual_seed(dist.get_rank())  # each process has its own dropout
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=loader,
        network=wrapped,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        prepare_batch=PrepareBatchTensor(),
        accumulation_steps=accumulation_steps,
        decollate=False,
        train_handlers=[
            *own,
            *(h if hasattr(h, "attach") else h(network, evaluator) for h in handlers),
            *(saving if saver_last else []),
        ],
        **(trainer_kwargs or {}),
    )
    trainer.evaluator, trainer.scheduler = evaluator, scheduler
    return trainer


def everything(trainer: SupervisedTrainer) -> dict[str, Any]:
    """All that two equal runs must agree on, as a flat dictionary."""
    found: dict[str, Any] = {f"network.{k}": v.clone() for k, v in trainer.network.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        found.update({f"optimizer.{number}.{k}": v.clone() for k, v in state.items()})
    found["lr"] = trainer.optimizer.param_groups[0]["lr"]
    found["last_epoch"] = trainer.scheduler.last_epoch
    found["iteration"], found["epoch"] = trainer.state.iteration, trainer.state.epoch
    found["best"] = (trainer.evaluator.state.best_metric, trainer.evaluator.state.best_metric_epoch)
    found["random"] = torch.get_rng_state()
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, f"{key}: {found[key]} != {value}"


def run_engine(
    step: Any, handlers: Sequence[Any], epochs: int = 1, length: int = 3, accumulation_steps: int = 1
) -> Engine:
    """An ignite engine without a network, for handlers that only look at its state."""
    engine = Engine(step)
    engine.accumulation_steps = accumulation_steps
    for handler in handlers:
        handler.attach(engine)
    engine.run(list(range(length)), max_epochs=epochs)
    return engine


class Stop:
    """Ends a run as a user would, in the middle of an iteration's handlers."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self)

    def __call__(self, engine: Engine) -> None:
        raise KeyboardInterrupt


def interrupt(directory: Path, iteration: int, **kwargs: Any) -> None:
    """Run the toy up to, not including, an iteration."""
    handlers = (*kwargs.pop("handlers", ()), Stop(iteration))
    trainer = toy_trainer(directory, handlers=handlers, **kwargs)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    close(trainer)


def close(trainer: SupervisedTrainer) -> None:
    """End the workers now: the garbage collector takes seconds over them."""
    if trainer.data_loader._iterator is not None:
        trainer.data_loader._iterator._shutdown_workers()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
