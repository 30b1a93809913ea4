# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from monai_ssl.handlers import MomentumUpdateHandler
from monai_ssl.losses import VoCoLoss
from monai_ssl.networks import BasicUNetEncoder, SegResNetEncoder, SwinUNETREncoder, UNetEncoder, VoCoNet


class OneVoxel(nn.Module):
    """Identity: crops ``(N, F, 1, 1)`` are their own, only map."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


class Maps(nn.Module):
    """Three maps of 2, 3 and 4 channels, filled with 10 times the mean of the crop plus the level."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        mean = x.flatten(1).mean(1)[:, None, None, None] * self.scale
        return [(mean + i).expand(-1, 2 + i, 6 - i, 5) for i in range(3)]


def unet_net(spatial_dims: int = 3, channels: int = 1, **kwargs) -> VoCoNet:
    unet = UNet(spatial_dims, channels, 2, (4, 6, 8), (2, 2), num_res_units=1, norm="instance")
    return VoCoNet(UNetEncoder(unet), 18, 12, 10, **kwargs)


def crops(
    b: int = 2, r: int = 3, k: int = 4, c: int = 1, roi: tuple[int, ...] = (8, 10, 12)
) -> tuple[torch.Tensor, ...]:
    return torch.rand(b, r, c, *roi), torch.rand(b, k, c, *roi)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- what goes in and comes out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["projector", "full", "none"])
@pytest.mark.parametrize(
    "grid, roi, channels", [((2, 3, 2), (8, 10, 12), 1), ((3, 3), (12, 8), 3), ((2, 2, 2), (10, 8, 8), 3)]
)
def test_any_grid_roi_and_channels(teacher: str, grid: tuple, roi: tuple, channels: int) -> None:
    net = unet_net(len(grid), channels, teacher=teacher)
    k = int(torch.tensor(grid).prod())
    student, target = net(*crops(2, 3, k, channels, roi))
    assert student.shape == target.shape == (2, 3 + k, 10)
    assert student.requires_grad
    assert not target.requires_grad


def test_random_crops_come_first() -> None:
    """The projector is made the identity: row r of volume b must hold the value of that crop."""
    net = VoCoNet(Maps(), 9, 9, 9, teacher="none")
    net.projector = nn.Identity()
    values = torch.arange(2 * 5.0).view(2, 5, 1, 1, 1)  # volume, crop
    student, _ = net(values[:, :3].expand(-1, -1, 1, 4, 6), values[:, 3:].expand(-1, -1, 1, 4, 6))
    assert student[..., 0].tolist() == [[0, 10, 20, 30, 40], [50, 60, 70, 80, 90]]
    assert student[1, 4].tolist() == [90, 90, 91, 91, 91, 92, 92, 92, 92]


@pytest.mark.parametrize(
    "stages, expected", [(None, [0, 0, 1, 1, 1, 2, 2, 2, 2]), ([-1], [2] * 4), ((1, 0), [1, 1, 1, 0, 0])]
)
def test_embed_pools_the_stages_in_order(stages: list[int] | None, expected: list[int]) -> None:
    net = VoCoNet(Maps(), len(expected), 4, 4, stages=stages)
    assert net.embed(torch.zeros(3, 1, 5, 6)).tolist() == [expected] * 3


def test_embed_is_the_mean_over_space() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert VoCoNet(OneVoxel(), 3, 4, 4).embed(x).tolist() == [[9.5, 29.5, 49.5], [69.5, 89.5, 109.5]]


def test_one_encoder_pass() -> None:
    for teacher in ("projector", "none", "full"):
        net = VoCoNet(Maps(), 9, 4, 4, teacher=teacher)
        net(*crops(roi=(4, 6)))
        assert net.encoder.calls == 1
        if teacher == "full":
            assert net.teacher_encoder.module.calls == 1


@pytest.mark.parametrize(
    "image, base",
    [
        ((2, 3, 1, 8, 8), (3, 4, 1, 8, 8)),
        ((2, 3, 1, 8, 8), (2, 4, 2, 8, 8)),
        ((2, 3, 1, 8, 8), (2, 4, 1, 8, 9)),
        ((2, 3, 1, 8, 8), (2, 4, 1, 8)),
        ((2, 3, 8), (2, 4, 8)),
    ],
)
def test_unequal_inputs(image: tuple, base: tuple) -> None:
    with pytest.raises(ValueError, match="differ in B, C or roi") as error:
        VoCoNet(Maps(), 9, 4, 4)(torch.zeros(image), torch.zeros(base))
    assert str(image) in str(error.value)
    assert str(base) in str(error.value)


