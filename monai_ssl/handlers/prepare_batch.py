# SPDX-License-Identifier: Apache-2.0
"""From a collated batch to what MONAI's SupervisedTrainer feeds the network and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.utils import ensure_tuple

from monai_ssl.data.prepare_batch import plain_tensor

__all__ = ["PrepareBatchTensor"]


class PrepareBatchTensor(PrepareBatch):
    """Hand image, label and named extra inputs to the engine as plain tensors on its device.

    A MetaTensor that reaches a network can end up in a buffer, and with it the name of the patient's file in the
    checkpoint; so none passes.

    Args:
        image_key: key of the network's first argument. A mapping name -> key, or a sequence of keys, which are the
            names then, makes it a dictionary name -> tensor, as ``MultiTaskNet`` takes it.
        label_key: key of the loss function's target; where the batch lacks it the target is None. A mapping or sequence
            as above makes it a dictionary, as ``MultiTaskLoss`` takes it, of which nothing may be absent.
        extra_keys: keys whose values the network's ``forward`` gets as keyword arguments of the same name.

    Returns of a call:
        ``(image, label)``, or ``(image, label, (), {key: tensor})`` if there are extra keys.
    """

    def __init__(
        self,
        image_key: str | Sequence[str] | Mapping[str, str] = "image",
        label_key: str | Sequence[str] | Mapping[str, str] = "label",
        extra_keys: str | Sequence[str] = (),
    ) -> None:
        self.image_key = _named(image_key)
        self.label_key = _named(label_key)
        self.extra_keys = tuple(ensure_tuple(extra_keys))

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple:
        """Raises ``KeyError`` when a key is absent, save a single label's, ``TypeError`` when a value is no tensor."""

        plain = lambda key: plain_tensor(batchdata, key, device, non_blocking, **kwargs)

        def several(keys: str | dict[str, str]) -> Any:
            return plain(keys) if isinstance(keys, str) else {name: plain(key) for name, key in keys.items()}

        image = several(self.image_key)
        absent = isinstance(self.label_key, str) and batchdata.get(self.label_key) is None
        label = None if absent else several(self.label_key)
        if not self.extra_keys:
            return image, label
        return image, label, (), {key: plain(key) for key in self.extra_keys}


def _named(keys: str | Sequence[str] | Mapping[str, str]) -> str | dict[str, str]:
    return keys if isinstance(keys, str) else dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}
