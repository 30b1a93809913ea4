# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.networks.nets import BasicUNet, DynUNet, SegResNetDS, SwinUNETR, UNet, resnet10, resnet50
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn

from monai_ssl.handlers import MomentumUpdateHandler, PrepareBatchTensor
from monai_ssl.losses import LocalConsistencyLoss, NegativeCosineLoss, local_consistency
from monai_ssl.networks import (
    BasicUNetEncoder,
    DynUNetEncoder,
    PGLNet,
    ResNetPyramid,
    UNetEncoder,
    align_overlap,
    load_pretrained,
    overlap_theta,
    save_pretrained,
)
from monai_ssl.transforms import RandPairedViews

Views = tuple[Tensor, Tensor, Tensor]


class Itself(nn.Module):
    """The image is its own, only map."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Strided(nn.Module):
    """Two maps, of 2 and 3 channels, strides 1 and 2, counting its calls."""

    calls = 0

    def __init__(self, spatial_dims: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.fine, self.coarse = conv(1, 2, 3, padding=1), conv(2, 3, 3, 2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        fine = self.fine(x)
        return [fine, self.coarse(fine.tanh())]


def segresnet(spatial_dims: int = 2, channels: int = 1) -> nn.Module:
    return SegResEncoder(spatial_dims, in_channels=channels, init_filters=4, norm="instance", blocks_down=(1, 1))


def views(roi: tuple[int, ...] = (12, 10), batch: int = 3, channels: int = 1, seed: int = 0, **kwargs: Any) -> Views:
    """Pairs of views of noise."""
    transform = RandPairedViews(roi, **kwargs).set_random_state(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = [transform(torch.rand(channels, *(2 * r + 3 for r in roi), generator=generator)) for _ in range(batch)]
    image, image_2, affine = (torch.stack(parts).as_subclass(Tensor) for parts in zip(*pairs))
    return image, image_2, affine


def small(mode: str = "local", **kwargs: Any) -> PGLNet:
    torch.manual_seed(0)
    return PGLNet(Strided(), 3, 7, 5, spatial_dims=2, mode=mode, **kwargs)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def move_student(net: PGLNet) -> None:
    """So that student and teacher differ, buffers included."""
    with torch.no_grad():
        for part in (net.encoder, net.projector):
            for t in (*part.parameters(), *part.buffers()):
                t.add_(torch.rand(t.shape).to(t.dtype) + 1)


# ---- what goes in and comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("roi, channels", [((12, 10), 1), ((10, 12, 14), 3)])
def test_shapes(roi: tuple[int, ...], channels: int) -> None:
    net = PGLNet(segresnet(len(roi), channels), 8, 7, 5, spatial_dims=len(roi))
    half = tuple(r // 2 for r in roi)
    prediction, target, mask = net(*views(roi, channels=channels))
    assert prediction.shape == target.shape == (6, 5, *half)
    assert mask.shape == (6, *half)
    assert mask.dtype == torch.bool
    assert prediction.requires_grad
    assert not target.requires_grad
    fine = PGLNet(segresnet(len(roi), channels), 4, 7, 5, spatial_dims=len(roi), level=0)
    assert fine(*views(roi, channels=channels))[0].shape == (6, 5, *roi)
    whole = PGLNet(segresnet(len(roi), channels), 8, 7, 5, spatial_dims=len(roi), mode="global")
    prediction, target = whole(*views(roi, channels=channels))
    assert prediction.shape == target.shape == (6, 5)
    assert prediction.requires_grad
    assert not target.requires_grad


def coordinate_views(seed: int, parent: Tensor | None = None) -> tuple[Views, Tensor]:
    """Views whose voxels hold their index in the volume, and the lower and upper corner of each shared box (2, n)."""
    volume = torch.stack(torch.meshgrid(*(torch.arange(float(s)) for s in (29, 33, 27)), indexing="ij"))
    transform = RandPairedViews((10, 12, 14), min_overlap=0.2).set_random_state(seed)
    first, second, affine = (t.as_subclass(Tensor) for t in transform(volume))
    box = torch.stack(
        [
            torch.from_numpy(transform.start).amax(0),
            torch.from_numpy(transform.start + transform.extent).amin(0),
        ]
    )
    affine = affine if parent is None else parent @ affine
    return (first[None], second[None], affine[None]), box


@pytest.mark.parametrize("seed", range(6))
def test_both_rows_hold_the_same_anatomy(seed: int) -> None:
    """Images of coordinates through layers that change nothing: prediction and target are those of the shared box."""
    net = PGLNet(Itself(), 3, 4, 3)
    net.projector = net.predictor = net.teacher_projector = nn.Identity()
    inputs, (low, high) = coordinate_views(seed)
    prediction, target, mask = net(*inputs)
    axes = [a + (torch.arange(f) + 0.5) / f * (b - a) - 0.5 for f, a, b in zip((10, 12, 14), low, high)]
    expected = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(2, -1, -1, -1, -1)
    counted = mask[:, None].expand_as(target)
    assert mask.float().mean() > 0.5
    for output in (prediction, target):
        assert (output - expected).abs()[counted].max() < 0.71  # half a cell beyond the outermost centres
    inner = align_overlap(inputs[0], overlap_theta(inputs[2], (10, 12, 14), (10, 12, 14))[:, 0], 0.0)[1]
    assert (prediction[:1] - expected[:1]).abs()[inner[:, None].expand(-1, 3, -1, -1, -1)].max() < 1e-3
    assert torch.equal(prediction, target.roll(1, 0))


def test_targets_come_from_the_other_view() -> None:
    net, inputs = small(), views()
    move_student(net)
    prediction, target, mask = net(*inputs)
    with torch.no_grad():
        x = torch.cat(inputs[:2])
        online = net.predictor(net.projector(net.encoder(x)[-1]))
        teacher = net.teacher_projector.module(net.teacher_encoder.module(x)[-1])
    theta = overlap_theta(inputs[2], (12, 10), (6, 5))
    for view in range(2):
        rows, other = slice(3 * view, 3 * view + 3), slice(3 - 3 * view, 6 - 3 * view)
        own, valid = align_overlap(online[rows], theta[:, view])
        of_other, valid_too = align_overlap(teacher[other], theta[:, 1 - view])
        torch.testing.assert_close(prediction[rows], own)
        torch.testing.assert_close(target[rows], of_other)
        assert torch.equal(mask[rows], valid & valid_too)
    assert not torch.allclose(prediction, target, atol=0.1)


@pytest.mark.parametrize("mode", ["local", "global"])
def test_exchanged_views_exchange_the_halves(mode: str) -> None:
    net = small(mode).double()
    image, image_2, affine = views()
    outputs = net(image.double(), image_2.double(), affine)
    exchanged = net(image_2.double(), image.double(), affine.flip(1))
    for a, b in zip(outputs, exchanged):
        torch.testing.assert_close(torch.cat([a[3:], a[:3]]), b, atol=1e-9, rtol=0)
    assert not torch.allclose(outputs[0][:3], outputs[0][3:], atol=1e-2)


def test_world_matrices_do_as_well() -> None:
    net = small().double()
    image, image_2, affine = views()
    parent = torch.tensor([[0.3, -1.9, -81.5], [1.1, 0.6, 220.0], [0, 0, 1]], dtype=torch.float64)
    index, world = (net(image.double(), image_2.double(), a) for a in (affine, parent @ affine))
    # the first axis of the world runs against the second of the volume, so samples run the other way along it
    for a, b in zip(index, world):
        torch.testing.assert_close(a, b.flip(-1), atol=1e-9, rtol=0)


def test_one_pass_of_each_encoder() -> None:
    for mode in ("local", "global"):
        net = small(mode)
        net(*views())
        assert (net.encoder.calls, net.teacher_encoder.module.calls) == (1, 1)


def test_global_mode_averages_before_the_projector() -> None:
    net, (image, image_2, affine) = small("global"), views()
    prediction, target = net(image, image_2)
    pooled = net.encoder(torch.cat([image, image_2]))[-1].mean((2, 3))
    torch.testing.assert_close(net.embed(torch.cat([image, image_2])), pooled)
    torch.testing.assert_close(prediction, net.predictor(net.projector(pooled)))
    torch.testing.assert_close(target, net.projector(pooled).roll(3, 0))
    assert [type(layer) for layer in net.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    for a, b in zip(net(image, image_2, affine), (prediction, target)):
        assert torch.equal(a, b)


def test_options_reach_the_alignment() -> None:
    inputs = views()
    theta = {
        anchor: overlap_theta(inputs[2], (12, 10), (6, 5), anchor, 1.5).transpose(0, 1) for anchor in ("rf", "cell")
    }
    for anchor, border in (("rf", 0.0), ("cell", 0.0), ("rf", 0.5), ("cell", math.inf)):
        net = small(anchor=anchor, border=border, output_stride=1.5)
        mask = net(*inputs)[2]
        valid = [align_overlap(torch.rand(3, 1, 6, 5), t, border)[1] for t in theta[anchor]]
        assert torch.equal(mask, (valid[0] & valid[1]).repeat(2, 1, 1))
        assert mask.all() == (border == math.inf)


@pytest.mark.parametrize("training", [True, False])
def test_views_that_share_nothing(training: bool) -> None:
    image, image_2, _ = views()
    index = torch.eye(3, dtype=torch.float64)
    apart = index.clone()
    apart[0, 2] = 12.0
    affine = torch.stack([index, apart]).expand(3, 2, 3, 3)
    net = small().train(training)
    prediction, target, mask = net(image, image_2, affine)
    assert not mask.any()
    loss = local_consistency(prediction, target, mask)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() and not p.grad.any() for p in net.parameters() if p.requires_grad)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def test_default_sizes() -> None:
    net = PGLNet(SegResNetDS(init_filters=16, norm="instance", blocks_down=(1, 2, 2, 4)).encoder, 128)
    assert (count(net.encoder), count(net.projector), count(net.predictor)) == (4_399_344, 396_544, 527_616)
    assert count(net, trained=True) == 5_323_504
    layers = [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Conv3d]
    assert [type(layer) for layer in net.projector] == [type(layer) for layer in net.predictor] == layers


def test_published_sizes() -> None:
    with torch.device("meta"):  # shapes without memory
        resnet = resnet50(
            spatial_dims=3, n_input_channels=1, conv1_t_stride=(1, 2, 2), no_max_pool=True, feed_forward=False,
            bias_downsample=False,
        )  # fmt: skip
        net = PGLNet(ResNetPyramid(resnet), 2048, 4096, anchor="cell", border=math.inf)
        image = torch.empty(2, 1, 16, 96, 96)
        prediction, target, mask = net(image, image, torch.empty(2, 2, 4, 4, dtype=torch.float64))
    assert (count(net.encoder), count(net.projector), count(net.predictor)) == (46_155_072, 9_449_728, 2_109_696)
    assert prediction.shape == target.shape == (4, 256, 2, 6, 6)
    assert mask.shape == (4, 2, 6, 6)


# ---- teacher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "global"])
def test_teacher_starts_equal_and_is_not_trained(mode: str) -> None:
    net = small(mode)
    assert same(net.teacher_encoder.module.state_dict(), net.encoder.state_dict())
    assert same(net.teacher_projector.module.state_dict(), net.projector.state_dict())
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "projector", "predictor"}
    output = net(*views())
    (LocalConsistencyLoss() if mode == "local" else NegativeCosineLoss())(*output).backward()
    assert all((p.grad is None) != p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_forward_does_not_move_the_teacher(training: bool) -> None:
    net = small().train(training)
    move_student(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    for seed in range(3):
        net(*views(seed=seed))
    assert same(before, dict(net.named_parameters()))
    assert training or same(buffers, dict(net.named_buffers()))


@pytest.mark.parametrize("mode", ["local", "global"])
def test_targets_in_evaluation_are_those_of_training(mode: str) -> None:
    """The teacher's running statistics belong to its own weights, however far the student has moved on."""
    net, inputs = small(mode, teacher_statistics="own"), views(batch=16)
    move_student(net)
    with torch.no_grad():
        for _ in range(300):  # the start is forgotten
            trained = net.train()(*inputs)[1]
            net.update_teacher(1.0)
        target = net.eval()(*inputs)[1]
    torch.testing.assert_close(target, trained, atol=0.05, rtol=0)