def test_wrong_embed_dim_lists_the_channels() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] channels, 9 together, embed_dim=8"):
        VoCoNet(Maps(), 8, 4, 4).embed(torch.zeros(3, 1, 5, 6))
    with pytest.raises(ValueError, match=r"\[4\] channels, 4 together, embed_dim=9"):
        VoCoNet(Maps(), 9, 4, 4, stages=[-1]).embed(torch.zeros(3, 1, 5, 6))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"teacher": "ema"}, "'projector', 'full' or 'none', got 'ema'"),
        ({"teacher_init": "zeros"}, "'copy' or 'random'"),
        ({"feature_dropout": 1.0}, r"\[0, 1\)"),
        ({"feature_dropout": -0.1}, r"\[0, 1\)"),
        ({"stages": []}, "stages is empty"),
    ],
)
def test_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VoCoNet(Maps(), 9, 4, 4, **kwargs)


def test_stage_out_of_range_and_encoder_without_list() -> None:
    with pytest.raises(ValueError, match=r"stages \(3,\) of 3 maps of Maps"):
        VoCoNet(Maps(), 9, 4, 4, stages=[3]).embed(torch.zeros(1, 1, 5, 6))
    with pytest.raises(TypeError, match="Identity returned a tensor"):
        VoCoNet(nn.Identity(), 9, 4, 4).embed(torch.zeros(3, 9, 5, 6))


def test_random_teacher_of_swin_blocks_is_refused() -> None:
    encoder = SwinUNETREncoder(SwinUNETR(1, 2, depths=(1, 1, 1, 1), feature_size=12, spatial_dims=2))
    with pytest.raises(ValueError, match="WindowAttention"):
        VoCoNet(encoder, 288, 4, 4, teacher="full", teacher_init="random")
    VoCoNet(encoder, 288, 4, 4, teacher="projector", teacher_init="random")


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    swin = SwinUNETREncoder(SwinUNETR(1, 2, feature_size=48, use_v2=True))
    v1 = VoCoNet(swin, 1152, 2048, 2048, teacher="none")
    assert sum(p.numel() for p in v1.parameters()) == 63_918_194
    v2 = VoCoNet(swin, 1152)
    assert sum(p.numel() for p in v2.parameters() if p.requires_grad) == 53_164_146 + 3_279_872
    cvpr = VoCoNet(swin.swinViT, 768, 2048, 2048, teacher="none", stages=[-1])
    assert sum(p.numel() for p in cvpr.parameters()) == 18_637_362 + 9_967_616


# ---- teacher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["projector", "full", "none"])
def test_teacher_starts_equal_and_untrained(teacher: str) -> None:
    net = unet_net(teacher=teacher)
    student, target = net(*crops())
    assert torch.equal(student, target)
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "projector"}
    parts = {"projector": {"teacher_projector"}, "full": {"teacher_encoder", "teacher_projector"}, "none": set()}
    assert {name.split(".")[0] for name in net.state_dict()} == {"encoder", "projector"} | parts[teacher]


