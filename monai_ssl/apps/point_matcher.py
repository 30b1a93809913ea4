# SPDX-License-Identifier: Apache-2.0
"""Anatomical points of one scan found in another."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from .embedding_file import read_embedding, write_embedding
from .image_embedding import ImageEmbedding, body_cells, from_ras, tensor_digest, to_ras
from .network_maps import network_maps, slab_halo, total_stride
from .point_matching import match_points, similarity_map
from .preprocessing import affine_of, embedding_transform, image_name, load_image

__all__ = ["PointMatcher", "PointMatches", "check_filters"]

_IN_MEMORY = 2  # embeddings that are kept besides the files: those of a pair
_BODY = -17.4  # -500 HU as the default transform scales it


class PointMatches(NamedTuple):
    """Answers of `PointMatcher.match`, one row for each point, on the CPU.

    `points` (P, n) float64 in the space that was asked for; `score` (P,), the similarity in [-1, 1]; `cycle_error_mm`
    (P,) float64, how far matching back misses the point, None where it was not asked for; `accepted` (P,) bool.
    """

    points: Tensor
    score: Tensor
    cycle_error_mm: Tensor | None
    accepted: Tensor


class PointMatcher:
    """Finds points of one image in another by their embeddings; each image is embedded once.

    Source: SAM (arXiv 2012.02383). Query and answer lie between cells, where the released code rounds both; positions
    are computed in float64. It cannot find what the other image does not show: its score and the cycle error tell.

    Args:
        network: gives a list of maps (B, C, *size) of unit vectors, finest first, as `AnatomicalEmbeddingNet`, or one.
        transform: of images (C, *size) with affine to the network's input, see `embedding_transform`; None: its default
            for CT. It may crop and resample, since affines are followed.
        device: None: CUDA where there is one. The network is moved there.
        chunk_size: points whose similarity maps are in memory at a time.
        cache_dir: folder in which embeddings are kept as files, 128 channels at half the resolution: some 300 MB for a
            whole trunk at 2 mm. None: only the last two are kept, in memory.
        slab_size: voxels along the first axis that go through the network at a time, a multiple of 4, for images that
            the memory does not hold; the result stays the same. None: whole images.
        body_threshold: network input above which a voxel belongs to the body; points outside of it are not accepted.
            None: -17.4, that is -500 HU, with the default transform, and no such test with another.

    Raises:
        ValueError: a `slab_size` that is no multiple of 4, `chunk_size` below 1, or a device that is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        chunk_size: int = 64,
        cache_dir: str | Path | None = None,
        slab_size: int | None = None,
        body_threshold: float | None = None,
    ) -> None:
        if slab_size is not None and (not isinstance(slab_size, int) or slab_size < 4 or slab_size % 4):
            raise ValueError(
                f"slab_size must be a whole number of voxels along the first axis, a multiple of 4, got {slab_size!r}; "
                "images are not divided along other axes, where the network sees all of the patient"
            )
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.spatial_dims: int | None = getattr(network, "spatial_dims", None)
        self.device = _device(device)
        self.network = network.to(self.device)
        self.transform = embedding_transform(None, self.spatial_dims or 3) if transform is None else transform
        self.body_threshold = _BODY if body_threshold is None and transform is None else body_threshold
        self.chunk_size, self.slab_size = chunk_size, slab_size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._halo: int | None = None
        self._recent: OrderedDict[str, ImageEmbedding] = OrderedDict()

    @property
    def weights_sha256(self) -> str:
        """sha256 of the network's state dict: names, shapes and values."""
        state = self.network.state_dict()
        return tensor_digest(type(self.network).__name__, *(part for entry in state.items() for part in entry))

    def prepare(self, image: Any) -> MetaTensor:
        """The network's input for an image, (C, *size) with affine; arguments and errors as :meth:`embed`."""
        return self._prepare(image)[1]

    def embed(self, image: Any) -> ImageEmbedding:
        """Embed an image, or take its embedding from memory or from `cache_dir`.

        Args:
            image: a file, a folder with a DICOM series, or a MetaTensor (C, *size) as MONAI loads it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the image cannot be read, has other channels than the network takes, or holds NaN.
        """
        source, prepared = self._prepare(image)
        voxels, affine = prepared.as_tensor().float(), affine_of(prepared)
        key = tensor_digest(voxels, affine, self.weights_sha256, self.body_threshold)
        file = None if self.cache_dir is None else self.cache_dir / f"{key}.pt"
        embedding = self._recent.pop(key, None)
        if embedding is None and file is not None:
            embedding = read_embedding(file, self.device)
        if embedding is None:
            embedding = self._embed(voxels, affine, image_name(image))
            if file is not None:
                write_embedding(file, embedding)
        self._recent[key] = embedding
        while len(self._recent) > _IN_MEMORY:
            self._recent.popitem(last=False)
        return dataclasses.replace(embedding, source_affine=affine_of(source), source_size=tuple(source.shape[1:]))

    def match(
        self,
        query: Any,
        key: Any,
        points: Any,
        space: str = "RAS",
        cycle: bool = False,
        min_score: float | None = None,
        max_cycle_mm: float | None = None,
    ) -> PointMatches:
        """Find points of one image in another.

        Accepted are points of the body whose answer is in the body, with the score and cycle error asked for. Matching
        back is a filter and a measure of confidence; it does not move the answer.

        Args:
            query: image in which the points are known, as :meth:`embed` takes it, or its embedding.
            key: image to search, likewise.
            points: (P, n), in mm, or voxels of the query.
            space: "RAS", "LPS" (as ITK, DICOM and 3D Slicer's files), or "voxel", the index in the image as given; of
                `points` in the query and of the answers in the key.
            cycle: match each answer back.
            min_score: least score that is accepted, at most 1.
            max_cycle_mm: largest cycle error that is accepted; matches back too.

        Raises:
            ValueError: points outside of the query image, with their rows, an unknown space, or a `min_score` over 1.
        """
        check_filters(min_score, max_cycle_mm)
        first, second = self.embedding(query), self.embedding(key)
        given = _points(points, len(first.size))
        known = to_ras(given, space, first.source_affine)
        outside = ~first.contains(known)
        if outside.any():
            rows = outside.nonzero().flatten().tolist()
            low, high = (_shown(end[None]) for end in first.extent(space))
            raise ValueError(
                f"points outside of {image_name(query, 'their image')}, rows {rows}: {_shown(given[rows])}; "
                f"in {space} it lies between {low} and {high}: are the points in this space, x, y, z in this order?"
            )
        found, score = self.search(first, second, known)
        accepted = first.in_body(known) & second.in_body(found)
        error = None
        if cycle or max_cycle_mm is not None:
            back, _score = self.search(second, first, found)
            error = (back - known).square().sum(1).sqrt()
            accepted &= error <= (float("inf") if max_cycle_mm is None else max_cycle_mm)
        if min_score is not None:
            accepted &= score >= min_score
        return PointMatches(from_ras(found, space, second.source_affine), score, error, accepted)

    def similarity_map(self, query: Any, key: Any, points: Any, space: str = "RAS") -> MetaTensor:
        """How similar every voxel of the key is to each point: (P, *size) on the grid of :meth:`prepare`.

        Args:
            query: see :meth:`match`.
            key: see :meth:`match`.
            points: see :meth:`match`.
            space: see :meth:`match`.
        """
        first, second = self.embedding(query), self.embedding(key)
        known = to_ras(_points(points, len(first.size)), space, first.source_affine)
        covered = second.padded_size or second.size
        sim = similarity_map(first.maps, second.maps, first.cells(known), covered).cpu()
        for axis, length in enumerate(second.size, start=1):
            sim = sim.narrow(axis, 0, length)
        return MetaTensor(sim.clone(), affine=second.affine)

    def embedding(self, image: Any) -> ImageEmbedding:
        """The embedding itself, or that of an image."""
        return image if isinstance(image, ImageEmbedding) else self.embed(image)

    def search(self, first: ImageEmbedding, second: ImageEmbedding, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points of one embedded image found in another, without any filter.

        Args:
            first: image in which the points are known.
            second: image to search.
            points: (P, n), RAS mm.

        Returns:
            where they are found, (P, n) float64 in RAS mm, and the similarities (P,).
        """
        cells, score = match_points(
            first.maps,
            second.maps,
            first.cells(points),
            key_mask=second.key_mask(),
            chunk_size=self.chunk_size,
            key_norms=second.norms,
        )
        return second.world(cells), score.cpu()

    def _prepare(self, image: Any) -> tuple[MetaTensor, MetaTensor]:
        """The image as it was given and the network's input."""
        source = load_image(image, self.spatial_dims)
        prepared = self.transform(source)
        if not isinstance(prepared, MetaTensor):
            raise ValueError("the transform must give an image (C, *size) with its affine, as MONAI's array transforms")
        if not prepared.isfinite().all():
            raise ValueError(
                f"{image_name(image)} holds NaN or infinite values: repair it, they would spoil all matches"
            )
        return source, prepared

    def _embed(self, voxels: Tensor, affine: Tensor, name: str) -> ImageEmbedding:
        image = voxels.to(self.device)
        try:
            if self._halo is None and self.slab_size is not None and image.ndim == 4:  # once: it takes some passes
                self._halo = slab_halo(self.network, image, total_stride(self.network, image))
            maps, padded = network_maps(self.network, image, self.slab_size, self._halo)
        except RuntimeError as error:
            if "channels" not in str(error):
                raise
            raise ValueError(f"{name} has {len(voxels)} channels, the network takes others: {error}") from error
        body, size = None, tuple(voxels.shape[1:])
        if self.body_threshold is not None:
            from .registration.points import foreground_mask  # registration is built on this file

            mask = torch.zeros(padded, dtype=torch.bool)
            mask[tuple(slice(length) for length in size)] = foreground_mask(voxels[0].cpu(), self.body_threshold)
            axial = int(affine[-2, :-1].abs().argmax())  # the axis that runs along the patient
            body = body_cells(mask, maps[0].shape[1:], axial)
        return ImageEmbedding(maps, affine, size, affine, size, padded, body)


def check_filters(min_score: float | None, max_cycle_mm: float | None) -> None:
    """ValueError where a filter accepts nothing."""
    if min_score is not None and min_score > 1:
        raise ValueError(f"min_score {min_score} accepts nothing: scores are mean cosines, at most 1")
    if max_cycle_mm is not None and max_cycle_mm < 0:
        raise ValueError(f"max_cycle_mm must not be negative, got {max_cycle_mm}")


def _device(device: torch.device | str | None) -> torch.device:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device {chosen} cannot be used: {str(error).splitlines()[0]}") from error


def _points(points: Any, rank: int) -> Tensor:
    values = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
    if values.ndim != 2 or values.shape[1] != rank:
        raise ValueError(f"points must be (P, {rank}), got {tuple(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(
            f"points must be finite, rows {(~values.isfinite().all(1)).nonzero().flatten().tolist()} are not"
        )
    return values


def _shown(points: Tensor) -> str:
    values = points[:3].tolist()
    return ", ".join(f"({', '.join(f'{v:.6g}' for v in row)})" for row in values) + (", .." if len(points) > 3 else "")
