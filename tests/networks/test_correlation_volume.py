# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl.networks import correlation_volume


def reference(source: Tensor, target: Tensor, radius: int) -> Tensor:
    """One pair of vectors at a time."""
    size = source.shape[2:]
    offsets = list(product(range(-radius, radius + 1), repeat=len(size)))
    volume = torch.zeros(len(source), len(offsets), *size, dtype=source.dtype)
    for b, (k, offset), x in product(range(len(source)), enumerate(offsets), product(*map(range, size))):
        y = tuple(min(max(i + o, 0), n - 1) for i, o, n in zip(x, offset, size))
        s, t = source[(b, slice(None), *y)], target[(b, slice(None), *x)]
        volume[(b, k, *x)] = s @ t / (s.norm().clamp_min(1e-4) * t.norm().clamp_min(1e-4))
    return volume


def test_by_hand() -> None:
    """The source is e1 but for e2 at the centre of 3 x 3, the target e1."""
    target = torch.tensor([1.0, 0]).view(1, 2, 1, 1).repeat(1, 1, 3, 3)
    source = target.clone()
    source[0, :, 1, 1] = torch.tensor([0.0, 1])
    volume = correlation_volume(source, target)
    assert volume.shape == (1, 9, 3, 3)
    assert volume[0, :, 1, 1].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert volume[0, :, 0, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert volume[0, :, 2, 0].tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("size, radius", [((5, 6), 1), ((4, 3), 2), ((3, 4, 5), 1), ((3, 4, 2), 0), ((2, 3, 2), 2)])
@pytest.mark.parametrize("channels", [1, 19])
def test_equals_loops(size: tuple[int, ...], radius: int, channels: int) -> None:
    g = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 2, channels, *size, generator=g, dtype=torch.float64)
    source[0, :, 1, 1] *= 3e-5  # vectors near the floor
    target[1, :, 0, 0] *= 3e-5
    target[1, :, 1, 0] = 0
    before = source.clone(), target.clone()
    volume = correlation_volume(source, target, radius)
    torch.testing.assert_close(volume, reference(source, target, radius), atol=1e-12, rtol=0)
    assert torch.equal(source, before[0])
    assert torch.equal(target, before[1])
    single = correlation_volume(source.float(), target.float(), radius)
    torch.testing.assert_close(single.double(), volume, atol=1e-6, rtol=0)


def test_a_shifted_map_is_found_at_its_offset() -> None:
    """The source is the target one cell further along the second axis: the offset (0, 1, 0) is number 16 of 27."""
    target = torch.randn(1, 8, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    volume = correlation_volume(target.roll(1, 3), target)[..., 1:-1, 1:-1, 1:-1]
    assert (volume.argmax(1) == 16).all()
    torch.testing.assert_close(volume[:, 16], torch.ones_like(volume[:, 16]))


class Largest(TorchDispatchMode):
    """Elements of the largest storage that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_windows_are_not_copied() -> None:
    source, target = torch.randn(2, 1, 64, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        correlation_volume(source, target)
    assert largest.elements == 64 * 8 * 9 * 10  # the padded map


def test_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(correlation_volume, maps)


@pytest.mark.parametrize("shapes", [((1, 2, 5, 6), (1, 2, 5, 7)), ((1, 2, 5, 6), (1, 3, 5, 6)), ((1, 2, 5), (1, 2, 5))])
def test_shapes_are_checked(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="must be equal") as error:
        correlation_volume(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_radius_is_checked() -> None:
    with pytest.raises(ValueError, match="radius must not be negative, got -1"):
        correlation_volume(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), -1)
