# SPDX-License-Identifier: Apache-2.0
"""How far points lie from where they belong that are searched in an image bent by a known field, in mm."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt
from typing import Any

import torch
from monai.networks.utils import eval_mode
from torch import Tensor, nn

from monai_ssl.apps.registration.points import grid_points
from monai_ssl.transforms.normalised_fields import sample_field, to_normalised
from monai_ssl.transforms.view_geometry import spacing_of, voxel_index

from .matching_error import MatchingErrorMetric, matched_errors

__all__ = ["ElasticMatchingErrorMetric", "wave_displacement"]

WAVES = 3  # of each component


def wave_displacement(places: Tensor, amplitude_mm: float, wavelength_mm: float, seed: int) -> Tensor:
    """A smooth field known everywhere: each component is the mean of three sine waves of random direction and phase.

    The rows of its gradient are at most 2 pi amplitude / wavelength long, so that it folds nowhere while sqrt(n) times
    this is below 1.

    Args:
        places: (..., n), mm.
        amplitude_mm: largest displacement along an axis.
        wavelength_mm: of all waves.
        seed: of directions and phases; the same on every device.

    Returns:
        displacement (..., n) in mm, float64.

    Raises:
        ValueError: waves so high or so short that the field might fold.
    """
    n = places.shape[-1]
    check_waves(amplitude_mm, wavelength_mm, n)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(WAVES, n, n, generator=generator, dtype=torch.float64)
    phases = 2 * pi * torch.rand(WAVES, n, generator=generator, dtype=torch.float64)
    directions = (directions / directions.square().sum(-1, keepdim=True).sqrt()).to(places.device)
    along = torch.einsum("...j,wij->...wi", places.double(), directions)  # mm
    return amplitude_mm * torch.sin(2 * pi * along / wavelength_mm + phases.to(places.device)).mean(-2)


def check_waves(amplitude_mm: float, wavelength_mm: float, axes: int) -> None:
    """ValueError where a field of such waves might fold."""
    least = 2 * pi * sqrt(axes) * amplitude_mm
    if not 0 < least < wavelength_mm:
        raise ValueError(
            f"waves of {amplitude_mm} mm would fold at a wavelength of {wavelength_mm} mm in {axes}D: "
            f"wavelength_mm must be more than {least:.4g}, and the amplitude positive"
        )


class ElasticMatchingErrorMetric(MatchingErrorMetric):
    """Mean error of points of a bent copy of view 1 that are searched in view 1 itself, in mm; lower is better.

    A measure of SAM (arXiv 2012.02383) without labels, beside :class:`MatchingErrorMetric`, whose views differ by a
    shift and a scale alone: here no affine map takes one image to the other. The copy shows at place y what view 1
    shows at y + u(y), with the field u of :func:`wave_displacement`; points of a grid are searched for which that place
    lies in view 1. The k-th volume since `reset()` always gets the same field. A network that knows only where in a
    view a cell is, from padding, is off by the length of the displacement, 0.66 amplitudes on average in 3D: an
    amplitude should be some cells long.

    With `IgniteMetricHandler` and `AnatomicalEmbeddingNet`: `output_transform` is
    ``lambda o: (o["pred"], {"image": o["image"], "view_affine": o["label"]})``.

    Args:
        network: embeds the copies; gives a list of maps (B, C, *size), finest first. It is called in evaluation mode.
        roi_size: voxels of a view along each axis.
        amplitude_mm: largest displacement along an axis.
        wavelength_mm: of the field.
        seed: of the fields.
        stride: voxels from point to point of the grid.

    Shapes:
        called with the maps (2 B, C, *size) of both views and a mapping of `image`, view 1 (B, C, *roi), and
        `view_affine` (B, 2, n + 1, n + 1); `aggregate()` as of :class:`MatchingErrorMetric`.

    Raises:
        ValueError: a field that might fold, images that are no views of this size, or rows that are not twice the
            matrices.
    """

    def __init__(
        self,
        network: nn.Module,
        roi_size: Sequence[int],
        amplitude_mm: float = 20.0,
        wavelength_mm: float = 320.0,
        seed: int = 0,
        stride: int = 8,
    ) -> None:
        check_waves(amplitude_mm, wavelength_mm, len(roi_size))
        super().__init__(roi_size, stride)
        self.network, self.amplitude_mm, self.wavelength_mm, self.seed = network, amplitude_mm, wavelength_mm, seed

    def reset(self) -> None:
        """Forget all volumes; the next one is the first again."""
        super().reset()
        self._volumes = 0

    def _compute_tensor(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Tensor:
        image, affine = y["image"], y["view_affine"]
        volumes = len(affine)
        if len(image) != volumes or tuple(image.shape[2:]) != self.roi_size:
            raise ValueError(f"image {tuple(image.shape)} must be {volumes} views of {self.roi_size} voxels")
        if affine.ndim != 4 or any(len(m) != 2 * volumes for m in y_pred):
            raise ValueError(
                f"maps of {[len(m) for m in y_pred]} rows do not belong to view_affine {tuple(affine.shape)}: "
                "two rows for each volume"
            )
        fields = range(self.seed + self._volumes, self.seed + self._volumes + volumes)
        self._volumes += volumes
        spacings = spacing_of(affine[:, 0].double())
        with eval_mode(self.network):
            bent = self.network(torch.cat([self._bent(*view) for view in zip(image.split(1), spacings, fields)]))
        points = grid_points(self.roi_size, self.stride).double()
        rows = []
        for b, (spacing, field) in enumerate(zip(spacings.cpu(), fields)):
            true = points + self._displacement(points, spacing, field)
            maps = [m[b] for m in bent], [m[b].detach() for m in y_pred]
            rows.append(matched_errors(*maps, points, true, self.roi_size, spacing))
        return torch.stack(rows).to(y_pred[0].device)

    def _displacement(self, voxels: Tensor, spacing: Tensor, field: int) -> Tensor:
        """In voxels, (P, n)."""
        return wave_displacement(voxels * spacing, self.amplitude_mm, self.wavelength_mm, field) / spacing

    def _bent(self, image: Tensor, spacing: Tensor, field: int) -> Tensor:
        """An image (1, C, *roi) at the displaced voxels; its border continues."""
        voxels = voxel_index(self.roi_size, image.device).double()
        places = to_normalised(voxels + self._displacement(voxels, spacing, field), self.roi_size)
        return sample_field(image, places.T.reshape(1, -1, *self.roi_size))
