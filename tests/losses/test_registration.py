# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_ssl.losses import RegistrationLoss, embedding_loss, local_ncc_loss, ncc_loss, smoothness_loss


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(*shape: int) -> Tensor:
    """About half of the voxels count, in the last item none."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[-1] = False
    return mask


def row(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


# ---- terms ----------------------------------------------------------------------------------------------------------


def test_ncc_by_hand() -> None:
    x = rand(2, 1, 5, 6)
    assert ncc_loss(x, 2 * x + 1).item() == pytest.approx(0, abs=1e-12)
    assert ncc_loss(x, -x).item() == pytest.approx(2, abs=1e-12)
    assert ncc_loss(row(1, 2, 3, 4), row(1, -1, -1, 1)).item() == pytest.approx(1, abs=1e-6)
    mask = torch.tensor([[[True, True, False, True]]])
    # what does not count may be anything; centred, (1, 2, 6) and (2, 1, 3) are (-2, -1, 3) and (0, -1, 1)
    found = ncc_loss(row(1, 2, 99, 6), row(2, 1, -50, 3), mask)
    assert found.item() == pytest.approx(1 - 4 / (14 * 2) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 17), (3, 1, 5, 6), (2, 2, 3, 4, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_ncc_equals_numpy(shape: tuple[int, ...], masked: bool) -> None:
    x, t = rand(*shape) + 3, rand(*shape, seed=1) - 2
    mask = mask_of(shape[0], 1, *shape[2:]) if masked else None
    rows = []
    for i in range(shape[0]):
        counts = slice(None) if mask is None else mask[i].expand(shape[1:]).flatten().numpy()
        a, b = x[i].flatten().numpy()[counts], t[i].flatten().numpy()[counts]
        rows.append(1 - np.corrcoef(a, b)[0, 1] if len(a) else 1.0)
    assert ncc_loss(x, t, mask).item() == pytest.approx(np.mean(rows), abs=1e-12)
    if masked:
        assert ncc_loss(x, t, mask[:, 0]).item() == ncc_loss(x, t, mask).item()


def local_by_hand(x: Tensor, t: Tensor, window: int, mask: Tensor | None, eps: float) -> float:
    """Window by window."""
    rows = []
    for b in range(len(x)):
        found = []
        for c, place in product(range(x.shape[1]), product(*map(range, x.shape[2:]))):
            if mask is None or mask[(b, 0, *place)]:
                part = tuple(slice(max(p - window // 2, 0), p + window // 2 + 1) for p in place)
                a, d = x[(b, c, *part)], t[(b, c, *part)]
                covariance = ((a - a.mean()) * (d - d.mean())).mean()
                found.append(covariance**2 / (a.var(correction=0) * d.var(correction=0) + eps))
        rows.append(1 - sum(found) / max(len(found), 1))
    return float(sum(rows) / len(rows))


@pytest.mark.parametrize(
    "shape, window",
    [((2, 1, 11), 3), ((2, 2, 5, 7), 5), ((2, 1, 4, 5, 3), 3), ((2, 1, 3, 4), 9), ((2, 1, 3, 6, 11), 9)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_local_ncc_equals_loops(shape: tuple[int, ...], window: int, masked: bool, eps: float) -> None:
    x, t = rand(*shape) + 3, rand(*shape, seed=1) - 2
    t = 0.5 * x + t
    mask = mask_of(shape[0], 1, *shape[2:]) if masked else None
    value = local_ncc_loss(x, t, window, mask, eps)
    assert value.item() == pytest.approx(local_by_hand(x, t, window, mask, eps), abs=1e-10)


def test_independent_noise_is_not_alike() -> None:
    """MONAI pads with 0, where the mean of both images ends: the border alone makes them alike."""
    x, t = (5 + rand(1, 1, 24, 24, 24, seed=seed).float() for seed in (0, 1))
    assert local_ncc_loss(x, t).item() == pytest.approx(0.998, abs=1e-3)
    assert LocalNormalizedCrossCorrelationLoss(kernel_size=9)(x, t).item() == pytest.approx(-0.54, abs=0.01)
    assert local_ncc_loss(x, 3 - 2 * x).item() == pytest.approx(0, abs=1e-4)


def test_constant_images_are_finite() -> None:
    for loss in (ncc_loss, local_ncc_loss):
        x = torch.full((2, 1, 5, 6), 7.0, requires_grad=True)
        value = loss(x, rand(2, 1, 5, 6).float())
        value.backward()
        assert value.item() == pytest.approx(1, abs=1e-4)
        assert x.grad.isfinite().all()


def test_smoothness_by_hand() -> None:
    field = torch.zeros(1, 2, 4, 3)
    field[0, 0] = torch.arange(4.0)[:, None] / 10
    assert smoothness_loss(field).item() == pytest.approx(0.005, abs=1e-9)
    assert smoothness_loss(field, weight=1.0).item() == pytest.approx(0.0025, abs=1e-9)
    assert smoothness_loss(field + 5).item() == pytest.approx(0.005, abs=1e-7)


def test_smoothness_equals_loops() -> None:
    field = rand(2, 3, 3, 4, 5)
    total = 0.0
    for axis in range(3):
        squares = []
        for b, c, *place in product(*map(range, field.shape)):
            after = list(place)
            after[axis] += 1
            if after[axis] < field.shape[axis + 2]:
                squares.append((field[(b, c, *after)] - field[(b, c, *place)]) ** 2)
        total += sum(squares) / len(squares)
    assert smoothness_loss(field, 5.0).item() == pytest.approx(float(5 / 3 * total), abs=1e-12)


def test_embedding_loss_by_hand() -> None:
    x = rand(2, 4, 3, 5)
    assert embedding_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-12)
    assert embedding_loss(x, -x).item() == pytest.approx(2, abs=1e-12)
    a = torch.tensor([[1.0, 0, 3], [0, 1, 4]])[None]  # (1, 2, cells)
    b = torch.tensor([[1.0, 1, 4], [0, 0, 3]])[None]
    assert embedding_loss(a, b).item() == pytest.approx((0 + 1 + 0.04) / 3, abs=1e-6)
    mask = torch.tensor([[False, True, True]])
    assert embedding_loss(a, b, mask).item() == pytest.approx(1.04 / 2, abs=1e-6)
    assert embedding_loss(a, b, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


PAIRS = [ncc_loss, local_ncc_loss, embedding_loss]


@pytest.mark.parametrize("loss", PAIRS)
def test_shapes_are_checked(loss: Any) -> None:
    x = torch.zeros(2, 1, 5, 6)
    with pytest.raises(ValueError, match="must be equal"):
        loss(x, x[..., :5])
    for mask in (torch.ones(2, 1, 5, 6), torch.ones(2, 1, 5, 5).bool(), torch.ones(1, 1, 5, 6).bool()):
        with pytest.raises(ValueError, match=r"mask .* must be"):
            loss(x, x, mask=mask)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="window must be odd"):
        local_ncc_loss(torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 5, 6), window=4)
    for shape in ((1, 3, 4, 5), (1, 2, 1, 5)):
        with pytest.raises(ValueError, match="velocity") as error:
            smoothness_loss(torch.zeros(shape))
        assert str(shape) in str(error.value)


# ---- the loss -------------------------------------------------------------------------------------------------------


def coordinates(size: tuple[int, ...]) -> Tensor:
    """(1, n, *size), voxels."""
    return torch.stack(torch.meshgrid(*[torch.arange(s).double() for s in size], indexing="ij"))[None]


def constant(size: tuple[int, ...], *components: float) -> Tensor:
    return torch.tensor(components, dtype=torch.float64).view(1, -1, *[1] * len(size)).expand(1, -1, *size).clone()


def test_terms_are_added_with_their_weights() -> None:
    moving, fixed, velocity = rand(2, 1, 8, 9), rand(2, 1, 8, 9, seed=1), rand(2, 2, 8, 9, seed=2) / 5
    target = {"moving": moving, "fixed": fixed}
    similarity = RegistrationLoss(smoothness_weight=0)(velocity, target)
    both = RegistrationLoss(similarity_weight=3.0, smoothness_weight=7.0)(velocity, target)
    scale = torch.tensor([2 / 7, 2 / 8]).view(2, 1, 1)
    torch.testing.assert_close(both, 3 * similarity + 7 * smoothness_loss(velocity * scale))
    default = RegistrationLoss()(velocity, target)
    torch.testing.assert_close(default, similarity + 100 * smoothness_loss(velocity * scale))


def test_no_motion_compares_the_images() -> None:
    moving, fixed, zero = rand(2, 1, 8, 9), rand(2, 1, 8, 9, seed=1), torch.zeros(2, 2, 8, 9).double()
    mask = mask_of(2, 1, 8, 9)
    target = {"moving": moving, "fixed": fixed}
    for options, expected in [
        ({}, ncc_loss(moving, fixed)),
        ({"similarity": "lncc"}, local_ncc_loss(moving, fixed, 21)),
        ({"similarity": "lncc", "window": 5}, local_ncc_loss(moving, fixed, 5)),
    ]:
        torch.testing.assert_close(RegistrationLoss(**options)(zero, target), expected, atol=1e-12, rtol=0)
    for options, expected in [
        ({}, ncc_loss(moving, fixed, mask)),
        ({"similarity": "lncc", "window": 5}, local_ncc_loss(moving, fixed, 5, mask)),
    ]:
        found = RegistrationLoss(**options)(zero, {**target, "mask": mask})
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def total_by_hand(velocity: Tensor, initial: Tensor | None, num_steps: int) -> Tensor:
    """Scaling and squaring in normalised units, then the pre-alignment at the result; phi (B, n, *size)."""
    size = velocity.shape[2:]
    axes = torch.meshgrid(*[torch.linspace(-1, 1, s).double() for s in size], indexing="ij")
    at = lambda field, places, mode: F.grid_sample(
        field, places.flip(1).movedim(1, -1), padding_mode=mode, align_corners=True
    )
    d = velocity * 2 / (torch.tensor(size).view(-1, *[1] * len(size)) - 1) / 2**num_steps
    for _ in range(num_steps):
        d = d + at(d, torch.stack(axes) + d, "zeros")
    inner = torch.stack(axes) + d
    return inner if initial is None else inner + at(initial, inner, "border")


@pytest.mark.parametrize("size, other, nodes", [((8, 9), (11, 6), (3, 4)), ((5, 6, 7), (6, 4, 9), (2, 3, 2))])
@pytest.mark.parametrize("pre_aligned", [False, True])
def test_the_moving_image_is_sampled_once_at_the_composed_place(
    size: tuple[int, ...], other: tuple[int, ...], nodes: tuple[int, ...], pre_aligned: bool
) -> None:
    """The moving image has a grid of its own; its voxels are noise, so that each place shows."""
    n = len(size)
    moving, fixed, velocity = rand(2, 1, *other), rand(2, 1, *size, seed=1), rand(2, n, *size, seed=2)
    target = {"moving": moving, "fixed": fixed}
    if pre_aligned:
        target["initial"] = 0.3 * rand(2, n, *nodes, seed=3)
    phi = total_by_hand(velocity, target.get("initial"), 7)
    warped = F.grid_sample(moving, phi.flip(1).movedim(1, -1), padding_mode="border", align_corners=True)
    found = RegistrationLoss(smoothness_weight=0)(velocity, target)
    torch.testing.assert_close(found, ncc_loss(warped, fixed), atol=1e-7, rtol=0)


def test_velocity_acts_before_the_pre_alignment() -> None:
    """A step of 3 voxels, then a pre-alignment by which what lies beyond the middle is 2 voxels further."""
    size = (9, 5)
    places = coordinates(size)
    initial = torch.zeros(1, 2, *size).double()
    initial[:, 0, 5:] = 2 * 2 / 8
    moving = places[:, :1] ** 2
    velocity = constant(size, 3, 0)
    loss = RegistrationLoss(smoothness_weight=0, num_steps=0)
    x = places[:, :1]
    expected = (x + 3 + 2.0 * (x + 3 >= 5)).clamp_max(8) ** 2
    assert loss(velocity, {"moving": moving, "fixed": expected, "initial": initial}).item() == pytest.approx(
        0, abs=1e-12
    )


def test_moving_mask() -> None:
    """It moves with the image and counts above 0.8; both masks must hold."""
    size = (9, 6)
    moving, fixed = rand(1, 1, *size), rand(1, 1, *size, seed=1)
    mask = torch.zeros(1, 1, *size).bool()
    mask[:, :, 3:8] = True
    loss = RegistrationLoss(smoothness_weight=0, num_steps=0)
    for shift, first, last in [(2, 1, 6), (0.1, 3, 8), (0.3, 3, 7), (-0.3, 4, 8)]:
        place = (coordinates(size)[:, :1] + shift).clamp(0, 8)
        low = place.floor().long().clamp_max(7)
        share = (place - low).expand(1, 1, *size)
        rows = torch.arange(6).expand(9, 6)
        warped = moving[0, 0][low[0, 0], rows] * (1 - share) + moving[0, 0][low[0, 0] + 1, rows] * share
        counts = torch.zeros_like(mask)
        counts[:, :, first:last] = True
        target = {"moving": moving, "fixed": fixed, "moving_mask": mask}
        found = loss(constant(size, shift, 0), target)
        torch.testing.assert_close(found, ncc_loss(warped, fixed, counts), atol=1e-12, rtol=0)
        target["mask"] = rand(1, 1, *size, seed=4) > 0
        found = loss(constant(size, shift, 0), target)
        torch.testing.assert_close(found, ncc_loss(warped, fixed, counts & target["mask"]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size, stride", [((8, 12), (2, 2)), ((4, 8, 12), (2, 2, 4))])
def test_embedding_term(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Cells are centred in their voxels: a map of their positions moves by the displacement, in voxels."""
    n = len(size)
    cells = tuple(s // t for s, t in zip(size, stride))
    scale = torch.tensor(stride).view(n, *[1] * n)
    centres = coordinates(cells) * scale + (scale - 1) / 2
    shift = torch.arange(1.0, n + 1).double() / 2
    velocity = constant(size, *shift.tolist())
    last = (torch.tensor(cells).view(n, *[1] * n) - 1) * scale + (scale - 1) / 2
    moved = torch.minimum(centres + shift.view(n, *[1] * n), last)  # beyond the outermost centre nothing changes
    image = rand(1, 1, *size)
    target = {"moving": image, "fixed": image, "moving_map": centres, "fixed_map": rand(1, n, *cells, seed=1)}
    without = RegistrationLoss(num_steps=0)(velocity, target)
    found = RegistrationLoss(num_steps=0, embedding_weight=5.0)(velocity, target) - without
    torch.testing.assert_close(found, 5 * embedding_loss(moved, target["fixed_map"]), atol=1e-10, rtol=0)
    still = RegistrationLoss(embedding_weight=1.0, similarity_weight=0)(0 * velocity, target)
    torch.testing.assert_close(still, embedding_loss(centres, target["fixed_map"]), atol=1e-10, rtol=0)


def test_gradient_in_double_precision() -> None:
    x = torch.linspace(0, 1, 6).double()
    moving, fixed = (torch.sin(4 * x[:, None] + 3 * x[:5] + s)[None, None] for s in (0.0, 0.4))
    velocity = (0.3 + 0.1 * rand(1, 2, 6, 5)).requires_grad_()  # away from the kinks of linear interpolation
    loss = RegistrationLoss(similarity="lncc", window=3, num_steps=2)
    assert torch.autograd.gradcheck(lambda v: loss(v, {"moving": moving, "fixed": fixed}), velocity, atol=1e-4)


@pytest.mark.parametrize("similarity", ["ncc", "lncc"])
def test_descent(similarity: str) -> None:
    x, y = coordinates((15, 12))[0].float()
    moving, fixed = (torch.sin((x + s) / 2) * torch.cos(y / 3) for s in (0, 1.5))
    target = {"moving": moving[None, None], "fixed": fixed[None, None]}
    velocity = torch.zeros(1, 2, 15, 12, requires_grad=True)
    loss, optimiser = (
        RegistrationLoss(similarity, smoothness_weight=1.0, window=9),
        torch.optim.Adam([velocity], lr=0.1),
    )
    values = []
    for _ in range(20):
        optimiser.zero_grad()
        value = loss(velocity, target)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    assert velocity[0, 0, 4:-4, 3:-3].mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_switched_off(dtype: torch.dtype) -> None:
    target = {"moving": rand(1, 1, 6, 7).float(), "fixed": rand(1, 1, 6, 7, seed=1).float()}
    velocity, loss = rand(1, 2, 6, 7, seed=2).float(), RegistrationLoss()
    with torch.autocast("cpu", dtype=dtype):
        inside = loss(velocity, target)
        assert loss(velocity.to(dtype), target).dtype == torch.float32
    assert torch.equal(inside, loss(velocity, target))


@pytest.mark.parametrize(
    "arguments, named",
    [({"similarity": "mi"}, "ncc, lncc"), ({"num_steps": -1}, "num_steps"), ({"window": 4}, "window")],
)
def test_arguments_are_checked(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RegistrationLoss(**arguments)


def test_target_is_checked() -> None:
    image, velocity = rand(1, 1, 6, 7), rand(1, 2, 6, 7)
    with pytest.raises(ValueError, match=r"lacks \['fixed'\]"):
        RegistrationLoss()(velocity, {"moving": image})
    with pytest.raises(ValueError, match=r"lacks \['moving_map', 'fixed_map'\], needed with embedding_weight=0.5"):
        RegistrationLoss(embedding_weight=0.5)(velocity, {"moving": image, "fixed": image})
    for v, moving in ((velocity[..., :6], image), (velocity[:, :1], image), (velocity, image.repeat(2, 1, 1, 1))):
        with pytest.raises(ValueError, match="velocity") as error:
            RegistrationLoss()(v, {"moving": moving, "fixed": image})
        assert str(tuple(v.shape)) in str(error.value)
        assert str(tuple(moving.shape)) in str(error.value)
