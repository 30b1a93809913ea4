# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import monai
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset, get_track_meta
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, RandomizableTrait, Transform
from monai.utils import convert_to_tensor

from monai_ssl.data.files import atomic_path, cache_root, file_signature, is_first_process

__all__ = ["DiskCacheDataset", "cached_dataset"]

CACHES = ("memory", "disk", "none")
_AFFINE = "_cached_affine"  # suffix of the key under which a volume's affine is stored beside it
_NOT_FILES = ("name", "subject")


def cached_dataset(
    data: Sequence[dict[str, Any]],
    transform: Callable | Sequence[Callable],
    cache: str = "memory",
    cache_dir: str | os.PathLike[str] | None = None,
    num_workers: int | None = None,
) -> Dataset:
    """A dataset whose deterministic transforms run once per volume; the three kinds give the same items.

    What is cached ends before the first random transform. Up to there volumes are stored as plain tensors with their
    affine; the random part receives MetaTensors with that affine and no other meta data, so the deterministic part
    cannot be inverted afterwards. To halve memory and disk, end the deterministic part with
    `CastToTyped(keys, dtype=torch.float16)` and cast back to float32 after the crop.

    Args:
        data: items of a datalist.
        transform: a `Compose` or a list of transforms. Its random part is seeded afterwards, through the `transform`
            of the dataset or by `KeyedDataset`.
        cache: "memory" (every process holds all volumes), "disk" (files that later runs use too) or "none".
        cache_dir: folder of the disk cache; default `volumes` in `$MONAI_SSL_CACHE` or `~/.cache/monai_ssl`. Entries
            depend on the transforms with all their parameters and on path, size and time of the volume's files;
            outdated ones stay until the folder is deleted.
        num_workers: threads that fill the memory cache; None takes up to 8.

    Raises:
        ValueError: `cache` is not one of the three, or the disk cache meets a transform or a value it cannot store.
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    composed = _mark_cached_part(transform)
    if cache == "none":
        return Dataset(data, composed)
    if cache == "disk":
        return DiskCacheDataset(data, composed, cache_dir if cache_dir is not None else cache_root() / "volumes")
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    return CacheDataset(data, composed, num_workers=workers, progress=is_first_process())


class DiskCacheDataset(PersistentDataset):
    """MONAI's `PersistentDataset` with stricter files: atomic, loaded with `weights_only`, renewed with their source.

    Args:
        data: items of a datalist.
        transform: transforms; the leading deterministic ones must be picklable and leave tensors, numbers and strings.
        cache_dir: folder of the cache.

    Raises:
        ValueError: a deterministic transform cannot be pickled, so its parameters cannot be part of the key.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable | Sequence[Callable],
        cache_dir: str | os.PathLike[str],
    ) -> None:
        super().__init__(data, transform, Path(cache_dir))
        try:
            self.set_transform_hash(pickle_hashing)
        except Exception as error:  # pickle raises PicklingError, AttributeError or TypeError
            raise ValueError(
                f"cache 'disk' needs deterministic transforms that can be pickled ({error}): replace a lambda by a "
                "function of a module, place it after the first random transform, or use cache 'memory'"
            ) from error

    def set_data(self, data: Sequence[dict[str, Any]]) -> None:
        """Use other items; nothing is deleted, since entries stay right and other runs may share the folder."""
        self.data = data

    def _cachecheck(self, item: dict[str, Any]) -> Any:
        file = self.cache_dir / f"{self._key(item)}.pt"
        if file.is_file():
            try:
                return torch.load(file, weights_only=True)
            except PermissionError:
                raise
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                warnings.warn(f"cached volume {file} is damaged and computed again: {error}", stacklevel=2)
        computed = self._pre_transform(deepcopy(item))
        with atomic_path(file) as temporary:
            torch.save(computed, temporary)
            try:
                return torch.load(temporary, weights_only=True)  # what every later read gives
            except UnpicklingError as error:
                raise ValueError(
                    f"item {item.get('name', item)} cannot be cached on disk: its values must be tensors, numbers or "
                    f"strings after the deterministic transforms; remove others with DeleteItemsd ({error})"
                ) from error

    def _key(self, item: dict[str, Any]) -> str:
        files = {key: file_signature(value) for key, value in item.items() if key not in _NOT_FILES and _is_path(value)}
        content = [monai.__version__, self.transform_hash, item, files]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _is_path(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_path(part) for part in value)
    return isinstance(value, (str, os.PathLike)) and os.path.exists(value)


def _mark_cached_part(transform: Callable | Sequence[Callable]) -> Compose:
    """The same transforms with the step to plain tensors, and back, between the cached and the random part."""
    whole: Any = transform if type(transform) is Compose else Compose(transform)
    composed = whole.flatten()
    steps = list(composed.transforms)
    first_random = composed.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
    )
    end = len(steps) if first_random is None else first_random
    return Compose(
        [*steps[:end], _ToPlain(), _FromPlain(), *steps[end:]],
        map_items=composed.map_items,
        unpack_items=composed.unpack_items,
        log_stats=composed.log_stats,
        lazy=composed.lazy,
        overrides=composed.overrides,
    )


class _ToPlain(Transform):
    """The last cached step: arrays and MetaTensors become plain tensors that own no more memory than they show."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        affines = {f"{key}{_AFFINE}": value.affine for key, value in data.items() if isinstance(value, MetaTensor)}
        plain = convert_to_tensor({**data, **affines}, convert_numeric=False, track_meta=False)
        return {key: _compact(value) if isinstance(value, torch.Tensor) else value for key, value in plain.items()}


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class _FromPlain:
    """The first step after the cache; no MONAI Transform, because that is where caching stops."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        result = {key: value for key, value in data.items() if not key.endswith(_AFFINE)}
        for key in [key for key in data if key.endswith(_AFFINE)] if get_track_meta() else ():
            volume = key[: -len(_AFFINE)]
            result[volume] = MetaTensor(data[volume], affine=data[key])
        return result
