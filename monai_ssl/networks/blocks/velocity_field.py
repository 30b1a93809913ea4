# SPDX-License-Identifier: Apache-2.0
"""From a velocity to the displacement that it leads to."""

from __future__ import annotations

import warnings

import torch
from monai.networks.blocks import DVF2DDF
from torch import Tensor

__all__ = ["integrate_velocity"]


def integrate_velocity(velocity: Tensor, num_steps: int = 7) -> Tensor:
    """The displacement at time 1 of a velocity that does not change, by MONAI's scaling and squaring.

    Source: the diffeomorphic VoxelMorph (arXiv 1805.04605), as used by SAME (arXiv 2109.11572). MONAI's layer makes its
    grid of voxels on the host at every step, since its cache compares other axes; here it is made once, on the device.

    Args:
        velocity: in voxels, (B, n, *size); beyond the image it is 0.
        num_steps: squarings; 0: the velocity itself.

    Returns:
        displacement in voxels, (B, n, *size), float32 also under autocast, or float64.
    """
    velocity = velocity if velocity.dtype == torch.float64 else velocity.float()
    if num_steps == 0:
        return velocity
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native grid_sample")  # it works without the compiled extension
        layer = DVF2DDF(num_steps, "bilinear", "zeros")
    axes = [torch.arange(length, dtype=velocity.dtype, device=velocity.device) for length in velocity.shape[2:]]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    layer.warp_layer.get_reference_grid = lambda ddf, jitter=False, seed=0: voxels
    return layer(velocity)
