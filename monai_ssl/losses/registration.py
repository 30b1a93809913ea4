# SPDX-License-Identifier: Apache-2.0
"""How well a field registers two images, and how smooth it is."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_ssl.networks.blocks.velocity_field import integrate_velocity

from ._precision import full_precision, no_autocast
from ._warping import normalised, places_in_moving, sample, warped_map

__all__ = ["RegistrationLoss", "embedding_loss", "local_ncc_loss", "ncc_loss", "smoothness_loss"]

SIMILARITIES = ("ncc", "lncc")
_INSIDE = 0.8  # share of the moving mask from which a warped voxel counts, as released


def ncc_loss(input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over items of 1 - Pearson's correlation over all voxels.

    Source: the similarity of SAM-VoxelMorph (arXiv 2109.11572) in its released code.

    Args:
        input: ``(B, C, *size)``, the warped image.
        target: ``(B, C, *size)``, the fixed image.
        mask: ``(B, 1, *size)`` or ``(B, *size)`` bool, True where a voxel counts; None for all.

    Returns:
        0-dim tensor in [0, 2]; 1 for items in which an image is constant or nothing counts.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    with no_autocast(input):
        x, t, valid = _checked(input, target, mask)
        rows = []
        for values in (x, t):
            values = values.flatten(1)  # (B, C * voxels)
            if valid is not None:
                counts = valid.expand_as(x).flatten(1)
                mean = (values * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
                rows.append((values - mean) * counts)
            else:
                rows.append(values - values.mean(1, keepdim=True))
        return 1 - F.cosine_similarity(*rows, dim=1, eps=1e-12).mean()


def local_ncc_loss(
    input: Tensor, target: Tensor, window: int = 9, mask: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Mean over items of 1 - mean over voxels of the squared correlation in a window around each.

    Source: the local similarity of VoxelMorph (arXiv 1809.05231). Means are taken over the part of a window that lies
    in the image; MONAI's `LocalNormalizedCrossCorrelationLoss` pads with 0, which makes borders of unlike images alike.

    Args:
        input: ``(B, C, *size)``, the warped image, with 1 to 3 spatial axes.
        target: ``(B, C, *size)``, the fixed image.
        window: voxels along each axis, odd.
        mask: ``(B, 1, *size)`` or ``(B, *size)`` bool, True for the centres that count; None for all.
        eps: added to the product of the variances.

    Returns:
        0-dim tensor in [0, 1]; 1 for items in which nothing counts.

    Raises:
        ValueError: an even window, shapes that do not fit, or a mask that is not bool.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd, at least 1, got {window}")
    with no_autocast(input):
        x, t, valid = _checked(input, target, mask)
        mean_x, mean_t, xx, tt, xt = (_window_mean(v, window) for v in (x, t, x * x, t * t, x * t))
        covariance = xt - mean_x * mean_t
        variances = (xx - mean_x * mean_x).clamp_min(0) * (tt - mean_t * mean_t).clamp_min(0)
        return 1 - _mean(covariance * covariance / (variances + eps), valid)


def smoothness_loss(velocity: Tensor, weight: float = 2.0) -> Tensor:
    """weight / n times the sum over axes of the mean squared forward difference.

    Source: the regularisation of VoxelMorph (arXiv 1809.05231) in its released code, on the normalised field as in that
    of SAME (arXiv 2109.11572). MONAI's `DiffusionLoss` takes central differences in voxels, another quantity.

    Args:
        velocity: ``(B, n, *size)`` in normalised units, that is voxels times 2 / (N - 1) along each axis.
        weight: 2 as released.

    Returns:
        0-dim tensor.

    Raises:
        ValueError: another number of components than axes.
    """
    n = velocity.ndim - 2
    if velocity.shape[1] != n or min(velocity.shape[2:]) < 2:
        raise ValueError(f"velocity {tuple(velocity.shape)} must be (B, n, *size) with n axes of at least 2 voxels")
    with no_autocast(velocity):
        v = full_precision(velocity)
        return sum(v.diff(dim=axis).square().mean() for axis in range(2, n + 2)) * (weight / n)


def embedding_loss(input_map: Tensor, target_map: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over items of the mean over cells of 1 - cosine.

    Source: the embedding similarity of SAM-VoxelMorph (arXiv 2109.11572).

    Args:
        input_map: ``(B, C, *map)``, the warped map.
        target_map: ``(B, C, *map)``.
        mask: ``(B, 1, *map)`` or ``(B, *map)`` bool, True where a cell counts; None for all.

    Returns:
        0-dim tensor in [0, 2]; 0 for items in which nothing counts.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    with no_autocast(input_map):
        x, t, valid = _checked(input_map, target_map, mask)
        return _mean(1 - F.cosine_similarity(x, t, dim=1, eps=1e-12)[:, None], valid)


class RegistrationLoss(nn.Module):
    """The loss of SAM-VoxelMorph (arXiv 2109.11572): similarity of the warped and the fixed image, and smoothness.

    Called with what :class:`RegistrationUNet` gives with ``integration_steps=0``, and a dictionary. The velocity is
    integrated and composed with the pre-alignment on the side of the fixed image, so that the original moving image is
    interpolated once, where the network saw it pre-aligned.

    Args:
        similarity: "ncc", :func:`ncc_loss`, or "lncc", :func:`local_ncc_loss`. Released: "ncc" with the weights below;
            for the abdomen "lncc" with a mask, weight 0.01 and smoothness 10.
        similarity_weight: of it.
        smoothness_weight: of :func:`smoothness_loss` on the normalised velocity.
        embedding_weight: of :func:`embedding_loss`; 0, as in all released configurations: no maps are needed.
        window: voxels of "lncc".
        num_steps: squarings from the velocity to the displacement; 0: a displacement is given.

    Shapes:
        velocity ``(B, n, *size)`` in voxels. target: ``fixed`` ``(B, C, *size)``; ``moving`` ``(B, C, *moving)``, on a
        grid of its own or the same; ``initial`` ``(B, n, *nodes)`` if there is a pre-alignment phi: phi - id at nodes
        that fill the fixed image, phi in coordinates of the moving image, both normalised (-1 and 1 are the centres of
        the outermost voxels); ``mask`` ``(B, 1, *size)`` bool if not all of the fixed image counts, and
        ``moving_mask`` ``(B, 1, *moving)`` bool likewise, which is warped and counts above 0.8; ``moving_map`` and
        ``fixed_map`` ``(B, D, *cells)`` whose cells fill the images, for ``embedding_weight``.
        0-dim result, float32 also under autocast, or float64.

    Raises:
        ValueError: an unknown similarity, a negative number of steps, an even window, keys of the target that are
            missing, or shapes that do not fit.
    """

    def __init__(
        self,
        similarity: str = "ncc",
        similarity_weight: float = 1.0,
        smoothness_weight: float = 100.0,
        embedding_weight: float = 0.0,
        window: int = 21,
        num_steps: int = 7,
    ) -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        if num_steps < 0 or window < 1 or window % 2 == 0:
            raise ValueError(f"num_steps {num_steps} must not be negative, and window {window} must be odd")
        self.similarity, self.window, self.num_steps = similarity, window, num_steps
        self.similarity_weight, self.smoothness_weight = similarity_weight, smoothness_weight
        self.embedding_weight = embedding_weight

    def forward(self, velocity: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        self._check(velocity, target)
        moving, fixed = target["moving"], target["fixed"]
        with no_autocast(velocity):
            phi = places_in_moving(integrate_velocity(velocity, self.num_steps), target.get("initial"))
            warped, mask = sample(moving, phi), target.get("mask")
            if "moving_mask" in target:
                inside = sample(target["moving_mask"], phi.detach()) > _INSIDE
                mask = inside if mask is None else inside & mask
            if self.similarity == "ncc":
                loss = self.similarity_weight * ncc_loss(warped, fixed, mask)
            else:
                loss = self.similarity_weight * local_ncc_loss(warped, fixed, self.window, mask)
            loss = loss + self.smoothness_weight * smoothness_loss(normalised(full_precision(velocity)))
            if self.embedding_weight:
                moved = warped_map(target["moving_map"], phi, target["fixed_map"].shape[2:], moving.shape[2:])
                loss = loss + self.embedding_weight * embedding_loss(moved, target["fixed_map"])
            return loss

    def _check(self, velocity: Tensor, target: Mapping[str, Tensor]) -> None:
        needed = ["moving", "fixed", *(["moving_map", "fixed_map"] if self.embedding_weight else [])]
        missing = [key for key in needed if key not in target]
        if missing:
            raise ValueError(f"target lacks {missing}, needed with embedding_weight={self.embedding_weight}")
        fixed, moving = target["fixed"], target["moving"]
        n = velocity.ndim - 2
        if velocity.shape[1] != n or fixed.shape[2:] != velocity.shape[2:] or moving.shape[:2] != fixed.shape[:2]:
            raise ValueError(
                f"velocity {tuple(velocity.shape)} must be (B, n, *size), fixed {tuple(fixed.shape)} of the same size, "
                f"and moving {tuple(moving.shape)} have as many items and channels"
            )


def _checked(x: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In full precision; the mask with a channel."""
    if x.ndim < 3 or x.shape != t.shape:
        raise ValueError(f"{tuple(x.shape)} and {tuple(t.shape)} must be equal, (B, C, *size)")
    valid = mask if mask is None or mask.ndim == x.ndim else mask[:, None]
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (len(x), 1, *x.shape[2:])):
        raise ValueError(
            f"mask {tuple(valid.shape)} of {valid.dtype} must be (B, 1, *size) bool, the images are {tuple(x.shape)}"
        )
    return full_precision(x), full_precision(t), valid


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Over items, of the mean of (B, C, *size) over what counts, 0 where nothing does."""
    if valid is None:
        return values.mean()
    counts = valid.expand_as(values).flatten(1)
    return ((values.flatten(1) * counts).sum(1) / counts.sum(1).clamp_min(1)).mean()


def _window_mean(values: Tensor, window: int) -> Tensor:
    """Over the part of each window that lies in the image, axis by axis; in 3D `avg_pool3d` refuses small images."""
    kernel, padding, shape = (window, 1), (window // 2, 0), values.shape
    for axis in range(2, values.ndim):
        rows = values.reshape(-1, shape[axis], prod(shape[axis + 1 :]))
        values = F.avg_pool2d(rows, kernel, stride=1, padding=padding, count_include_pad=False).reshape(shape)
    return values
