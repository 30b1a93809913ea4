# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import FullyConnectedNet, SegResNetDS
from patch_encoders import Identity, Published, encoder, numbers, small
from torch import Tensor, nn

from monai_ssl.networks import PatchClassifier, ProjectionHead


class Keep(nn.Module):
    """A head that shows what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return x


def mlp(inputs: int, outputs: int, hidden: int) -> nn.Module:
    return FullyConnectedNet(inputs, outputs, [hidden], act="relu", adn_ordering="A")


def published_head(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((inputs, 2048), (2048, 1024)):
        layers += [nn.Linear(i, o), nn.ReLU(), nn.BatchNorm1d(o), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(1024, outputs))


# ---- what the head gets and what comes out --------------------------------------------------------------------------


def coordinates() -> Tensor:
    """Two items of three patches of 2 channels and 1 x 2 voxels; a value is item, patch, channel, voxel as digits."""
    digits = torch.arange(2).view(-1, 1, 1, 1) * 1000 + torch.arange(3).view(-1, 1, 1) * 100
    return (digits + torch.arange(2).view(-1, 1) * 10 + torch.arange(2)).float()[..., None, :]


@pytest.mark.parametrize(
    "combine, pool, expected",
    [
        ("concat", "flatten", [[0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211]]),
        ("concat", "avg", [[0.5, 10.5, 100.5, 110.5, 200.5, 210.5]]),
        ("pairs", "avg", [[0.5, 10.5, 100.5, 110.5], [0.5, 10.5, 200.5, 210.5]]),
        ("each", "avg", [[0.5, 10.5], [100.5, 110.5], [200.5, 210.5]]),
    ],
)
def test_rows_of_the_head_by_hand(combine: str, pool: str, expected: list[list[float]]) -> None:
    head = Keep()
    out = PatchClassifier(Identity(), head, combine, pool, spatial_dims=2)(coordinates())
    assert head.given.tolist() == expected + [[value + 1000 for value in row] for row in expected]
    rows = head.given.unflatten(0, (2, -1))
    assert torch.equal(out, {"concat": rows[:, 0], "pairs": rows.transpose(1, 2), "each": rows}[combine])


def test_cells_in_c_order() -> None:
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    embedding = PatchClassifier(Identity(), Keep(), pool=2, spatial_dims=2).embed(x)
    cells = [[x[0, c, i : i + 2, j : j + 3].mean().item() for i in (0, 2) for j in (0, 3)] for c in (0, 1)]
    assert embedding.tolist() == [cells[0] + cells[1]]
    assert PatchClassifier(Identity(), Keep(), pool=2).embed(torch.rand(3, 5, 4, 6, 8)).shape == (3, 5 * 8)


@pytest.mark.parametrize("spatial_dims, size", [(2, (10, 12)), (3, (10, 11, 12))])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(spatial_dims: int, size: tuple[int, ...], channels: int) -> None:
    backbone = encoder(spatial_dims, init_filters=8, in_channels=channels, blocks_down=(1, 1))
    x = torch.rand(2, 5, channels, *size)
    build = lambda head, *args: PatchClassifier(backbone, head, *args, spatial_dims=spatial_dims)
    assert build(mlp(5 * 16, 7, 8))(x).shape == (2, 7)
    assert build(mlp(2 * 16, 26, 8), "pairs")(x).shape == (2, 26, 4)
    assert build(ProjectionHead((16, 16, 6)), "each")(x).shape == (2, 5, 6)
    assert build(mlp(16 * 2**spatial_dims, 10, 8), "concat", 2)(x[:, 0]).shape == (2, 10)  # P = 1


def test_one_patch_axis_may_be_left_out() -> None:
    net = PatchClassifier(small(2), mlp(16, 4, 8), spatial_dims=2)
    x = torch.rand(3, 1, 8, 10)
    assert torch.equal(net(x), net(x[:, None]))


def test_pairs_go_into_cross_entropy_as_they_are() -> None:
    net = PatchClassifier(small(2), mlp(32, 8, 8), "pairs", spatial_dims=2)
    x, label = torch.rand(2, 4, 1, 8, 8), torch.tensor([[0, 5, 7], [3, 2, 1]])
    logits = net(x)
    value = nn.CrossEntropyLoss()(logits, label)
    rows = [-logits[b, :, q].log_softmax(0)[label[b, q]] for b in range(2) for q in range(3)]
    torch.testing.assert_close(value, sum(rows) / 6)


@pytest.mark.parametrize("combine", ["concat", "pairs", "each"])
def test_one_encoder_call_for_all_patches(combine: str) -> None:
    net = PatchClassifier(Identity(), Keep(), combine, spatial_dims=2)
    net(torch.rand(4, 27, 1, 5, 6))
    assert (net.encoder.calls, net.encoder.batch) == (1, 4 * 27)


@pytest.mark.parametrize("training", [True, False])
def test_views_are_treated_alike(training: bool) -> None:
    """Heads of their own for the views would solve the task on noise."""
    torch.manual_seed(0)
    net = PatchClassifier(small(2), ProjectionHead((16, 16, 8), norm="batch"), "each", spatial_dims=2)
    x, order = torch.rand(3, 4, 1, 10, 12), torch.tensor([2, 0, 3, 1])
    net(x)  # running statistics
    net.train(training)
    torch.testing.assert_close(net(x[:, order]), net(x)[:, order], atol=1e-5, rtol=0)


def test_batch_norm_only_in_the_projection_head() -> None:
    """It would let the patches of one sample tell each other what they are."""
    norms = lambda net: [name for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for head, combine in ((mlp(27 * 128, 100, 1024), "concat"), (mlp(256, 26, 512), "pairs")):
        assert norms(PatchClassifier(encoder(), head, combine)) == []
    assert norms(PatchClassifier(encoder(), ProjectionHead((128,) * 3, norm="batch"), "each")) == ["head.1"]


@pytest.mark.parametrize("combine", ["concat", "pairs", "each"])
def test_every_parameter_gets_a_gradient(combine: str) -> None:
    width = {"concat": 3 * 16, "pairs": 32, "each": 16}[combine]
    net = PatchClassifier(small(), mlp(width, 5, 8), combine)
    net(torch.rand(2, 3, 1, 8, 8, 8)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert net.encoder.layers[0].blocks[0].conv1.weight.grad.any()


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_bundles() -> None:
    assert numbers(encoder()) == 4_399_344
    assert numbers(encoder(2)) == 1_468_368
    for spatial_dims, whole in ((3, 4_980_434), (2, 1_662_386)):
        kwargs = {"init_filters": 16, "norm": "instance", "blocks_down": (1, 2, 2, 4), "out_channels": 2}
        network = SegResNetDS(spatial_dims, **kwargs)
        assert numbers(network) == whole
        encoder(spatial_dims).load_state_dict(network.encoder.state_dict())
    assert numbers(mlp(256, 26, 512)) == 144_922
    assert numbers(mlp(27 * 128, 100, 1024)) == 3_642_468
    assert numbers(mlp(128 * 8, 10, 256)) == 264_970
    assert numbers(ProjectionHead(channels=(128, 128, 128), norm="batch")) - 2 * 128 == 33_280
    with torch.device("meta"):
        maps = encoder()(torch.empty(1, 1, 96, 80, 64))
        assert [(m.shape[1], 96 // m.shape[2]) for m in maps] == [(16, 1), (32, 2), (64, 4), (128, 8)]
        assert encoder()(torch.empty(1, 1, 10, 10, 10))[-1].shape[2:] == (2, 2, 2)


@pytest.mark.parametrize(
    "combine, shape, features, classes, total",
    [
        ("pairs", (2, 2, 1, 39, 39, 39), 512, 26, 6_725_162),
        ("concat", (2, 27, 1, 39, 39, 39), 6_912, 100, 19_908_212),
        ("concat", (2, 1, 128, 128, 128), 16_384, 10, 39_214_618),
    ],
    ids=["RPL", "Jigsaw", "Rotation"],
)
def test_published_networks(combine: str, shape: tuple[int, ...], features: int, classes: int, total: int) -> None:
    with torch.device("meta"):  # shapes only
        net = PatchClassifier(Published(), published_head(features, classes), combine, pool="flatten")
        out = net(torch.empty(shape))
    assert numbers(net.encoder) == 3_537_424
    assert numbers(net) == total
    assert out.shape == ((2, classes, 1) if combine == "pairs" else (2, classes))


def test_published_exemplar() -> None:
    """Released with three heads; ours shares one."""
    with torch.device("meta"):
        net = PatchClassifier(Published(), nn.Linear(16_384, 1024), "each", pool="flatten")
        out = net(torch.empty(2, 2, 1, 128, 128, 128))
    assert numbers(net) + 2 * numbers(net.head) == 53_872_144
    assert out.shape == (2, 2, 1024)


def test_published_network_trains() -> None:
    torch.manual_seed(0)
    net = PatchClassifier(Published(2), published_head(2 * 256, 8), "pairs", pool="flatten", spatial_dims=2)
    nn.CrossEntropyLoss()(net(torch.rand(2, 3, 1, 32, 35)), torch.tensor([[0, 1], [2, 3]])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"combine": "sum"}, "'concat', 'pairs' or 'each', got 'sum'"),
        ({"pool": "max"}, "pool must be .* got 'max'"),
        ({"pool": 0}, "pool must be .* got 0"),
        ({"pool": True}, "pool must be .* got True"),
        ({"pool": 2.0}, "pool must be .* got 2.0"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
    ],
)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchClassifier(Identity(), Keep(), **kwargs)


@pytest.mark.parametrize(
    "combine, shape",
    [
        ("concat", (2, 4, 5, 6)),
        ("concat", (7,)),
        ("concat", (2, 3, 1, 1, 4, 5, 6)),
        ("concat", (2, 0, 1, 4, 5, 6)),
        ("pairs", (2, 1, 1, 4, 5, 6)),
        ("pairs", (2, 1, 4, 5, 6)),
    ],
)
def test_refuses_inputs(combine: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PatchClassifier(Identity(), Keep(), combine)(torch.zeros(shape))


def test_encoder_without_a_list() -> None:
    with pytest.raises(TypeError, match="returned Tensor, expected a list of maps"):
        PatchClassifier(nn.Identity(), Keep())(torch.zeros(2, 3, 1, 4, 5, 6))
