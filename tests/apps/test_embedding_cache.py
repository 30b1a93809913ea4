# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch
from embedding_fields import AFFINE, GEOMETRY, PERMUTED, StridedNet, coordinate_image, inside
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Orientation, Spacing

from monai_ssl.apps import PointMatcher


def test_an_image_is_embedded_once(tmp_path: Path) -> None:
    image, other = (coordinate_image(PERMUTED, (24, 16, 40), shift) for shift in (None, AFFINE))
    network = StridedNet()
    matcher = PointMatcher(network, GEOMETRY, cache_dir=tmp_path / "cache")
    points = inside(PERMUTED, (24, 16, 40), 3)
    first = matcher.match(image, other, points, cycle=True)
    assert network.calls == 2
    again = matcher.match(image, other, points, cycle=True)
    assert network.calls == 2
    assert torch.equal(first.points, again.points)
    files = sorted((tmp_path / "cache").iterdir())
    assert [len(file.name) for file in files] == [64 + 3] * 2
    fresh = PointMatcher(StridedNet(), GEOMETRY, cache_dir=tmp_path / "cache")
    assert torch.equal(fresh.match(image, other, points).points, first.points)
    assert fresh.network.calls == 0
    content = torch.load(files[0], weights_only=True)
    assert all(type(m) is torch.Tensor for m in content["maps"])


def test_the_cache_knows_what_it_holds(tmp_path: Path) -> None:
    image = coordinate_image(PERMUTED, (24, 16, 40))
    network = StridedNet()

    def calls(image: MetaTensor, transform: object = GEOMETRY) -> int:
        before = network.calls
        PointMatcher(network, transform, cache_dir=tmp_path).embed(image)  # type: ignore[arg-type]
        return network.calls - before

    assert [calls(image), calls(image)] == [1, 0]
    moved = MetaTensor(image.as_tensor(), affine=PERMUTED.clone())
    moved.affine[0, 3] += 10
    assert calls(moved) == 1
    changed = image.clone()
    changed[0, 5:8, 5:8, 5:8] += 1
    assert calls(changed) == 1
    assert calls(image, Compose([Orientation(axcodes="SPL", labels=None), Spacing(pixdim=(2, 2, 4))])) == 1
    with torch.no_grad():
        network.weight += 0.001
    assert [calls(image), calls(image)] == [1, 0]
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert [calls(image), calls(image)] == [1, 0]  # damaged files are written anew


def test_voxel_space_is_that_of_the_image_at_hand(tmp_path: Path) -> None:
    """Two files with the same voxels in the world, one stored back to front: one embedding, two kinds of index."""
    image = coordinate_image(PERMUTED, (24, 16, 40))
    other = Flip(0)(image)
    matcher = PointMatcher(StridedNet(), GEOMETRY, cache_dir=tmp_path)
    index = torch.tensor([[10.0, 8.0, 20.0]])
    found = matcher.match(image, image, index, "voxel").points
    flipped = matcher.match(image, other, index, "voxel").points
    torch.testing.assert_close(flipped, found * torch.tensor([-1, 1, 1]) + torch.tensor([23, 0, 0]), atol=1e-4, rtol=0)
