# SPDX-License-Identifier: Apache-2.0
"""Pairs out of a dataset of volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.transforms import Compose
from torch.utils.data import Dataset

__all__ = ["PairDataset"]


class PairDataset(Dataset[Any]):
    """Items with a moving and a fixed volume, each loaded and cached once, in however many pairs it takes part.

    An item has the entries of its pair, `moving` and `fixed`, the volumes, and `moving_file` and `fixed_file`, their
    files.

    Args:
        volumes: dataset of the volumes, such as `cached_dataset`, whose items have the key "image".
        data: the items that it was made of, with "image", the file, in the same order.
        pairs: with "moving" and "fixed", files of `data`, and any other entries.
        transform: of the item.

    Raises:
        ValueError: a pair with a file that is not in `data`.
    """

    def __init__(
        self,
        volumes: Dataset[Any],
        data: Sequence[Mapping[str, Any]],
        pairs: Sequence[Mapping[str, Any]],
        transform: Callable[[dict[str, Any]], Any],
    ) -> None:
        number = {str(item["image"]): index for index, item in enumerate(data)}
        unknown = [str(pair[role]) for pair in pairs for role in ("moving", "fixed") if str(pair[role]) not in number]
        if unknown:
            raise ValueError(f"pairs name volumes that are not in data: {', '.join(unknown[:3])}")
        self.volumes, self.pairs = volumes, list(pairs)
        self.places = [tuple(number[str(pair[role])] for role in ("moving", "fixed")) for pair in pairs]
        self.transform = transform if isinstance(transform, Compose) else Compose(transform)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        pair = self.pairs[index]
        files = {f"{role}_file": str(pair[role]) for role in ("moving", "fixed")}
        moving, fixed = (self.volumes[place]["image"] for place in self.places[index])
        return self.transform({**pair, **files, "moving": moving, "fixed": fixed})
