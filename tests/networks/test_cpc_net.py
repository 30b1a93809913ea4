# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from patch_encoders import Identity, Published, encoder, numbers, small
from torch import Tensor, nn

from monai_ssl.losses import CPCLoss
from monai_ssl.networks import CPCNet, cpc_indices

GRIDS = [(4, 4), (5, 3), (7, 7), (4, 4, 4), (4, 3, 5), (5, 5, 5), (6, 3, 4), (6, 6, 6), (9, 4, 5)]


def reference_indices(grid: tuple[int, ...], skip: int) -> tuple[list[list[int]], list[list[int]]]:
    """The definition of the spec with coordinates written out."""
    number = {place: i for i, place in enumerate(product(*map(range, grid)))}
    e = grid[0] // 2 - 1
    context, target = [], []
    for y in product(*map(range, grid[1:])):
        terms = []
        for r in range(e):
            for shift in product(range(r - e, e - r + 1), repeat=len(y)):
                place = [r]
                for axis, (at, by) in enumerate(zip(y, shift), 1):
                    v = at + by
                    if v < 0:
                        v = -v
                    elif v >= grid[axis]:
                        v = 2 * (grid[axis] - 1) - v
                    place.append(v)
                terms.append(number[tuple(place)])
        context.append([*terms, number[(e, *y)]])
        target.append([number[(r, *y)] for r in range(e + 1 + skip, grid[0])])
    return context, target


# ---- which patches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("skip", [0, 1])
def test_indices_equal_loops(grid: tuple[int, ...], skip: int) -> None:
    context, target = cpc_indices(grid, skip)
    assert context.dtype == target.dtype == torch.int64
    assert (context.tolist(), target.tolist()) == reference_indices(grid, skip)


@pytest.mark.parametrize(
    "grid, q, t, k",
    [
        ((4, 4, 4), 16, 10, 2),
        ((5, 5, 5), 25, 10, 3),
        ((6, 6, 6), 36, 35, 3),
        ((4, 3, 5), 15, 10, 2),
        ((4, 4), 4, 4, 2),
        ((7, 7), 7, 9, 4),
    ],
)
def test_sizes_of_the_tables(grid: tuple[int, ...], q: int, t: int, k: int) -> None:
    context, target = cpc_indices(grid)
    assert (context.shape, target.shape) == ((q, t), (q, k))


def test_columns_by_hand() -> None:
    context, target = cpc_indices(4)  # an int is three axes
    expected = {
        0: ([5, 4, 5, 1, 0, 1, 5, 4, 5, 16], [32, 48]),
        5: ([0, 1, 2, 4, 5, 6, 8, 9, 10, 21], [37, 53]),
        15: ([10, 11, 10, 14, 15, 14, 10, 11, 10, 31], [47, 63]),
    }
    assert {column: (context[column].tolist(), target[column].tolist()) for column in expected} == expected
    context, target = cpc_indices((4, 4))
    assert context.tolist() == [[1, 0, 1, 4], [0, 1, 2, 5], [1, 2, 3, 6], [2, 3, 2, 7]]
    assert target.tolist() == [[8, 12], [9, 13], [10, 14], [11, 15]]


