# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import SurfaceDistanceMetric

__all__ = ["SurfaceDistanceMM"]


class SurfaceDistanceMM(SurfaceDistanceMetric):
    """Symmetric average surface distance in mm, with the voxel size of each label's own affine.

    MONAI's metric counts in voxels unless `spacing` is handed to every call, which its Ignite handler cannot do.
    Classes absent from the label or the prediction give nan or inf and are left out of the mean over cases by MONAI's
    reduction for nan; a class that was not predicted at all (inf) is counted as nan.

    Shapes: lists of one-hot (C, *spatial), as decollated by the evaluator.
    """

    def __init__(self, include_background: bool = False) -> None:
        super().__init__(include_background=include_background, symmetric=True)

    def __call__(self, y_pred: Sequence[torch.Tensor], y: Sequence[torch.Tensor], **kwargs: Any) -> torch.Tensor:
        values = []
        for prediction, label in zip(y_pred, y):
            spacing = label.pixdim.tolist() if isinstance(label, MetaTensor) else None
            with warnings.catch_warnings():
                # MONAI 1.6.1 calls its own deprecated argument; and a missing class is dealt with below
                warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
                warnings.filterwarnings("ignore", message=".*this may result in nan/inf distance")
                value = self._compute_tensor(_plain(prediction)[None], _plain(label)[None], spacing=spacing)
            values.append(torch.where(torch.isinf(value), torch.nan, value))
        result = torch.cat(values)
        self.extend(result)
        return result


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_tensor() if isinstance(x, MetaTensor) else x
