# SPDX-License-Identifier: Apache-2.0
"""Draw once, apply to one image or to every key of an item: what the patch pretext transforms have in common."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import TransformBackends

__all__ = ["OneDraw", "OneDrawd", "check_written_keys", "shared_size", "with_meta_of"]


class OneDraw(Randomizable, Transform):
    """Array form: `randomize(image_size)` sets the attributes `drawn`, which `apply(img, *drawn)` takes in that order.

    `check` is called before any draw, so that an image that is refused leaves the random state as it was.
    """

    backend = [TransformBackends.TORCH]
    drawn: tuple[str, ...] = ()
    apply: Any

    def check(self, img: NdarrayOrTensor, name: str = "img") -> None:
        """Raise a ValueError when the image cannot be used."""

    def last_draw(self) -> tuple[Any, ...]:
        """The arguments of `apply` after the image, as they were drawn last."""
        values = tuple(getattr(self, name) for name in self.drawn)
        if any(value is None for value in values):
            raise RuntimeError("randomize=False repeats the last draw, but nothing has been drawn yet")
        return values

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> torch.Tensor:
        """Draw, unless `randomize` is False, which repeats the last draw, and apply.

        Args:
            img: image, (C, *spatial).
            randomize: whether to draw anew.
        """
        self.check(img)
        if randomize:
            self.randomize(tuple(img.shape[1:]))
        return self.apply(img, *self.last_draw())


class OneDrawd(MapTransform, Randomizable):
    """Dictionary form of a `OneDraw`: one draw for all keys, origins where there are any, and one label.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        transform: the array form.
        label_key: key of the label that is written, or None where the task has none.
        origins: whether `<key>_origin` is written.
        allow_missing_keys: do not raise when a key is absent.
    """

    backend = OneDraw.backend

    def __init__(
        self, keys: KeysCollection, transform: Any, label_key: str | None, origins: bool, allow_missing_keys: bool
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_written_keys(self.keys, label_key, origins)
        self.transform, self.label_key, self.origins = transform, label_key, origins
        self.R = transform.R

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> OneDrawd:
        """Seed the one source of all draws."""
        self.transform.set_random_state(seed, state)
        self.R = self.transform.R
        return self

    def randomize(self, image_size: Sequence[int]) -> None:
        """Draw once for all keys."""
        self.transform.randomize(image_size)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and apply to every key.

        Args:
            data: item with the images.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with what was written beside the untouched others.
        """
        d = dict(data)
        keys = list(self.key_iterator(d))
        if not keys:
            return d
        size = shared_size(d, keys)
        for key in keys:
            self.transform.check(d[key], str(key))
        if randomize:
            self.randomize(size)
        drawn = self.transform.last_draw()
        for key in keys:
            d[key] = self.transform.apply(d[key], *drawn)
            if self.origins:
                d[f"{key}_origin"] = self.transform.origins(*drawn).clone()
        if self.label_key is not None:
            d[self.label_key] = self.transform.label.clone()
        return d


def check_written_keys(keys: Sequence[Hashable], label_key: str | None, origins: bool = True) -> None:
    """Raise a ValueError when one key would be written twice."""
    names = [*map(str, keys), *(f"{key}_origin" for key in keys if origins)]
    names += [] if label_key is None else [label_key]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"keys {tuple(keys)} and label_key {label_key!r} would both write {twice}; choose other names")


def shared_size(data: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> tuple[int, ...]:
    """The spatial shape that all keys have, or a ValueError with two that differ."""
    first = tuple(data[keys[0]].shape[1:])
    for key in keys[1:]:
        if tuple(data[key].shape[1:]) != first:
            raise ValueError(
                f"one draw serves all keys, but '{keys[0]}' has spatial shape {first} and '{key}' "
                f"{tuple(data[key].shape[1:])}"
            )
    return first


def with_meta_of(img: NdarrayOrTensor, result: torch.Tensor, affine: torch.Tensor | None = None) -> torch.Tensor:
    """The result with a copy of the image's meta data, and `affine` if given; plain where meta data are not tracked."""
    if not get_track_meta():
        return result
    if not isinstance(img, MetaTensor):
        return MetaTensor(result)
    # the affine apart, since a deep copy of a tensor takes as long as all the rest
    meta = deepcopy({key: value for key, value in img.meta.items() if key != "affine"})
    return MetaTensor(result, meta={**meta, "affine": img.affine.clone() if affine is None else affine})
