# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import SwinUNETR
from torch import nn

from monai_ssl.networks import MomentumTeacher, ProjectionHead


class Student(nn.Module):
    """Parameters in one order, a shared one, and a buffer."""

    def __init__(self, value: float, reverse: bool = False) -> None:
        super().__init__()
        for name in ("b", "a") if reverse else ("a", "b"):
            self.register_parameter(name, nn.Parameter(torch.full((2,), value + (name == "b"))))
        self.same = self.a
        self.register_buffer("count", torch.tensor(int(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a + self.b


def fill(module: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def test_starts_as_a_copy_without_gradient() -> None:
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    student[1].running_mean.fill_(7)
    teacher = MomentumTeacher(student)
    assert list(teacher.state_dict()) == [f"module.{name}" for name in student.state_dict()]
    for name, t in student.state_dict().items():
        own = teacher.module.state_dict()[name]
        assert torch.equal(own, t)
        assert own.data_ptr() != t.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_forward_has_no_gradient_and_moves_nothing() -> None:
    teacher = MomentumTeacher(Student(2.0))
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    x = torch.ones(2, requires_grad=True)
    for mode in (True, False):
        out = teacher.train(mode)(x)
        assert out.tolist() == [5, 5]
        assert not out.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_mode_follows_the_parent() -> None:
    parent = nn.ModuleDict({"teacher": MomentumTeacher(nn.BatchNorm1d(2))})
    assert parent.train()["teacher"].module.training
    assert not parent.eval()["teacher"].module.training


def test_two_updates_towards_zero() -> None:
    teacher = MomentumTeacher(fill(nn.Linear(3, 2), 1.0))
    student = fill(nn.Linear(3, 2), 0.0)
    teacher.update(student, 0.9)
    teacher.update(student, 0.9)
    for p in teacher.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.81))


def test_update_is_by_name() -> None:
    """A student that lists its parameters in another order: a from a, b from b."""
    teacher = MomentumTeacher(Student(0.0))  # a = 0, b = 1
    teacher.update(Student(8.0, reverse=True), 0.75)  # a = 8, b = 9
    assert teacher.module.a.tolist() == [2, 2]
    assert teacher.module.b.tolist() == [3, 3]
    assert teacher.module.same is teacher.module.a
    assert teacher.module.count.item() == 8


def test_momentum_zero_and_one_are_exact() -> None:
    teacher = MomentumTeacher(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    student[1].running_var.fill_(5)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    teacher.update(student, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    teacher.update(student, 0.0)
    for name, t in student.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[name], t)
    student[1].running_var.fill_(6)  # copied, not shared
    assert teacher.module[1].running_var.tolist() == [5, 5]


def test_update_leaves_the_student_and_its_graph_alone() -> None:
    student = Student(4.0)
    teacher = MomentumTeacher(student)
    loss = student(torch.ones(2)).sum()
    teacher.update(student, 0.5)
    loss.backward()
    assert student.a.tolist() == [4, 4]
    assert student.a.grad.tolist() == [1, 1]


@pytest.mark.parametrize("part", [nn.Identity(), nn.BatchNorm1d(2, affine=False)], ids=["empty", "buffers only"])
def test_modules_without_parameters(part: nn.Module) -> None:
    teacher = MomentumTeacher(part)
    teacher.update(part, 0.9)
    assert teacher.module.state_dict().keys() == part.state_dict().keys()


def test_buffers_stay_plain() -> None:
    student = nn.BatchNorm1d(2)
    teacher = MomentumTeacher(student)
    student.running_mean = MetaTensor(torch.ones(2), meta={"filename_or_obj": "PATIENT_0042"})
    teacher.update(student, 0.9)
    assert type(teacher.module.running_mean) is torch.Tensor
    assert teacher.module.running_mean.tolist() == [1, 1]


def test_lacking_names_raise_before_anything_moves() -> None:
    teacher = MomentumTeacher(Student(0.0))
    short = Student(8.0)
    del short.b
    bare = Student(8.0)
    del bare.count
    for student, name in ((short, "b"), (bare, "count"), (nn.ModuleDict({"module": Student(8.0)}), "a")):
        with pytest.raises(KeyError, match=rf"lacks \['{name}'"):
            teacher.update(student, 0.5)
    assert teacher.module.a.tolist() == [0, 0]


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_momentum_outside_the_unit_interval(momentum: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        MomentumTeacher(nn.Linear(1, 1)).update(nn.Linear(1, 1), momentum)


def test_random_start_draws_every_layer() -> None:
    head = ProjectionHead((5, 7, 7, 3), norm="batch")
    for name, p in head.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(p, 3.0)
    teacher = MomentumTeacher(head, init="random")
    for name, p in teacher.module.named_parameters():
        assert not torch.equal(p, head.get_parameter(name)) or p.eq(1).all(), name  # BatchNorm's weight starts at 1
    assert all(torch.all(p == 3) for name, p in head.named_parameters() if name.endswith("bias"))


def test_random_start_refuses_layers_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"'layers1\.0\.blocks\.0\.attn' \(WindowAttention\).*init='copy'"):
        MomentumTeacher(SwinUNETR(1, 2, feature_size=12, spatial_dims=2).swinViT, init="random")


def test_unknown_init() -> None:
    with pytest.raises(ValueError, match="'copy' or 'random', got 'zeros'"):
        MomentumTeacher(nn.Linear(1, 1), init="zeros")