def test_random_teacher_differs() -> None:
    student, target = unet_net(teacher_init="random")(*crops())
    assert not torch.allclose(student, target, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_forward_does_not_move_the_teacher(training: bool) -> None:
    net = unet_net(teacher="full").train(training)
    net.update_teacher(0.0)
    with torch.no_grad():
        for p in (*net.encoder.parameters(), *net.projector.parameters()):
            p.add_(1)
    before = state(net)
    net(*crops())
    assert same(state(net), before)


@pytest.mark.parametrize("teacher", ["projector", "full"])
def test_two_updates_give_081(teacher: str) -> None:
    net = unet_net(teacher=teacher)
    parts = [m for m in (net.teacher_encoder, net.teacher_projector) if m is not None]
    with torch.no_grad():
        for p in (*net.encoder.parameters(), *net.projector.parameters()):
            p.zero_()
        for part in parts:
            for p in part.parameters():
                p.fill_(1)
    net.update_teacher()
    net.update_teacher(0.9)
    for part in parts:
        for p in part.parameters():
            torch.testing.assert_close(p, torch.full_like(p, 0.81))
    assert all(p.eq(0).all() for p in net.projector.parameters())


def test_update_without_teacher_is_allowed() -> None:
    net = unet_net(teacher="none")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.update_teacher(0.9)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_two_trainer_iterations_equal_a_loop() -> None:
    """MONAI's trainer with the handler at ITERATION_STARTED against the order of the released code, by hand."""
    torch.manual_seed(0)
    # a copied start is the kink of v2's |y' - l'|, where rounding decides on the gradient
    net = VoCoNet(OneVoxel(), 6, 8, 4, teacher_init="random").double()
    initial = state(net)
    shapes = ((2, 3, 6, 1, 1), (2, 4, 6, 1, 1), (2, 3, 4))
    batches = [tuple(torch.rand(shape, dtype=torch.float64) for shape in shapes) for _ in range(2)]
    loss = VoCoLoss("v2")

    expected, optimizer = [], torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for image, base, label in batches:
        rows = torch.cat([image, base], 1).flatten(0, 1).flatten(1)
        student = net.projector(rows).unflatten(0, (2, 7))
        for t, s in zip(net.teacher_projector.module.parameters(), net.projector.parameters()):
            t.data = 0.9 * t.data + 0.1 * s.data
        with torch.no_grad():
            target = net.teacher_projector.module(rows).unflatten(0, (2, 7))
        value = loss((student, target), label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    by_hand = state(net)

    net.load_state_dict(initial)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=net,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=lambda batch, *args, **kwargs: (batch[0], batch[2], (batch[1],), {}),
        decollate=False,
        train_handlers=[MomentumUpdateHandler(net, momentum=0.9, final_momentum=None, event="iteration_started")],
    )
    seen: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["loss"].item())
    )
    trainer.run()
    assert seen == pytest.approx(expected, abs=1e-12)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    after = state(net)
    assert not torch.equal(after["teacher_projector.module.0.weight"], initial["teacher_projector.module.0.weight"])
    for name, t in by_hand.items():
        torch.testing.assert_close(after[name], t, rtol=0, atol=1e-10)


# ---- dropout and batch statistics -----------------------------------------------------------------------------------


def test_dropout_zeroes_features_not_crops_and_only_in_training() -> None:
    net = VoCoNet(OneVoxel(), 64, 8, 8, feature_dropout=0.5)
    rows: dict[str, torch.Tensor] = {}
    net.projector.register_forward_pre_hook(lambda m, args: rows.update(student=args[0]))
    net.teacher_projector.register_forward_pre_hook(lambda m, args: rows.update(teacher=args[0]))
    image, base = torch.ones(4, 5, 64, 1, 1), torch.ones(4, 9, 64, 1, 1)
    net.train()(image, base)
    assert rows["student"].any(1).all()  # no crop is gone
    assert rows["student"].any(0).all()  # nor is a feature of all crops
    assert 0.45 < (rows["student"] == 0).float().mean() < 0.55
    assert rows["student"].unique().tolist() == [0, 2]
    assert rows["teacher"].unique().tolist() == [1]  # the teacher sees the features themselves
    net.eval()
    first, second = net(image, base), net(image, base)
    assert rows["student"].unique().tolist() == [1]
    assert torch.equal(first[0], second[0])


def test_projection_uses_batch_statistics_in_train_and_eval() -> None:
    """InstanceNorm on vectors, or running statistics, would fail one of the two."""
    net = unet_net()
    image, base = crops()
    student = net.train()(image, base)[0]
    torch.testing.assert_close(net.eval()(image, base)[0], student)
    changed = base.clone()
    changed[1, 2] = torch.rand_like(changed[1, 2])
    other = net(image, changed)[0]
    assert (other[0, 0] - student[0, 0]).abs().max() > 1e-3  # another crop of another volume


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["projector", "full", "none"])
@pytest.mark.parametrize(
    "encoder, size",
    [
        (UNetEncoder(UNet(2, 1, 2, (4, 6, 8), (2, 2), num_res_units=2)), (12, 16)),
        (BasicUNetEncoder(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4))), (32, 48)),
        (SegResNetEncoder(SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))), (10, 12)),
        (SwinUNETREncoder(SwinUNETR(1, 2, depths=(1,) * 4, feature_size=12, spatial_dims=2, use_v2=True)), (64, 32)),
    ],
    ids=["UNet", "BasicUNet", "SegResNet", "SwinUNETR"],
)
def test_no_trained_parameter_is_without_gradient(encoder: nn.Module, size: tuple[int, ...], teacher: str) -> None:
    """Else DistributedDataParallel would need its search for unused parameters."""
    encoder.zero_grad(set_to_none=True)
    net = VoCoNet(encoder, sum(encoder.channels), 8, 6, teacher=teacher)
    label = torch.zeros(2, 2, 4)
    label[:, 0, 0] = label[:, 1, 1:3] = 0.5
    VoCoLoss("v2")(net(*crops(2, 2, 4, roi=size)), label).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in net.named_parameters() if not p.requires_grad and p.grad is not None] == []


