# SPDX-License-Identifier: Apache-2.0
"""A pair of images as a registration network is shown it, and what its answer makes of the pair."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.utils import one_hot
from monai.transforms import MapTransform
from torch import Tensor

from monai_ssl.networks.blocks.velocity_field import integrate_velocity
from monai_ssl.transforms.view_geometry import transform_points

from ..preprocessing import affine_of, load_image
from .alignment import read_alignment
from .fields import identity_field, sample_field, to_normalised
from .inner_step import on_grid
from .result import Registration

__all__ = ["AlignPaird", "RegisteredPaird", "initial_displacement"]


class AlignPaird(MapTransform):
    """Show the moving image where an earlier registration puts it, beside the fixed image.

    Source: the input of SAM-VoxelMorph (arXiv 2109.11572). An item holds afterwards `image` (2C, *size), moving and
    fixed, with the affine of the fixed image, and `initial` (n, *size), the earlier registration as `RegistrationLoss`
    takes it. Moving and fixed stay as they are. Padding of the fixed image at its ends, to sizes that the network
    takes, belongs before.

    Args:
        keys: of the moving and the fixed image, MetaTensors (C, *size) each on a grid of its own.
        alignment_key: of the file, see `align_pairs`, or of a `Registration`.
        allow_missing_keys: do not raise when a key is absent.

    Raises:
        ValueError: other than two keys, or an image without affine.
    """

    def __init__(
        self,
        keys: KeysCollection = ("moving", "fixed"),
        alignment_key: str = "alignment",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 2:
            raise ValueError(f"keys must name the moving and the fixed image, got {self.keys}")
        self.alignment_key = alignment_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        moving, fixed = (d[key] for key in self.keys)
        for key, image in zip(self.keys, (moving, fixed)):
            if not isinstance(image, MetaTensor):
                raise ValueError(f"'{key}' must be a MetaTensor with its affine, got {type(image).__name__}")
        earlier = _registration(d[self.alignment_key])
        initial = initial_displacement(earlier, moving, fixed)
        places = identity_field(fixed.shape[1:]) + initial[None]
        shown = sample_field(moving.as_tensor()[None].float(), places)[0]
        d["image"] = MetaTensor(torch.cat([shown, fixed.as_tensor().float()]), affine=fixed.affine)
        d["initial"] = initial
        return d


class RegisteredPaird(MapTransform):
    """Turn a network's answer into a registration in mm, and apply it to what shall be judged or kept.

    After the network, on a single item that `AlignPaird` made. An item holds afterwards, as asked for,

    - `registration`: the earlier registration with the network's displacement composed on the fixed side;
    - `ddf` (n, *size): the total displacement in voxels of the grid of `fixed`, whose folding can be measured;
    - `moved` and `target` (C, *size): the moving image as the network would be shown it now, and the fixed one;
    - with `num_classes` and label maps: `pred` and `label` (num_classes, *fixed), one-hot, the moving label map warped
      to the fixed one's own grid and that one, and `before`, the same by the world coordinates of the scans alone;
    - with points: `points` (P, n), where the fixed points are mapped, `target_points`, where they should be, and
      `points_before`, RAS mm;
    - with `warp`: `warped`, the moving scan on the fixed scan's own grid, with its file name, to be saved.

    Args:
        keys: of the network's answer, a velocity in voxels (n, *size) on the grid of the item's `fixed`; with label
            maps it is replaced.
        num_steps: squarings from the velocity to the displacement; 0: the answer is a displacement.
        alignment_key: see `AlignPaird`.
        num_classes: of label maps, with the background; 0: labels are not looked at.
        warp: make `warped`.
        allow_missing_keys: do not raise when a key is absent.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        num_steps: int = 7,
        alignment_key: str = "alignment",
        num_classes: int = 0,
        warp: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_steps, self.alignment_key = num_steps, alignment_key
        self.num_classes, self.warp = num_classes, warp

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        (key,) = self.keys
        answer = torch.as_tensor(d[key]).as_subclass(Tensor).float().cpu()
        field = integrate_velocity(answer[None], self.num_steps)[0]
        fixed = d["fixed"]
        earlier = on_grid(_registration(d[self.alignment_key]), affine_of(fixed), fixed.shape[1:])
        linear = earlier.grid_affine[:-1, :-1].to(field.dtype)
        result = earlier.then_inner(torch.einsum("ij,j...->i...", linear, field))
        unmoved = Registration(
            torch.eye(field.ndim, dtype=torch.float64), None, result.grid_affine, result.grid_size,
            result.points[:0], result.scores[:0], {},
        )  # fmt: skip
        d["registration"], d["ddf"] = result, result.ddf()[0]
        d["moved"], d["target"] = result.warp(d["moving"], like=fixed), fixed
        if self.num_classes and "moving_label" in d:
            moving, fixed = load_image(d["moving_label"]), load_image(d["fixed_label"])
            d["label"] = _one_hot(fixed, self.num_classes)
            for name, registration in ((key, result), ("before", unmoved)):
                warped = registration.warp(moving, like=fixed, mode="nearest", padding_mode="zeros")
                d[name] = _one_hot(warped, self.num_classes)
        if "fixed_points" in d:
            points = torch.as_tensor(d["fixed_points"], dtype=torch.float64)
            d["points"], d["points_before"] = result.map_points(points), points
            d["target_points"] = torch.as_tensor(d["moving_points"], dtype=torch.float64)
        if self.warp:
            fixed = load_image(str(d["fixed_file"]))
            d["warped"] = result.warp(str(d["moving_file"]), like=fixed, padding_mode="background")
            d["warped"].meta["filename_or_obj"] = str(d["fixed_file"])
        return d


AlignPairD = AlignPairDict = AlignPaird
RegisteredPairD = RegisteredPairDict = RegisteredPaird


def initial_displacement(registration: Registration, moving: MetaTensor, fixed: MetaTensor) -> Tensor:
    """A registration as normalised displacement: for each voxel of fixed its place in moving, minus its own place.

    Args:
        registration: fixed world to moving world.
        moving: (C, *moving), with affine.
        fixed: (C, *size), with affine.

    Returns:
        phi - id, (n, *size) float32: phi normalised by the size of moving, id by that of fixed.
    """
    size, n = tuple(fixed.shape[1:]), fixed.ndim - 1
    identity = identity_field(size, torch.zeros((), dtype=torch.float64))
    axes = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in size), indexing="ij"))
    voxels = (axes + registration.ddf(like=fixed)[0].double()).flatten(1).T  # (V, n) on the grid of fixed
    matrix = torch.linalg.inv(affine_of(moving)) @ affine_of(fixed)
    phi = to_normalised(transform_points(matrix, voxels), moving.shape[1:])
    return (phi.T.reshape(n, *size) - identity[0]).float()


def _registration(value: Any) -> Registration:
    return value if isinstance(value, Registration) else read_alignment(value)


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    """(1, *size) -> (num_classes, *size); values beyond count as background."""
    values = label.as_subclass(Tensor).long()
    values = torch.where(values < num_classes, values, 0)
    return one_hot(values[None], num_classes)[0]
