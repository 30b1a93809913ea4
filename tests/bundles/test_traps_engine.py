# SPDX-License-Identifier: Apache-2.0
"""What the engines and checkpoints of MONAI 1.6.1 and ignite 0.5.5 do where a remedy of ours depends on it.

A test here that fails after an upgrade says that the remedy named in its docstring can be simplified or must change.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver, IgniteMetricHandler, from_engine
from torch import nn

METRIC_PER_EPOCH = (3.0, 1.0, 2.0)


def engine(epochs: int = 1, fail: bool = False) -> Engine:
    def step(_: Engine, batch: Any) -> Any:
        if fail:
            raise ValueError("the loss is not finite")
        return batch

    created = Engine(step)
    created.state.max_epochs = epochs
    return created


def trainer(**kwargs: Any) -> SupervisedTrainer:
    network = kwargs.pop("network", nn.Conv3d(1, 1, 1))
    data = [{"image": torch.ones(1, 2, 3, 4), "label": torch.zeros(1, 2, 3, 4)} for _ in range(2)]
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(data, batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        **kwargs,
    )


def test_a_checkpoint_loader_that_is_not_strict_loads_nothing(tmp_path: Path) -> None:
    """Remedy: load_pretrained, strict."""
    torch.save({"weight": torch.full((1, 1), 7.0), "bias": torch.zeros(1)}, tmp_path / "model.pt")
    network = nn.Linear(1, 1)
    before = network.weight.item()
    loader = CheckpointLoader(str(tmp_path / "model.pt"), {"model": network}, strict=False, strict_shape=False)
    run = engine()
    loader.attach(run)
    run.run([0], max_epochs=1)
    assert network.weight.item() == before
    strict = engine()
    CheckpointLoader(str(tmp_path / "model.pt"), {"model": network}).attach(strict)
    strict.run([0], max_epochs=1)
    assert network.weight.item() == 7.0


@pytest.mark.parametrize(
    "names, nested", [(("model",), False), (("model", "optimizer"), True)], ids=["one object", "two objects"]
)
def test_b_the_form_of_a_checkpoint_depends_on_how_much_is_in_it(tmp_path: Path, names: Any, nested: bool) -> None:
    """Remedy: model.pt comes from a saver with exactly one object."""
    run = engine()
    objects = {"model": nn.Linear(1, 1), "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)}
    saver = CheckpointSaver(str(tmp_path), {name: objects[name] for name in names}, save_final=True, final_filename="f")
    saver.attach(run)
    run.run([0], max_epochs=1)
    found = set(torch.load(tmp_path / "f", weights_only=True))
    assert found == (set(names) if nested else {"weight", "bias"})


def test_c_the_final_checkpoint_is_also_written_after_an_error(tmp_path: Path) -> None:
    """Remedy: PretrainedSaver writes on COMPLETED only."""
    network = nn.Linear(1, 1)
    good = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(good, tmp_path / "model.pt")
    run = engine(fail=True)
    saver = CheckpointSaver(str(tmp_path), {"model": network}, save_final=True, final_filename="model.pt")
    saver.attach(run)
    nn.init.constant_(network.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        run.run([0], max_epochs=1)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].isnan().all()


def test_d_the_state_of_a_trainer_holds_no_randomness() -> None:
    """Remedy: ResumeHandler keeps the random states itself."""
    assert set(trainer().state_dict()) == {"epoch_length", "iteration", "max_epochs"}


def test_e_a_handler_of_errors_swallows_them() -> None:
    """Remedy: every EXCEPTION_RAISED handler of ours raises again."""
    run = engine(fail=True)
    seen: list[Exception] = []
    run.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    run.run([0], max_epochs=1)
    assert [str(error) for error in seen] == ["the loss is not finite"]


@pytest.mark.parametrize("compare, best", [(None, 3.0), (lambda current, best: current < best, 1.0)])
def test_f_an_evaluator_takes_the_highest_metric_for_the_best(compare: Any, best: float) -> None:
    """Remedy: a lower-is-better key metric also sets metric_cmp_fn."""
    values = iter(METRIC_PER_EPOCH)
    metric = IgniteMetricHandler(
        loss_fn=lambda pred, _: torch.tensor([next(values)]),
        output_transform=lambda output: (output["pred"], output["label"]),
    )
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.zeros(1, 1), "label": torch.zeros(1, 1)}],
        network=nn.Identity(),
        key_val_metric={"loss": metric},
        decollate=False,
        **({} if compare is None else {"metric_cmp_fn": compare}),
    )
    for epoch in range(len(METRIC_PER_EPOCH)):
        evaluator.run(global_epoch=epoch + 1)
    assert evaluator.state.best_metric == best


def test_r_decollation_cuts_outputs_and_wraps_the_loss() -> None:
    """Remedy: decollate is false, and the loss is read by a lambda."""

    class SixPerBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.scale * image.repeat(3, 1, 1, 1, 1)

    seen: list[Any] = []
    for decollate in (True, False):
        run = trainer(network=SixPerBatch(), decollate=decollate)
        run.loss_function = lambda pred, label: pred.mean()
        run.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
        run.run()
    assert isinstance(seen[0], list)
    assert len(seen[0]) == 6, "six dictionaries for a batch of two"
    assert seen[1]["pred"].shape[0] == 6
    assert seen[1]["loss"].ndim == 0
    assert isinstance(from_engine(["loss"], first=True)(seen[1]), tuple), "what MONAI's loggers read by default"


def test_s_amp_on_a_cpu_warns() -> None:
    """Remedy: amp only where the device is CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(amp=True).run()
    assert any("CUDA is not available" in str(warning.message) for warning in caught)
