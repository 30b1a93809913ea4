# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, Lambdad, RandSpatialCropd, RandSpatialCropSamplesd

from monai_ssl.data import KeyedDataset, KeyedSampler

ITEMS = [{"image": torch.arange(1000.0)[None] + 1000 * n, "name": f"scan_{n}"} for n in range(7)]


def identity(image: torch.Tensor) -> torch.Tensor:
    return image


def pipeline() -> Compose:
    """An item becomes the start of its crop: volume number times 1000 plus one of 1000 positions."""
    return Compose([Lambdad("image", identity), RandSpatialCropd("image", roi_size=(1,), random_size=False)])


def make(kind: str, tmp_path: Path) -> Any:
    if kind == "memory":
        return CacheDataset(ITEMS, pipeline(), progress=False)
    if kind == "disk":
        return PersistentDataset(ITEMS, pipeline(), tmp_path / "cache")
    return Dataset(ITEMS, pipeline())


def run(dataset: Any, epochs: int = 2, **arguments: Any) -> list[list[tuple[str, float]]]:
    """Names and positions in every batch, epoch after epoch."""
    sampler = KeyedSampler(dataset, seed=3)
    loader = DataLoader(KeyedDataset(dataset, seed=11), batch_size=2, sampler=sampler, **arguments)
    batches = []
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        batches += [list(zip(batch["name"], batch["image"].flatten().tolist())) for batch in loader]
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # 3 workers on two cores
@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
@pytest.mark.parametrize("num_workers, persistent", [(0, False), (2, False), (3, False), (2, True)])
def test_batches_are_the_same_for_all_workers_and_datasets(
    tmp_path: Path, kind: str, num_workers: int, persistent: bool
) -> None:
    torch.manual_seed(num_workers)  # the global seed plays no part
    batches = run(make(kind, tmp_path), num_workers=num_workers, persistent_workers=persistent)
    assert batches == run(Dataset(ITEMS, pipeline()))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1] * 2
    assert all(name == f"scan_{int(value) // 1000}" for batch in batches for name, value in batch)


def test_epochs_items_and_seeds_differ() -> None:
    dataset = Dataset(ITEMS, pipeline())

    def positions(seed: int, epoch: int) -> list[float]:
        keyed = KeyedDataset(dataset, seed=seed)
        return [float(keyed[epoch, index]["image"]) % 1000 for index in range(7)]

    draws = [positions(0, 0), positions(0, 1), positions(1, 0)]
    assert draws[0] == positions(0, 0)
    assert len({value for draw in draws for value in draw}) > 18  # 21 draws of 1000 positions


def test_items_do_not_depend_on_what_was_read_before() -> None:
    keyed = KeyedDataset(Dataset(ITEMS, pipeline()), seed=0)
    forward = [float(keyed[1, index]["image"]) for index in range(7)]
    assert [float(keyed[1, index]["image"]) for index in range(6, -1, -1)] == forward[::-1]


def test_plain_index_is_epoch_zero() -> None:
    keyed = KeyedDataset(Dataset(ITEMS, pipeline()), seed=0)
    assert len(keyed) == 7
    assert keyed[2]["image"] == keyed[0, 2]["image"] != keyed[1, 2]["image"]
    assert keyed[-1]["image"] == keyed[6]["image"]
    assert [item["name"] for item in keyed] == [item["name"] for item in ITEMS]  # IndexError ends the iteration
    for index in (7, -8, (0, 7)):
        with pytest.raises(IndexError, match="7 items"):
            keyed[index]


@pytest.mark.parametrize(
    "num_replicas, drop_last", [(1, False), (2, False), (3, False), (9, False), (2, True), (3, True)]
)
def test_replicas_share_the_items_evenly(num_replicas: int, drop_last: bool) -> None:
    samplers = [KeyedSampler(ITEMS, num_replicas, rank, seed=5, drop_last=drop_last) for rank in range(num_replicas)]
    for sampler in samplers:
        sampler.set_epoch(4)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {len(shares[0])}
    keys = [key for share in shares for key in share]
    assert {epoch for epoch, _ in keys} == {4}
    assert len(keys) == (7 // num_replicas if drop_last else -(-7 // num_replicas)) * num_replicas
    assert len(set(keys)) == min(7, len(keys))


def test_views_are_independent_of_the_number_of_replicas() -> None:
    keyed = KeyedDataset(Dataset(ITEMS, pipeline()), seed=2)

    def views(num_replicas: int) -> set[float]:
        found: set[float] = set()
        for rank in range(num_replicas):
            sampler = KeyedSampler(ITEMS, num_replicas, rank)
            sampler.set_epoch(3)
            found |= {float(keyed[key]["image"]) for key in sampler}
        return found

    assert views(1) == views(2) == views(3)


def test_order() -> None:
    sampler = KeyedSampler(ITEMS, seed=1)
    orders = []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(7))
    other = KeyedSampler(ITEMS, seed=4)
    other.set_epoch(1)
    assert [index for _, index in other] != orders[0]
    assert list(KeyedSampler(ITEMS, shuffle=False)) == [(0, index) for index in range(7)]