@pytest.mark.parametrize("statistics, kept", [("student", 0.0), ("own", 0.75)])
def test_update_follows_parameters_and_statistics(statistics: str, kept: float) -> None:
    net = small(teacher_statistics=statistics)
    move_student(net)
    before = state(net)
    net.update_teacher(0.75)
    for part in ("encoder", "projector"):
        for name, t in getattr(net, part).named_parameters():
            expected = 0.75 * before[f"teacher_{part}.module.{name}"] + 0.25 * t
            torch.testing.assert_close(getattr(net, f"teacher_{part}").module.get_parameter(name), expected)
        for name, t in getattr(net, part).named_buffers():
            own, old = getattr(net, f"teacher_{part}").module.get_buffer(name), before[f"teacher_{part}.module.{name}"]
            if kept == 0:
                assert torch.equal(own, t)
            torch.testing.assert_close(own, kept * old + (1 - kept) * t if t.is_floating_point() else t)
    net.update_teacher(0.0)
    for part in ("encoder", "projector"):
        own, student = getattr(net, f"teacher_{part}").module.state_dict(), getattr(net, part).state_dict()
        assert same(own, student)
        assert all(own[name].data_ptr() != student[name].data_ptr() for name in own)
    assert same({k: v for k, v in before.items() if k.startswith("pred")}, state_of(net, "predictor"))


