# SPDX-License-Identifier: Apache-2.0
"""Public place of the stages of a U-Net.

The code lies in a module of another name: MONAI looks a short name such as ``UNetFeatures`` up as an attribute of its
module, and the package's attribute ``unet_stages`` is the function.
"""

from __future__ import annotations

from ._unet_stages import (
    UNetFeatures,
    UNetStages,
    check_plane_size,
    trained_blocks,
    trained_prefixes,
    unet_features,
    unet_stages,
)

__all__ = [
    "UNetFeatures",
    "UNetStages",
    "check_plane_size",
    "trained_blocks",
    "trained_prefixes",
    "unet_features",
    "unet_stages",
]
