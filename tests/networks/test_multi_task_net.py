# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from monai.networks.nets import FullyConnectedNet
from patch_encoders import small
from torch import Tensor, nn

from monai_ssl.networks import EncoderFeatures, MomentumTeacher, MultiTaskNet, PatchClassifier, VoCoNet


class Scale(nn.Module):
    """An encoder of one weight: the coarsest map is the input times it. Counts its calls."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return [self.factor * x]


class Difference(nn.Module):
    """A task of two images: what the encoder makes of the first, less what it makes of the second times ten."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.momentum: list[float] = []

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = self.encoder(torch.stack([first, second]))[-1]
        return both[0] - 10 * both[1]

    def update_teacher(self, momentum: float) -> None:
        self.momentum.append(momentum)


def toy(encoder: nn.Module) -> MultiTaskNet:
    single = PatchClassifier(encoder, nn.Identity(), "concat", spatial_dims=2)
    return MultiTaskNet(encoder, {"one": single, "two": Difference(encoder)}, {"one": ["a"], "two": ["b", "a"]})


def real() -> MultiTaskNet:
    """A classifier, and a task that copies the encoder for a teacher."""
    encoder = small()
    head = FullyConnectedNet(16, 4, [8], act="relu", adn_ordering="A")
    tasks = {
        "rotation": PatchClassifier(encoder, head),
        "voco": VoCoNet(encoder, 16, 8, 8, teacher="full", stages=[-1]),
    }
    return MultiTaskNet(encoder, tasks, {"rotation": ["image"], "voco": ["crops", "crops_base"]})


def batch(generator: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(generator)
    sizes = {"image": (2, 1, 4, 6, 8), "crops": (2, 2, 1, 4, 6, 8), "crops_base": (2, 3, 1, 4, 6, 8)}
    return {key: torch.rand(size, generator=g) for key, size in sizes.items()}


def test_each_task_gets_its_own_images() -> None:
    """By hand, with images of one value: in the order of `inputs`, through one call of the encoder per task."""
    encoder = Scale()
    images = {"a": torch.full((1, 1, 2, 3), 3.0), "b": torch.full((1, 1, 2, 3), 5.0), "other": torch.zeros(1)}
    output = toy(encoder)(images)
    assert list(output) == ["one", "two"]
    assert output["one"].tolist() == [[6.0]]
    assert output["two"].unique().tolist() == [2 * (5 - 10 * 3)]
    assert encoder.calls == 2


def test_gradients_of_all_tasks_meet_in_the_encoder() -> None:
    """d one / d factor = 3, d two / d factor = 5 - 30 for each of 6 voxels."""
    encoder = Scale()
    output = toy(encoder)({"a": torch.full((1, 1, 2, 3), 3.0), "b": torch.full((1, 1, 2, 3), 5.0)})
    (output["one"].sum() + output["two"].sum()).backward()
    assert encoder.factor.grad.item() == 3 + 6 * (5 - 30)


def test_teachers_are_moved_where_there_are_some() -> None:
    net = toy(Scale())
    net.update_teacher(0.25)
    assert net.tasks["two"].momentum == [0.25]
    net = real()
    teacher = net.tasks["voco"].teacher_encoder
    assert isinstance(teacher, MomentumTeacher)
    with torch.no_grad():
        for parameter in net.encoder.parameters():
            parameter.add_(1.0)
    net.update_teacher(0.75)
    for old, new in zip(teacher.module.parameters(), net.encoder.parameters()):
        torch.testing.assert_close(old, new - 0.75)


def test_the_encoder_is_one_in_parameters_and_state() -> None:
    """And what `network_def` saves is a part of the state, as federated learning needs it."""
    net = real()
    names = [name for name, _ in net.named_parameters()]
    assert len([name for name in names if "conv_init" in name and "teacher" not in name]) == 1
    state = net.state_dict()
    assert not [key for key in state if key.startswith(("tasks.rotation.encoder.", "tasks.voco.encoder."))]
    assert EncoderFeatures(net.encoder).state_dict().keys() < state.keys()
    assert {name for name, _ in net.named_parameters()} <= set(state)
    assert [key for key in state if key.startswith("tasks.voco.teacher_encoder.")]


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.ModuleDict({"module": net})], ids=["bare", "wrapped"])
def test_state_round_trip_is_strict(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    first, second = real().eval(), real().eval()
    state = wrap(first).state_dict()
    assert not [key for key in state if "tasks.voco.encoder." in key]
    before = {key: value.clone() for key, value in state.items()}
    wrap(second).load_state_dict(state, strict=True)
    assert state.keys() == before.keys(), "the caller's dictionary has changed"
    expected, found = first(batch()), second(batch())
    assert torch.equal(found["rotation"], expected["rotation"])
    assert all(map(torch.equal, found["voco"], expected["voco"]))
    key = next(key for key in state if "encoder." in key and "teacher" not in key)
    with pytest.raises(RuntimeError, match="Missing key"):
        wrap(second).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        wrap(second).load_state_dict({**state, "nosuch": torch.zeros(1)})


@pytest.mark.parametrize("copy", [deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_share_their_own_encoder(copy: Callable[[Any], Any]) -> None:
    net = real()
    other = copy(net)
    assert other.encoder is not net.encoder
    assert all(task.encoder is other.encoder for task in other.tasks.values())
    assert other.state_dict().keys() == net.state_dict().keys()


def test_another_encoder_is_refused() -> None:
    encoder, other = Scale(), Scale()
    with pytest.raises(ValueError, match=r"'two' \(Difference\) does not hold the shared encoder"):
        MultiTaskNet(
            encoder, {"one": Difference(encoder), "two": Difference(other)}, {"one": ["a", "b"], "two": ["a", "b"]}
        )
    with pytest.raises(ValueError, match="does not hold"):
        MultiTaskNet(encoder, {"one": nn.Identity()}, {"one": ["a"]})


def test_names_and_keys() -> None:
    encoder = Scale()
    with pytest.raises(ValueError, match=r"\['one'\] and inputs \['two'\] must have the same names"):
        MultiTaskNet(encoder, {"one": Difference(encoder)}, {"two": ["a"]})
    with pytest.raises(ValueError, match="at least one"):
        MultiTaskNet(encoder, {}, {})
    with pytest.raises(ValueError, match="list of keys"):
        MultiTaskNet(encoder, {"one": Difference(encoder)}, {"one": "ab"})
    with pytest.raises(KeyError, match=r"\['b'\] are not among \['a'\]"):
        toy(encoder)({"a": torch.zeros(1, 1, 2, 3)})
