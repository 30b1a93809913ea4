# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.transforms.utils import scale_affine

__all__ = ["FeatureMapAffineD", "FeatureMapAffineDict", "FeatureMapAffined"]


class FeatureMapAffined(MapTransform):
    """Gives a feature map the affine of its own grid, so that it overlays the scan it was computed from.

    A strided network hands on the affine of its input although its output voxels are larger. The right one is
    ``affine(input) @ scale_affine(input shape, map shape, centered=True)``: both grids fill the same box in mm.

    Args:
        keys: feature maps, (C, *coarse spatial).
        source_key: the network's input, (C, *spatial), with its affine.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: when the source carries no affine.
    """

    def __init__(self, keys: KeysCollection, source_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key = source_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        source = d[self.source_key]
        if not isinstance(source, MetaTensor):
            raise ValueError(f"'{self.source_key}' carries no affine; keep it a MetaTensor up to this transform")
        for key in self.key_iterator(d):
            feature = torch.as_tensor(d[key])
            scale = scale_affine(source.shape[1:], feature.shape[1:], centered=True)
            rank = len(source.affine) - 1  # MONAI keeps a 4 x 4 affine for 2D images too
            scale = torch.as_tensor(to_affine_nd(rank, scale), dtype=source.affine.dtype, device=source.affine.device)
            meta = {k: v for k, v in source.meta.items() if k == "filename_or_obj"}
            plain = feature.as_tensor() if isinstance(feature, MetaTensor) else feature
            d[key] = MetaTensor(plain.clone(), affine=source.affine @ scale, meta=meta)
        return d


FeatureMapAffineD = FeatureMapAffineDict = FeatureMapAffined
