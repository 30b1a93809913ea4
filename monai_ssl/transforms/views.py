# SPDX-License-Identifier: Apache-2.0
"""Several random views of one image (Exemplar, SimCLR)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from monai.utils import MAX_SEED, convert_to_tensor

from ._one_draw import OneDraw, shared_size, with_meta_of

__all__ = ["RandViews", "RandViewsD", "RandViewsDict", "RandViewsd"]


class RandViews(OneDraw):
    """Apply one random transform several times to the same image and stack the results.

    Source: 3D Exemplar (arXiv 2006.03829). The released code leaves one of two views as it is, which the border of the
    other then gives away; here all views are drawn alike.
    The last draw stays in `seeds` (V,) uint32, one for each view.

    Args:
        num_views: number V of views.
        transform: called with a copy of the image for each view, in whatever form that is given. It is copied here and
            must be `Randomizable` (a Compose is); everything random in it must come from its own random state.

    Shapes: (C, *spatial) -> (V, C, *new spatial). With meta tracking it carries the affine of the image, not those that
    `transform` may have given to single views.

    Raises:
        ValueError: when there is no view, `transform` is not random, or views differ in shape or are no single image.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    drawn = ("seeds",)

    def __init__(self, num_views: int, transform: Callable[..., Any]) -> None:
        self.transform = _checked_transform(num_views, transform)
        self.num_views = num_views
        self.seeds: np.ndarray | None = None

    def randomize(self, image_size: Sequence[int] | None = None) -> None:
        """Draw one seed for each view."""
        self.seeds = _draw_seeds(self.R, self.num_views)

    def apply(self, img: NdarrayOrTensor, seeds: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Make one view for each of the `seeds`, without any draw from the own random state: (V, C, *new spatial)."""
        views = []
        for seed in seeds:
            self.transform.set_random_state(seed=int(seed))
            views.append(self.transform(_copy(img)))
        return _stack(views, img, "img")


class RandViewsd(MapTransform, Randomizable):
    """Dictionary form of `RandViews` around a dictionary transform, so that all keys of one view stay aligned.

    Source: arXiv 2006.03829. An item holds afterwards, for every key, `<key>` views (V, C, *new spatial); nothing else
    is written. The last draw stays in `seeds` (V,) uint32.

    Args:
        keys: images of one spatial shape, (C, *spatial).
        num_views: see `RandViews`.
        transform: see `RandViews`; called with a dictionary of `keys` only.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: as `RandViews`; or when keys differ in spatial shape.
        RuntimeError: on a call with `randomize=False` before any draw.
    """

    backend = RandViews.backend

    def __init__(
        self,
        keys: KeysCollection,
        num_views: int,
        transform: Callable[..., Any],
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = _checked_transform(num_views, transform)
        self.num_views = num_views
        self.seeds: np.ndarray | None = None

    def randomize(self, image_size: Sequence[int] | None = None) -> None:
        """Draw one seed for each view, for all keys."""
        self.seeds = _draw_seeds(self.R, self.num_views)

    def apply(
        self, images: Mapping[Hashable, NdarrayOrTensor], seeds: Sequence[int] | np.ndarray
    ) -> dict[Hashable, torch.Tensor]:
        """Make one view of all images for each of the `seeds`, without any draw from the own random state."""
        views = []
        for seed in seeds:
            self.transform.set_random_state(seed=int(seed))
            views.append(self.transform({key: _copy(img) for key, img in images.items()}))
        return {key: _stack([view[key] for view in views], img, str(key)) for key, img in images.items()}

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Draw, unless `randomize` is False, which repeats the last draw, and make the views.

        Args:
            data: item with the images.
            randomize: whether to draw anew.

        Returns:
            A new dictionary with the views beside the untouched others.
        """
        d = dict(data)
        keys = list(self.key_iterator(d))
        if not keys:
            return d
        size = shared_size(d, keys)
        if randomize:
            self.randomize(size)
        if self.seeds is None:
            raise RuntimeError("randomize=False repeats the last draw, but nothing has been drawn yet")
        d.update(self.apply({key: d[key] for key in keys}, self.seeds))
        return d


RandViewsD = RandViewsDict = RandViewsd


def _checked_transform(num_views: int, transform: Callable[..., Any]) -> Any:
    """A copy of the transform, or a ValueError."""
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    if not isinstance(transform, Randomizable):
        raise ValueError(f"{type(transform).__name__} is not Randomizable, so that all views would be equal")
    return deepcopy(transform)


def _draw_seeds(state: np.random.RandomState, num_views: int) -> np.ndarray:
    return state.randint(MAX_SEED, size=num_views, dtype="uint32")


def _copy(img: NdarrayOrTensor) -> NdarrayOrTensor:
    return img.clone() if isinstance(img, torch.Tensor) else img.copy()


def _stack(views: Sequence[Any], img: NdarrayOrTensor, name: str) -> torch.Tensor:
    """The views of one image in one tensor (V, C, *new spatial) of their own memory."""
    if any(isinstance(view, MetaTensor) and view.pending_operations for view in views):
        raise ValueError("the transform left lazy operations pending; put it into Compose(..., lazy=True)")
    if not all(isinstance(view, (torch.Tensor, np.ndarray)) for view in views):
        raise ValueError(f"each view of '{name}' must be one image, got {[type(view).__name__ for view in views]}")
    plain = [convert_to_tensor(view, track_meta=False) for view in views]
    shapes = sorted({tuple(view.shape) for view in plain})
    if len(shapes) > 1:
        raise ValueError(f"views of '{name}' differ in shape: {shapes}; let the transform end in one size")
    return with_meta_of(img, torch.stack(plain))