def state_of(net: PGLNet, part: str) -> dict[str, Tensor]:
    return {name: t for name, t in net.state_dict().items() if name.startswith(part)}


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "global"])
@pytest.mark.parametrize(
    "build, features, size, anchor",
    [
        (segresnet, 8, (12, 10), "rf"),
        (lambda: UNetEncoder(UNet(2, 1, 2, (4, 6, 8), (2, 2), num_res_units=2)), 8, (12, 16), "rf"),
        (lambda: BasicUNetEncoder(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 6, 4))), 6, (32, 48), "cell"),
        (lambda: DynUNetEncoder(DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2] * 2, filters=[4, 6, 8])), 8, (12, 16), "rf"),
        (
            lambda: ResNetPyramid(
                resnet10(spatial_dims=2, n_input_channels=1, no_max_pool=True, widen_factor=0.125, feed_forward=False)
            ),
            64,
            (16, 24),
            "rf",
        ),
        (
            lambda: SwinUNETR(1, 2, depths=(1,) * 4, feature_size=12, spatial_dims=2, use_v2=True).swinViT,
            192,
            (64, 32),
            "cell",
        ),
    ],
    ids=["SegResNetDS", "UNet", "BasicUNet", "DynUNet", "ResNet", "swinViT"],
)
def test_no_trained_parameter_is_without_gradient(
    build: Callable[[], nn.Module], features: int, size: tuple[int, ...], anchor: str, mode: str
) -> None:
    """Else DistributedDataParallel would need its search for unused parameters."""
    net = PGLNet(build(), features, 8, 6, spatial_dims=2, mode=mode, anchor=anchor)
    loss = LocalConsistencyLoss() if mode == "local" else NegativeCosineLoss()
    loss(*net(*views(size))).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_through_monais_engine() -> None:
    """Views and matrix as collated, the loss called with the tuple; the schedule moves the teacher."""
    net, (image, image_2, affine) = small(), views()
    batch = {"image": image, "image_2": image_2, "view_affine": affine}
    loss = LocalConsistencyLoss()
    SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=[batch, batch], network=net,
        optimizer=torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1),
        loss_function=lambda output, _: loss(*output),
        prepare_batch=PrepareBatchTensor(extra_keys=["image_2", "view_affine"]), decollate=False,
        train_handlers=[MomentumUpdateHandler(net, 0.5, 1.0)],
    ).run()  # fmt: skip

    reference = small()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], 0.1)
    for momentum in (0.5, 0.75):
        optimizer.zero_grad()
        loss(*reference(image, image_2, affine)).backward()
        optimizer.step()
        reference.update_teacher(momentum)
    for name, t in reference.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], t, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast() -> None:
    net, inputs = small(), views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, target, mask = net(*inputs)
        loss = local_consistency(prediction, target, mask)
    assert prediction.dtype == target.dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert torch.equal(mask, small()(*inputs)[2])