# ---- network and loss together, against plain loops -----------------------------------------------------------------


def project(head: nn.Sequential, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The projector written out: two times linear, batch norm, ReLU, then linear."""
    h = torch.stack(rows)
    for i in (0, 3, 6):
        h = h @ head[i].weight.T + head[i].bias
        if i < 6:
            h = torch.relu((h - h.mean(0)) / torch.sqrt(((h - h.mean(0)) ** 2).mean(0) + 1e-5))
    return list(h)


def reading(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.relu(a @ b / (a.norm() * b.norm())).clamp(max=1)


def prediction(logits: list, labels: list, weight: str, negative: str, eps: float = 1e-6) -> torch.Tensor:
    pos = neg = torch.zeros((), dtype=torch.float64)
    weights, zeros = 0.0, 0
    for x, y in zip(logits, labels):
        w = (y if weight == "overlap" else (y > 0).to(y.dtype)) if y > 0 else torch.zeros_like(y)
        pos, weights = pos - w * torch.log(1 - (y - x).abs() + eps), weights + w
        if y == 0:
            neg, zeros = neg + (-torch.log(1 - x + eps) if negative == "log" else x * x), zeros + 1
    return pos / (weights + eps) + neg / (zeros + eps)


def reference_loss(variant: str, student: list[list], teacher: list[list], label: torch.Tensor) -> torch.Tensor:
    """VoCo over loops: intra term, regulariser over pairs i < j with the second detached, v2's inter term."""
    r, k = label.shape[1:]
    total = torch.zeros((), dtype=torch.float64)
    weight = "binary" if variant == "cvpr" else "overlap"
    negative = "log" if variant == "v2" else "square"
    for v, (s, t) in enumerate(zip(student, teacher)):
        logits = []
        for i in range(r):
            for j in range(k):
                x = reading(s[i], t[r + j])
                logits.append((x + reading(t[i], s[r + j])) / 2 if variant == "v1" else x)
        total = total + prediction(logits, list(label[v].flatten()), weight, negative)
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        total = total + sum(reading(s[r + i], s[r + j].detach()) ** 2 for i, j in pairs) / len(pairs)
        if variant == "v2":
            p = (v + 1) % len(student)
            targets = [reading(t[i], teacher[p][r + j]) for i in range(r) for j in range(k)]
            logits = [reading(s[i], student[p][r + j]) for i in range(r) for j in range(k)]
            total = total + prediction(logits, targets, "overlap", "log")
    return total / len(student)


@pytest.mark.parametrize("variant, teacher", [("v2", "projector"), ("v1", "full"), ("cvpr", "none")])
def test_network_and_loss_equal_plain_loops(variant: str, teacher: str) -> None:
    torch.manual_seed(3)
    b, r, k, f = 3, 2, 4, 5
    net = VoCoNet(OneVoxel(), f, 7, 6, teacher=teacher, teacher_init="random").double()
    net.update_teacher(0.9)
    image, base = torch.randn(b, r, f, 1, 1).double(), torch.randn(b, k, f, 1, 1).double()
    label = torch.zeros(b, r, k, dtype=torch.float64)
    label[..., 0], label[..., 2] = 0.25, 0.75

    rows = [x.flatten() for v in range(b) for x in (*image[v], *base[v])]
    flat = project(net.projector, rows)
    with torch.no_grad():
        flat_teacher = [x.clone() for x in flat] if teacher == "none" else project(net.teacher_projector.module, rows)
    split = lambda flat: [flat[v * (r + k) : (v + 1) * (r + k)] for v in range(b)]
    expected = reference_loss(variant, split(flat), split(flat_teacher), label)
    parameters = list(net.projector.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)

    value = VoCoLoss(variant)(net(image, base), label)
    gradients = torch.autograd.grad(value, parameters)
    assert value.item() == pytest.approx(expected.item(), abs=1e-10)
    for gradient, reference in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-10)
    assert max(g.abs().max() for g in gradients) > 1e-3