@pytest.mark.parametrize("grid", GRIDS)
def test_no_target_is_in_the_context_of_its_column(grid: tuple[int, ...]) -> None:
    context, target = cpc_indices(grid)
    assert not (context[:, :, None] == target[:, None]).any()
    rows = math.prod(grid[1:])
    assert (context // rows).max() < (target // rows).min()


def shares_voxels(starts: Tensor, size: int, skip: int, grid: tuple[int, ...]) -> bool:
    """Whether a context patch and a target of the same column have a voxel in common."""
    context, target = cpc_indices(grid, skip)
    apart = (starts[context][:, :, None] - starts[target][:, None]).abs() >= size  # (Q, T, K, axes)
    return not apart.any(-1).all()


@pytest.mark.parametrize("length, grid", [(96, (4, 4)), (96, (4, 4, 4)), (128, (5, 5))])
def test_shared_voxels(length: int, grid: tuple[int, ...]) -> None:
    cells = torch.tensor(list(product(*map(range, grid))))
    pitch = length // grid[0]
    free = pitch // 8  # jitter and gap of the default grid
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        jitter = torch.randint(free + 1, cells.shape, generator=generator)
        assert not shares_voxels(cells * pitch + free // 2 + jitter, pitch - 2 * free, 0, grid)
    overlap = length // (grid[0] + 1)
    pitch = (length - overlap) // grid[0]
    assert not shares_voxels(cells * pitch, pitch + overlap, 1, grid)
    assert shares_voxels(cells * pitch, pitch + overlap, 0, grid)  # what the skipped row is for


@pytest.mark.parametrize(
    "grid, skip, message",
    [
        ((3, 3, 3), 0, "at least 4 patches along axis 0"),
        (2, 0, "at least 4 patches along axis 0"),
        ((6, 2), 0, "3 patches on the other axes"),
        ((4, 4, 1), 0, "2 patches on the other axes"),
        ((4, 4), 2, "skip 2 of the 2 rows"),
        ((4, 4), -1, "skip -1"),
        ((4,), 0, "two or three axes"),
        ((), 0, "two or three axes"),
        ((4, 4, 4, 4), 0, "two or three axes"),
    ],
)
def test_refuses_grids(grid: Any, skip: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpc_indices(grid, skip)


# ---- the network ----------------------------------------------------------------------------------------------------


def flat_net(grid: tuple[int, ...] = (4, 4), features: int = 6, **kwargs: Any) -> CPCNet:
    """The voxels of a patch are its features."""
    args = {"code_size": 5, "context_size": 7, "pool": "flatten", "spatial_dims": len(grid)}
    return CPCNet(Identity(), features, grid, **{**args, **kwargs})


def gru(net: CPCNet, terms: list[Tensor]) -> Tensor:
    """The last state of torch's GRU, by its equations."""
    w_i, w_h = net.context.weight_ih_l0.chunk(3), net.context.weight_hh_l0.chunk(3)
    b_i, b_h = net.context.bias_ih_l0.chunk(3), net.context.bias_hh_l0.chunk(3)
    state = torch.zeros(len(w_h[0]), dtype=terms[0].dtype)
    for term in terms:
        of_input = [w @ term + b for w, b in zip(w_i, b_i)]
        of_state = [w @ state + b for w, b in zip(w_h, b_h)]
        reset, update = torch.sigmoid(of_input[0] + of_state[0]), torch.sigmoid(of_input[1] + of_state[1])
        state = (1 - update) * torch.tanh(of_input[2] + reset * of_state[2]) + update * state
    return state


@pytest.mark.parametrize("grid, skip", [((4, 4), 0), ((5, 3), 1), ((4, 2, 3), 0)])
def test_forward_equals_loops(grid: tuple[int, ...], skip: int) -> None:
    torch.manual_seed(0)
    spatial = (2, 3) if len(grid) == 2 else (1, 2, 3)
    net = flat_net(grid, skip=skip).double()
    x = torch.randn(2, math.prod(grid), 1, *spatial, dtype=torch.float64)
    prediction, target = net(x)
    contexts, targets = reference_indices(grid, skip)
    k = len(targets[0])
    assert prediction.shape == target.shape == (2, len(targets), k, 5)
    for b in range(2):
        code = [net.code.weight @ patch.flatten() + net.code.bias for patch in x[b]]
        for q, (context, ahead) in enumerate(zip(contexts, targets)):
            state = gru(net, [code[i] for i in context])
            for step in range(k):
                rows = slice(step * 5, step * 5 + 5)
                expected = net.predictors.weight[rows] @ state + net.predictors.bias[rows]
                torch.testing.assert_close(prediction[b, q, step], expected, atol=1e-12, rtol=0)
                torch.testing.assert_close(target[b, q, step], code[ahead[step]], atol=1e-12, rtol=0)


def test_parts_make_the_whole() -> None:
    net, x = flat_net(), torch.rand(3, 16, 1, 2, 3)
    codes = net.encode(x)
    assert codes.shape == (3, 16, 5)
    terms = codes[:, net.context_index]
    assert terms.shape == (3, 4, 4, 5)
    prediction, target = net(x)
    assert torch.equal(net.predict_from(terms.flatten(0, 1)).unflatten(0, (3, 4)), prediction)
    assert torch.equal(codes[:, net.target_index], target)
    assert net.embed(x[0]).shape == (16, 6)


def test_a_prediction_sees_its_context_only() -> None:
    net = flat_net()
    x = torch.rand(2, 16, 1, 2, 3, requires_grad=True)
    prediction, target = net(x)
    for column in range(4):
        gradient = torch.autograd.grad(prediction[1, column].sum(), x, retain_graph=True)[0].flatten(2).any(-1)
        assert gradient.nonzero().tolist() == [[1, i] for i in sorted(set(net.context_index[column].tolist()))]
        gradient = torch.autograd.grad(target[1, column].sum(), x, retain_graph=True)[0].flatten(2).any(-1)
        assert gradient.nonzero().tolist() == [[1, i] for i in net.target_index[column].tolist()]


def test_one_encoder_call_for_all_patches() -> None:
    net = flat_net((4, 4, 4), 6)
    net(torch.rand(2, 64, 1, 1, 2, 3))
    assert (net.encoder.calls, net.encoder.batch) == (1, 2 * 64)


def test_index_tables_are_no_part_of_the_state() -> None:
    net = flat_net()
    assert {name.split(".")[0] for name in net.state_dict()} == {"code", "context", "predictors"}
    assert {name for name, _ in net.named_buffers()} == {"context_index", "target_index"}
    other = copy.deepcopy(net)
    x = torch.rand(1, 16, 1, 2, 3)
    assert torch.equal(other(x)[0], net(x)[0])
    with torch.device("meta"):
        assert flat_net().to("meta").context_index.device.type == "meta"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grid, size", [((4, 5), (8, 10)), ((4, 2, 3), (8, 9, 10))])
def test_shapes_and_gradients(grid: tuple[int, ...], size: tuple[int, ...], channels: int) -> None:
    dims = len(grid)
    backbone = encoder(dims, init_filters=8, blocks_down=(1, 1), in_channels=channels)
    net = CPCNet(backbone, 16, grid, code_size=12, context_size=10, spatial_dims=dims)
    prediction, target = net(torch.rand(2, math.prod(grid), channels, *size))
    assert prediction.shape == target.shape == (2, math.prod(grid[1:]), 2, 12)
    CPCLoss()(prediction, target).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad.any() for name, p in net.named_parameters() if "encoder" not in name)


def test_both_outputs_carry_gradient() -> None:
    net, x = CPCNet(small(2), 16, spatial_dims=2), torch.rand(1, 16, 1, 8, 8)
    for output in net(x):
        gradient = torch.autograd.grad(output.square().sum(), net.encoder.conv_init.weight, retain_graph=True)[0]
        assert gradient.any()


@pytest.mark.parametrize("mode", ["infonce", "paper"])
def test_constant_volumes_stay_at_chance(mode: str) -> None:
    """Zero padding would tell where a patch was. All patches are equal, so no code tells anything."""
    torch.manual_seed(0)
    net = CPCNet(small(2), 16, spatial_dims=2)
    prediction, target = net(torch.full((3, 16, 1, 8, 10), 0.7))
    num = target[..., 0].numel()
    value = CPCLoss(mode, num_negatives=None if mode == "infonce" else 1)(prediction, target)
    value.backward()
    assert value.item() == pytest.approx(math.log(num if mode == "infonce" else 2), abs=1e-5)
    assert all(p.grad.abs().max() < 1e-5 for p in net.parameters())


def test_no_batch_norm() -> None:
    """It would let the patches of one sample tell each other what they are."""
    net = CPCNet(encoder(), 128)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    net = CPCNet(encoder(), 128)
    assert numbers(net.encoder) == 4_399_344
    assert [numbers(part) for part in (net.code, net.context, net.predictors)] == [16_512, 296_448, 65_792]
    assert numbers(net) - numbers(net.encoder) == 378_752


def test_published_network() -> None:
    with torch.device("meta"):  # shapes only
        net = CPCNet(Published(), 256, code_size=1024, context_size=256, pool="flatten")
        prediction, target = net(torch.empty(2, 64, 1, 32, 32, 32))
    assert numbers(net.encoder) == 3_537_424
    assert numbers(net) == 5_311_504
    assert prediction.shape == target.shape == (2, 16, 2, 1024)


def test_published_network_trains() -> None:
    torch.manual_seed(0)
    net = CPCNet(Published(2), 256, code_size=32, pool="flatten", spatial_dims=2)
    CPCLoss("bce")(*net(torch.rand(2, 16, 1, 32, 35))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{"grid_size": 3}, {"grid_size": (4, 4)}, {"skip": 2}, {"pool": "max"}, {"pool": -1}, {"spatial_dims": 1}],
)
def test_refuses(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CPCNet(Identity(), 6, **kwargs)


def test_refuses_inputs() -> None:
    net = flat_net()
    with pytest.raises(ValueError, match=r"has 15 patches, grid \(4, 4\) has 16"):
        net(torch.zeros(2, 15, 1, 2, 3))
    for shape in ((2, 16, 2, 3), (2, 16, 1, 1, 2, 3), (16,)):
        with pytest.raises(ValueError, match="must be"):
            net(torch.zeros(shape))
    with pytest.raises(TypeError, match="expected a list of maps"):
        CPCNet(nn.Identity(), 6, pool="flatten", spatial_dims=2)(torch.zeros(2, 16, 1, 2, 3))