def test_synchronised_batch_norm_keeps_the_structure() -> None:
    net = small()
    before = state(net)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert converted is net
    assert same(before, state(net))
    heads = (net.projector, net.predictor, net.teacher_projector.module)
    assert all(isinstance(head[1], nn.SyncBatchNorm) for head in heads)
    net.update_teacher(0.5)


def test_encoder_fills_the_downstream_network(tmp_path: Any) -> None:
    args = {"spatial_dims": 2, "init_filters": 4, "norm": "instance", "blocks_down": (1, 1)}
    encoder = SegResNetDS(**args).encoder
    net = PGLNet(encoder, 8, 7, 5, spatial_dims=2)
    assert net.encoder is encoder
    file = save_pretrained(net.encoder, tmp_path / "encoder.pt", {"method": "PGL"})
    downstream = SegResNetDS(**args)
    load_pretrained(downstream.encoder, file)
    assert same(downstream.encoder.state_dict(), encoder.state_dict())


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_inputs_are_checked() -> None:
    net, (image, image_2, affine) = small(), views()
    for other in (image_2[:2], image_2[..., :8], image_2[:, :, None]):
        with pytest.raises(ValueError, match="must be equal") as error:
            net(image, other, affine)
        assert str(tuple(other.shape)) in str(error.value)
    with pytest.raises(ValueError, match="2 spatial axes"):
        net(image[:, :, None], image_2[:, :, None], affine)
    with pytest.raises(ValueError, match="got no view_affine"):
        net(image, image_2)
    with pytest.raises(ValueError, match=r"got view_affine \(2, 2, 3, 3\)"):
        net(image, image_2, affine[:2])
    with pytest.raises(ValueError, match="no multiples of their maps"):
        net(image[..., :9], image_2[..., :9], affine)


def test_maps_are_checked() -> None:
    with pytest.raises(ValueError, match="map -1 of Strided has 3 channels, in_features=4"):
        PGLNet(Strided(), 4, 7, 5, spatial_dims=2)(*views())
    with pytest.raises(ValueError, match="level 2 of 2 maps of Strided"):
        PGLNet(Strided(), 3, 7, 5, spatial_dims=2, level=2)(*views())
    with pytest.raises(TypeError, match="Identity returned a tensor"):
        PGLNet(nn.Identity(), 1, 7, 5, spatial_dims=2)(*views())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"mode": "both"}, "'local' or 'global', got 'both'"),
        ({"anchor": "center"}, "rf, cell, got 'center'"),
        ({"spatial_dims": 1}, "2 or 3, got 1"),
        ({"border": -1.0}, "border must not be negative"),
        ({"teacher_statistics": "teacher"}, "teacher_statistics must be 'student' or 'own'"),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGLNet(Strided(), 3, **kwargs)
