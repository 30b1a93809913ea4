# SPDX-License-Identifier: Apache-2.0
"""Slices and their partitions, the pairs that are contrasted, and what regions are alike (arXiv 2006.10511)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_ssl.data.prepare_batch import PrepareSliceBatch
from monai_ssl.losses.region_places import region_places
from monai_ssl.losses.slice_pairs import slice_pairs
from monai_ssl.networks.nets.contrastive_unet import ContrastiveUNet
from monai_ssl.networks.unet_stages import unet_features

from .panels import COLOURS, Box, Panel
from .patches import _limits

__all__ = ["partition_panels", "region_panels"]

POSITIVE, NEGATIVE, ANCHOR = COLOURS[3], COLOURS[2], COLOURS[6]  # green, pink, yellow
ANCHOR_REGION = 4  # the middle of the lattice


def partition_panels(
    batch: Mapping[str, Any],
    modes: Sequence[str] = ("GR", "GD-", "GD"),
    image_key: str = "image",
    max_volumes: int = 3,
) -> list[Panel]:
    """The slices of a few volumes, framed in the colour of their partition, then the pairs of each mode.

    A column is a partition, the views of a slice lie below each other. For each mode one array shows the pairs of the
    first item: positives in solid frames, negatives dashed, what is neither without a frame. The matrix below it shows
    those of all items, one row per anchor from the top: positives light, negatives dark.

    Args:
        batch: as collated after ``RandPartitionSlicesd``, ``SplitDimd`` and ``RandViewsd``: slices (N, V, C, X, Y),
            ``partition``, ``slice_index`` and ``volume`` (N,); ``name`` if there are names.
        modes: see ``slice_pairs``.
        image_key: key of the slices.
        max_volumes: number of volumes.

    Raises:
        KeyError: a key is absent.
        ValueError: when the batch does not have these shapes.
    """
    array = _Array.of(batch, image_key, max_volumes)
    slices = [number for number in range(len(array.views)) if array.ids["view"][number] == 0]
    frames = []
    for number in slices:
        partition = int(array.ids["partition"][number])
        box = array.box(number, COLOURS[partition % len(COLOURS)], str(int(array.index[number])))
        below = (array.num_views - 1) * box.size[1]
        whole = box._replace(start=(box.start[0], box.start[1] - below), size=(box.size[0], box.size[1] + below))
        frames.append(_inside(whole))
    views = f"{array.num_views} views below each other" if array.num_views > 1 else "1 view"
    caption = f"{', '.join(array.names)}: a slice (its number) of each of {array.num_partitions} partitions, {views}"
    pairs = {mode: slice_pairs(mode, **array.ids) for mode in modes}
    return [
        Panel(array.image, caption, frames, limits=array.limits, lead=True),
        *(array.pairs(mode, positives[0], negatives[0]) for mode, (positives, negatives) in pairs.items()),
        *(_matrix(mode, positives, negatives) for mode, (positives, negatives) in pairs.items()),
    ]


def region_panels(
    batch: Mapping[str, Any], network: ContrastiveUNet, image_key: str = "image", max_slices: int = 3
) -> list[Panel]:
    """For a few slices: the regions of one view, and how alike the middle one is to each place of other images.

    The other images are the second view of the slice, and the slice of the same partition of another volume. Colours go
    from dark, a cosine of 0 or less, to light, 1, at the centre of each possible place.

    Args:
        batch: see :func:`partition_panels`.
        network: ``ContrastiveUNet`` of stage 2; runs on its device in evaluation mode, and its modes stay as they were.
        image_key: key of the slices.
        max_slices: number of slices.

    Raises:
        KeyError: a key is absent.
        ValueError: a network of stage 1 or with three axes, or a batch of other shapes.
    """
    if not network.num_decoder_blocks:
        raise ValueError("region_panels needs a network with decoder blocks: stage 1 has no regions")
    if len(network.plane_size) != 2:
        raise ValueError(
            f"region_panels draws slices, the network takes {network.plane_size}: 3D crops are for stage 1"
        )
    array = _Array.of(batch, image_key, len(batch[image_key]))
    maps, stride = _dense_vectors(network, array.views)
    size = tuple(length + network.region_size - 1 for length in maps.shape[2:])
    starts, _ = region_places(network.regions, size, network.region_size)
    places = [
        Box([a * s for a, s in zip(start, stride)], [network.region_size * s for s in stride])
        for start in starts.tolist()
    ]
    anchor = places[ANCHOR_REGION]._replace(colour=ANCHOR)
    others = [box for number, box in enumerate(places) if number != ANCHOR_REGION]
    place = starts[ANCHOR_REGION].tolist()
    panels: list[Panel] = []
    legend = "; beside: cosine of each place with the anchor, 0 or less dark, 1 light"
    for number in [n for n in range(len(array.views)) if array.ids["view"][n] == 0][:max_slices]:
        title = f"{array.title(number)}, slice {int(array.index[number])}"
        boxes = [*others, anchor._replace(label="anchor")]
        panels.append(
            Panel(array.views[number], f"{title}: {len(places)} regions{legend}", boxes, limits=array.limits, lead=True)
        )
        vector = maps[number][:, place[0], place[1]]
        for text, other in array.relatives(number):
            cosine = (maps[other] * vector[:, None, None]).sum(0)
            elsewhere = max(float(cosine[tuple(start)]) for start in starts.tolist() if start != place)
            heat = _over_pixels(cosine, stride, network.region_size, array.views.shape[2:])
            caption = f"{text}: cosine {float(cosine[tuple(place)]):.2f} here, at most {elsewhere:.2f} in other regions"
            panels.append(Panel(array.views[other], caption, [anchor], limits=array.limits, heat=heat))
    return panels


class _Array(NamedTuple):
    """The views of a batch, and where each lies in one image of them all."""

    views: Tensor  # (M, C, X, Y)
    ids: dict[str, Tensor]
    index: Tensor  # (M,), number of the slice
    places: list[tuple[int, int]]  # row and column
    names: list[str]  # of the rows
    num_partitions: int
    num_views: int
    limits: tuple[float, float]

    @classmethod
    def of(cls, batch: Mapping[str, Any], image_key: str, max_volumes: int) -> _Array:
        images, ids = PrepareSliceBatch(image_key)(batch, "cpu")
        images, num_views = images.detach(), int(ids["view"].max()) + 1
        index = torch.as_tensor(batch["slice_index"]).cpu().flatten().repeat_interleave(num_views)
        rows, row = [], -1
        partition = ids["partition"].tolist()
        for number in range(0, len(images), num_views):
            # volume-major: where the partitions begin anew, so does a volume
            row += not number or partition[number] <= partition[number - num_views]
            rows += [row] * num_views
        kept = sum(row < max_volumes for row in rows)
        given = batch.get("name")
        firsts = [rows.index(row) // num_views for row in range(rows[kept - 1] + 1)]
        names = [f"volume {int(ids['volume'][f * num_views])}" for f in firsts]
        names = names if given is None else [PurePath(str(given[f])).name for f in firsts]
        ids = {name: x[:kept] for name, x in ids.items()}
        places = [(row * num_views + int(v), p) for row, p, v in zip(rows, partition, ids["view"])]
        views = images[:kept]
        return cls(views, ids, index[:kept], places, names, max(partition) + 1, num_views, _limits(views))

    @property
    def image(self) -> Tensor:
        """All views, a pixel between them, the first row at the top: (1, X, Y)."""
        width, height = (n + 1 for n in self.views.shape[2:])
        rows = len(self.names) * self.num_views
        image = torch.full((self.num_partitions * width, rows * height), float(self.views.min()))
        for number, view in enumerate(self.views):
            left, bottom = self.box(number, "").start
            image[int(left) : int(left) + width - 1, int(bottom) : int(bottom) + height - 1] = view[0]
        return image[None]

    def box(self, number: int, colour: str, label: str = "", dashed: bool = False) -> Box:
        """The frame of one view in `image`."""
        row, column = self.places[number]
        width, height = (n + 1 for n in self.views.shape[2:])
        bottom = (len(self.names) * self.num_views - 1 - row) * height
        return Box((column * width, bottom), (width, height), colour, label, dashed)

    def pairs(self, mode: str, positives: Tensor, negatives: Tensor) -> Panel:
        """The pairs of the first view."""
        inset = [
            self.box(n, POSITIVE if positives[n] else NEGATIVE, dashed=not bool(positives[n]))
            for n in range(1, len(self.views))
            if positives[n] or negatives[n]
        ]
        number = f"positives {int(positives.sum())} (solid), negatives {int(negatives.sum())} (dashed)"
        caption = f"{mode}: {number}, no frame: neither"
        frames = [*inset, self.box(0, ANCHOR, "anchor")]
        return Panel(self.image, caption, [_inside(box) for box in frames], limits=self.limits)

    def title(self, number: int) -> str:
        """Name of the volume of a view."""
        return self.names[self.places[number][0] // self.num_views]

    def relatives(self, number: int) -> list[tuple[str, int]]:
        """The second view of the same slice, and the same view of the partition in another volume, if there are."""
        same = {name: x == x[number] for name, x in self.ids.items()}
        found = []
        for text, wanted in (
            ("view 2", same["source"] & (self.ids["view"] == 1)),
            ("same partition", same["partition"] & same["view"] & ~same["volume"]),
        ):
            if bool(wanted.any()):
                other = int(wanted.int().argmax())
                found.append((text if text == "view 2" else f"{self.title(other)}, {text}", other))
        return found


def _inside(box: Box) -> Box:
    """A little smaller, so that neighbouring frames do not hide each other."""
    margin = 0.04 * min(box.size)
    return box._replace(start=[a + margin for a in box.start], size=[n - 2 * margin for n in box.size])


def _matrix(mode: str, positives: Tensor, negatives: Tensor) -> Panel:
    heat = torch.full(positives.shape, torch.nan)
    heat[negatives], heat[positives] = 0.0, 1.0
    heat = heat.flip(0).T  # anchors from top to bottom
    each = sorted(set(negatives.sum(1).tolist()))
    number = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
    caption = (
        f"{mode}, a row per anchor: {int(positives.sum())} positive pairs of {len(positives)} items (light), {number} "
        "negatives each (dark), grey: neither"
    )
    return Panel(torch.zeros(1, *heat.shape), caption, limits=(-1.0, 1.0), heat=heat)


def _dense_vectors(network: ContrastiveUNet, images: Tensor) -> tuple[Tensor, list[float]]:
    """Unit vectors of the regions that begin at each cell (M, D, *starts), and pixels per cell of the map."""
    like, modes = next(network.parameters()), [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            features = unet_features(network.network, images.to(like), network.num_decoder_blocks)
            features = network.g2(features)
            weight = network.dense.weight.unflatten(1, (features.shape[1], *[network.region_size] * 2))
            vectors = F.normalize(F.conv2d(features, weight), dim=1).float().cpu()
    finally:
        for layer, training in modes:
            layer.training = training
    return vectors, [pixels / cells for pixels, cells in zip(images.shape[2:], features.shape[2:])]


def _over_pixels(values: Tensor, stride: Sequence[float], region_size: int, plane: Sequence[int]) -> Tensor:
    """Values of regions (X', Y') at the pixels of their middle cells, NaN where no region has its middle."""
    heat = torch.full(tuple(plane), torch.nan)
    cells = [
        ((torch.arange(n) + 0.5) / s - (region_size - 1) / 2).floor().long() for n, s in zip(plane, stride)
    ]  # start of the region around each pixel
    inside = [(c >= 0) & (c < n) for c, n in zip(cells, values.shape)]
    part = values[cells[0][inside[0]]][:, cells[1][inside[1]]]
    heat[torch.meshgrid(inside[0].nonzero().flatten(), inside[1].nonzero().flatten(), indexing="ij")] = part
    return heat