@pytest.mark.parametrize("num_workers, persistent", [(0, False), (2, True)])
def test_skip_leaves_out_the_done_batches_once(num_workers: int, persistent: bool) -> None:
    dataset = Dataset(ITEMS, pipeline())
    whole = run(dataset, epochs=2)
    sampler = KeyedSampler(dataset, seed=3)
    loader = DataLoader(
        KeyedDataset(dataset, 11), batch_size=2, sampler=sampler, num_workers=num_workers, persistent_workers=persistent
    )
    sampler.skip(4)
    rest = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        assert len(loader) == 4
        assert len(sampler) == 7
        rest += [list(zip(batch["name"], batch["image"].flatten().tolist())) for batch in loader]
    assert rest == whole[2:]


@pytest.mark.parametrize("number", [-1, 5])
def test_skip_refuses(number: int) -> None:
    with pytest.raises(ValueError, match=f"cannot skip {number} of 4 samples"):
        KeyedSampler(ITEMS, num_replicas=2, rank=1).skip(number)


def test_skip_counts_the_samples_of_this_process() -> None:
    sampler = KeyedSampler(ITEMS, num_replicas=2, rank=1)
    whole = list(sampler)
    sampler.skip(3)
    assert list(sampler) == whole[3:]
    sampler.skip(4)
    assert list(sampler) == []
    assert list(sampler) == whole


def trainer_of(seen: list[tuple[int, list[tuple[str, float]]]], max_epochs: int) -> tuple[SupervisedTrainer, Any]:
    dataset = Dataset(ITEMS, pipeline())
    sampler = KeyedSampler(dataset, seed=3)
    loader = DataLoader(KeyedDataset(dataset, seed=11), batch_size=2, sampler=sampler)
    network = torch.nn.Linear(1, 1)

    def prepare(batch: dict[str, Any], device: Any, non_blocking: bool, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        image = batch["image"].as_tensor().reshape(-1, 1)
        seen.append((trainer.state.epoch, list(zip(batch["name"], image.flatten().tolist()))))
        return image, image

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=torch.nn.MSELoss(),
        prepare_batch=prepare,
        decollate=False,
    )
    return trainer, sampler


def test_engine_sets_the_epoch_and_resumes_inside_it() -> None:
    whole: list[Any] = []
    trainer_of(whole, max_epochs=3)[0].run()
    assert [batch for _, batch in whole] == run(Dataset(ITEMS, pipeline()), epochs=3)
    assert [epoch for epoch, _ in whole] == [1] * 4 + [2] * 4 + [3] * 4

    first: list[Any] = []
    trainer, _ = trainer_of(first, max_epochs=3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), trainer.terminate)
    trainer.run()
    state = dict(trainer.state_dict())
    rest: list[Any] = []
    resumed, sampler = trainer_of(rest, max_epochs=3)
    resumed.load_state_dict(state)
    sampler.skip(2 * (state["iteration"] % state["epoch_length"]))
    resumed.run()
    assert first + rest == whole
    assert resumed.state.iteration == 12


def test_several_samples_per_item() -> None:
    samples = RandSpatialCropSamplesd("image", roi_size=(1,), num_samples=3, random_size=False)
    keyed = KeyedDataset(Dataset(ITEMS, Compose([samples])), seed=0)
    positions = [float(sample["image"]) for sample in keyed[1, 4]]
    assert len(set(positions)) == 3
    assert positions == [float(sample["image"]) for sample in keyed[1, 4]]


def test_pickles() -> None:
    keyed = KeyedDataset(Dataset(ITEMS, pipeline()), seed=8)
    sampler = KeyedSampler(keyed, seed=2)
    sampler.set_epoch(3)
    sampler.skip(2)
    again, sampler_again = pickle.loads(pickle.dumps((keyed, sampler)))
    assert [float(again[key]["image"]) for key in sampler_again] == [float(keyed[key]["image"]) for key in sampler]


def test_refuses_what_cannot_be_seeded() -> None:
    with pytest.raises(ValueError, match="MONAI dataset with its `transform`, got list"):
        KeyedDataset(ITEMS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        KeyedDataset(Dataset(ITEMS, pipeline()), seed=-1)
