# SPDX-License-Identifier: Apache-2.0
"""What holds for every public loss; a new one adds an entry to CASES and nothing else."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from monai_ssl import losses

from .processes import ProcessPair, half


@dataclass(frozen=True)
class Case:
    """How to build a loss and feed it."""

    args: dict[str, Any]  # constructor arguments, as a JSON file would hold them
    # (number of items, dtype) -> what the network gave, which is differentiated, and the remaining tensors; all with
    # one row per item
    tensors: Callable[[int, torch.dtype], tuple[Tensor, list[Tensor]]]
    # the loss of what the network gave and the remaining tensors
    call: Callable[..., Tensor]
    # keywords that go with a permutation of the items; None: the loss depends on their order
    permuted: Callable[[Tensor], dict[str, Any]] | None = lambda order: {}
    # keywords that make one process with 4 items equal to two processes with 2 each
    joined: dict[str, Any] = field(default_factory=dict)


def voco_tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, num, 2 + 4, 8, generator=generator, dtype=torch.float64).to(dtype)
    label = torch.rand(num, 2, 4, generator=generator) * (torch.rand(num, 2, 4, generator=generator) < 0.5)
    return student, [teacher, label / label.sum(-1, keepdim=True).clamp_min(0.1)]


def voco_case(**args: Any) -> Case:
    return Case(
        args,
        voco_tensors,
        lambda loss, student, teacher, label, **kwargs: loss((student, teacher), label, **kwargs),
        permuted=lambda order: {"partner": torch.argsort(order)[(order + 1) % len(order)]},
        joined={"partner": torch.tensor([1, 0, 3, 2])},
    )


def pair_case(*shape: int, **args: Any) -> Case:
    """Two tensors of the same shape, ``num`` items in front."""

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        first, second = torch.randn(2, num, *shape, generator=generator, dtype=torch.float64).to(dtype)
        return first, [second]

    return Case(args, tensors, lambda loss, first, second: loss(first, second))


def released_cpc_case() -> Case:
    """One negative for each of 4 items' columns, by its number in the batch."""
    case = pair_case(3, 2, 8, mode="bce")

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        prediction, (target,) = case.tensors(num, dtype)
        return prediction, [target, torch.arange(3 * num).roll(4).view(num, 3)]

    def call(loss: nn.Module, x: Tensor, target: Tensor, negatives: Tensor, place: Tensor | None = None) -> Tensor:
        if place is not None:
            negatives = place[negatives // 3] * 3 + negatives % 3
        return loss(x, target, negatives=negatives.reshape(-1, 1))

    return Case(case.args, tensors, call, permuted=lambda order: {"place": torch.argsort(order)})


def multi_task_case() -> Case:
    """The embedding of each item, against another view of it and against numbers."""
    arguments = {
        "losses": {"view": {"_target_": "NTXentLoss"}, "number": {"_target_": "torch.nn.MSELoss"}},
        "weights": {"view": 0.5, "number": 2.0},
    }
    pair = pair_case(8)

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        first, (second,) = pair.tensors(num, dtype)
        return first, [second, torch.arange(8.0 * num).view(num, 8) / (8 * num)]

    def call(loss: nn.Module, first: Tensor, second: Tensor, numbers: Tensor) -> Tensor:
        return loss({"view": first, "number": first}, {"view": second, "number": numbers})

    return Case(arguments, tensors, call)


def local_case() -> Case:
    """Maps of which about half the voxels count, in one row none."""
    pair = pair_case(5, 3, 4)

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        first, (second,) = pair.tensors(num, dtype)
        mask = torch.rand(num, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[1] = False
        return first, [second, mask]

    return Case({}, tensors, lambda loss, first, second, mask: loss(first, second, mask))


def slices_case(*shape: int, **args: Any) -> Case:
    """Embeddings, region vectors or maps of slices: pairs of views, or for "GD" and "LD" all partitions of a volume."""

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        x = torch.randn(num, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        item = torch.arange(num)
        volume, second = item // 2, item % 2
        if args["mode"] in ("GD", "LD"):  # positives are slices of other volumes: on another process
            return x, [item, second, volume, torch.zeros_like(item)]
        return x, [volume, volume % 2, volume, second]

    return Case(args, tensors, lambda loss, x, *ids: loss(x, *ids))


def embedding_case(local: dict[str, Any], coarse: dict[str, Any], masked: bool = False) -> Case:
    """Views of 8 x 12 voxels with maps of 4 x 6 and 2 x 2 cells; the views of the second item do not meet."""
    arguments = {
        "roi_size": [8, 12],
        "local_sampler": {"_target_": "LocalPairSampler", "exclusion_radius": 5.0, "negatives": [100, 100], **local},
        "global_sampler": {"_target_": "GlobalPairSampler", "negatives": [100, 100], **coarse},
    }

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        cells = torch.randn(num, 2, 4 * 6 + 2 * 2, 8, generator=generator, dtype=torch.float64).to(dtype)
        affine = torch.diag(torch.tensor([2.0, 1.5, 1.0], dtype=torch.float64)).repeat(num, 2, 1, 1)
        affine[..., :2, 2] = 6 * torch.rand(num, 2, 2, generator=generator, dtype=torch.float64)
        affine[1, 1, 0, 2] = 300.0
        return cells, [affine, torch.rand(num, 2, 1, 8, 12, generator=generator) + 0.2]

    def call(loss: nn.Module, cells: Tensor, affine: Tensor, valid: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(cells, dim=-1).transpose(0, 1).flatten(0, 1)  # (2 num, cells, 8)
        maps = [x.transpose(1, 2) for x in rows.split([24, 4], 1)]
        target = {"view_affine": affine, "valid": valid.transpose(0, 1).flatten(0, 1)} if masked else affine
        order = torch.Generator().manual_seed(0)  # in which all candidates are taken
        return loss([maps[0].unflatten(2, (4, 6)), maps[1].unflatten(2, (2, 2))], target, generator=order)

    return Case(arguments, tensors, call)


def registration_case(full: bool, **args: Any) -> Case:
    """Velocities in 2D, or in 3D with all that a target can hold."""
    size, other, nodes = ((5, 6, 7), (4, 5, 6), (2, 3, 2)) if full else ((7, 6), (7, 6), (7, 6))

    def tensors(num: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(num, *shape, generator=generator, dtype=torch.float64).to(dtype)
        others = [draw(1, *other), draw(1, *size)]
        if full:
            others += [
                draw(3, *nodes) / 9,
                draw(1, *size) > -1,
                draw(1, *other) > -1,
                draw(4, 2, 3, 3),
                draw(4, 2, 3, 3),
            ]
        return draw(len(size), *size) / 3, others

    def call(loss: nn.Module, velocity: Tensor, *others: Tensor) -> Tensor:
        names = ("moving", "fixed", "initial", "mask", "moving_mask", "moving_map", "fixed_map")
        return loss(velocity, dict(zip(names, others)))

    return Case(args, tensors, call)


CASES: dict[str, list[Case]] = {
    "AnatomicalEmbeddingLoss": [
        embedding_case({}, {}),
        embedding_case({"positives": "interpolated"}, {"num_diverse": 0}, masked=True),
        embedding_case({"exclude": "zero"}, {"exclude": "zero"}, masked=True),
    ],
    "CPCLoss": [
        pair_case(3, 2, 8),
        pair_case(3, 2, 8, mode="paper", temperature=2.0, normalize=False),
        released_cpc_case(),
    ],
    "LocalConsistencyLoss": [pair_case(5, 3, 4), local_case()],
    "MultiTaskLoss": [multi_task_case()],
    "NTXentLoss": [pair_case(8)],
    "NegativeCosineLoss": [pair_case(8), pair_case(5, 3, 4)],
    "PartitionContrastiveLoss": [
        slices_case(8, mode="GR"),
        slices_case(8, mode="GD", temperature=0.5),
        slices_case(8, mode="GD-"),
    ],
    "RegionContrastiveLoss": [
        slices_case(13, 8, mode="LR"),
        slices_case(13, 8, mode="LR", matched_negatives=True),
        slices_case(35, 8, mode="LD", matched_negatives=True),
        slices_case(17, 8, mode="LD", regions="published"),
        slices_case(2, 10, 11, mode="LD", region_size=2),
    ],
    "RegistrationLoss": [
        registration_case(False),
        registration_case(False, similarity="lncc", window=3, num_steps=0),
        registration_case(True, similarity="lncc", window=5, embedding_weight=0.5),
        registration_case(True, smoothness_weight=1.0, embedding_weight=0.5),
    ],
    "VoCoLoss": [voco_case(), voco_case(variant="v1"), voco_case(variant="cvpr"), voco_case(symmetric_reg=True)],
}

CLASSES = {
    n: o for n, o in vars(losses).items() if n in losses.__all__ and inspect.isclass(o) and issubclass(o, nn.Module)
}
EACH = [(name, case) for name in CLASSES for case in CASES.get(name, [])]
each = pytest.mark.parametrize("name, case", EACH, ids=[f"{n}-{i}" for i, (n, _) in enumerate(EACH)])


def build(name: str, case: Case) -> nn.Module:
    """By its short name, from what a JSON file would hold."""
    config = json.loads(json.dumps({"imports": ["$import monai_ssl"], "it": {"_target_": name, **case.args}}))
    return ConfigParser(config).get_parsed_content("it")


def value_and_gradient(
    loss: nn.Module, case: Case, x: Tensor, others: list[Tensor], **kw: Any
) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = case.call(loss, leaf, *others, **kw)
    value.backward()
    return value.detach(), leaf.grad


def test_every_loss_has_a_case() -> None:
    assert set(CLASSES) == set(CASES), "add an entry to CASES"
    assert all("arXiv" in cls.__doc__ for cls in CLASSES.values())


@each
def test_built_by_short_name_from_json(name: str, case: Case) -> None:
    assert type(build(name, case)) is CLASSES[name]


@each
def test_no_weights_and_pickling(name: str, case: Case) -> None:
    loss = build(name, case)
    assert not loss.state_dict()
    x, others = case.tensors(4, torch.float32)
    assert torch.equal(case.call(pickle.loads(pickle.dumps(loss)), x, *others), case.call(loss, x, *others))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_finite_and_differentiable(name: str, case: Case, dtype: torch.dtype, autocast: bool) -> None:
    x, others = case.tensors(4, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        leaf = x.clone().requires_grad_()
        value = case.call(build(name, case), leaf, *others)
    value.backward()
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.any()
    assert leaf.grad.dtype == dtype


@each
def test_float32_is_accurate(name: str, case: Case) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        x, others = case.tensors(4, dtype)
        results.append(value_and_gradient(build(name, case), case, x, others))
    for exact, single in zip(*results):
        torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)


@each
def test_inputs_untouched(name: str, case: Case) -> None:
    x, others = case.tensors(4, torch.float32)
    before = [t.clone() for t in (x, *others)]
    value_and_gradient(build(name, case), case, x, others)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *others)))
    assert not any(t.requires_grad for t in others)


@each
def test_order_of_items(name: str, case: Case) -> None:
    if case.permuted is None:
        pytest.skip("depends on the order")
    loss, order = build(name, case), torch.tensor([2, 0, 3, 1])
    x, others = case.tensors(4, torch.float64)
    value, gradient = value_and_gradient(loss, case, x, others)
    shuffled = value_and_gradient(loss, case, x[order], [t[order] for t in others], **case.permuted(order))
    torch.testing.assert_close(shuffled[0], value, atol=1e-12, rtol=0)
    torch.testing.assert_close(shuffled[1], gradient[order], atol=1e-12, rtol=0)


class NoReads(TorchDispatchMode):
    """Refuses what hands a value to Python, or gives a result whose shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [i for i in args[1] if i is not None] if func is torch.ops.aten.index.Tensor else []
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert all(mask.dtype is not torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


@each
def test_no_value_is_read_back(name: str, case: Case) -> None:
    """It would make the host wait for the device."""
    x, others = case.tensors(4, torch.float32)
    with NoReads():
        value_and_gradient(build(name, case), case, x, others)
        with pytest.raises(AssertionError):
            x[x > 0]


def check_ddp(rank: int) -> None:
    """The gradient of the weights before a loss on two processes is that of the joined batch."""
    for name, case in EACH:
        x, others = case.tensors(4, torch.float64)
        torch.manual_seed(0)
        network = nn.Linear(x.shape[-1], x.shape[-1], dtype=torch.float64)
        loss = build(name, case)
        with mock.patch.object(dist, "is_initialized", return_value=False):  # as one process alone
            case.call(loss, network(x), *others, **case.joined).backward()
        expected = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        replica = DistributedDataParallel(network)
        case.call(loss, replica(half(x, rank)), *(half(t, rank) for t in others)).backward()
        for parameter, gradient in zip(network.parameters(), expected):
            assert gradient.any()
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=0)


def test_two_processes_equal_the_joined_batch(two_processes: ProcessPair) -> None:
    two_processes(check_ddp)
