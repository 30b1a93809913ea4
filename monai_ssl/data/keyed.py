# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from monai.transforms import Randomizable
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["KeyedDataset", "KeyedSampler"]


class KeyedDataset(Dataset[Any]):
    """A dataset whose random transforms depend only on (seed, epoch, index).

    Before each item the dataset's transform is seeded from these three numbers, so that a view is the same with any
    number of workers, processes and earlier items, and a run resumes without the state of its workers. Not for loaders
    with worker threads: these share one transform.

    Args:
        dataset: a MONAI dataset (`Dataset`, `CacheDataset`, `PersistentDataset`, `cached_dataset`).
        seed: at least 0.

    Raises:
        ValueError: the dataset has no transform that can be seeded, or the seed is negative.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        transform = getattr(dataset, "transform", None)
        if not isinstance(transform, Randomizable):
            raise ValueError(f"KeyedDataset needs a MONAI dataset with its `transform`, got {type(dataset).__name__}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        """The item of an index in epoch 0, or of (epoch, index)."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} of a dataset with {size} items")
        index = int(index) % size
        seed = np.random.SeedSequence([self.seed, int(epoch), index]).generate_state(1)[0]
        self.transform.set_random_state(seed=int(seed))
        return self.dataset[index]


class KeyedSampler(DistributedSampler[Any]):
    """A sampler of (epoch, index) for `KeyedDataset`; each process gets an even share, padded by the first items.

    MONAI's engines call `set_epoch` when an epoch starts, from 1 on.

    Args:
        dataset: the dataset, or anything of the same length.
        num_replicas: number of processes; None asks the process group.
        rank: of this process; None asks the process group.
        shuffle: another order in each epoch.
        seed: of the order, the same in all processes.
        drop_last: leave out the items that do not divide evenly instead of padding.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = 1,
        rank: int | None = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self._skip = 0

    def skip(self, num_samples: int) -> None:
        """Leave the first samples of this process out of the next iteration, and of that one only.

        For resuming inside an epoch. The length stays that of a whole epoch, as Ignite expects: after loading its
        state, an engine counts on from the iteration it was stopped at and asks for the remaining batches only.

        Args:
            num_samples: batches already done times the batch size of this process.

        Raises:
            ValueError: there are not so many samples.
        """
        if not 0 <= num_samples <= len(self):
            raise ValueError(f"cannot skip {num_samples} of {len(self)} samples")
        self._skip = num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        skipped, self._skip = self._skip, 0
        return iter([(self.epoch, index) for index in super().__iter__()][skipped:])
