# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from monai.networks.nets import ResNetFeatures, UNet
from torch import Tensor, nn

from monai_ssl.handlers import PrepareBatchTensor
from monai_ssl.losses import AnatomicalEmbeddingLoss, GlobalPairSampler, LocalPairSampler
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet, MergedEmbeddingNet, UNetEncoder
from monai_ssl.transforms import RandPairedViews


def small(spatial_dims: int = 2, embed_dim: int = 7, **kwargs: Any) -> AnatomicalEmbeddingNet:
    torch.manual_seed(0)
    encoder = AnisotropicResNet(spatial_dims, base_channels=4)
    return AnatomicalEmbeddingNet(encoder, encoder.channels, spatial_dims, embed_dim, **kwargs)


def image(spatial_dims: int = 2, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, *(8, 32, 48)[-spatial_dims:], generator=torch.Generator().manual_seed(seed))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- sizes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spatial_dims, base, semantic, expected",
    [
        (3, 64, False, 32_832_960), (3, 64, True, 33_333_184), (3, 32, False, 8_907_872), (3, 16, False, 2_908_848),
        (3, 8, False, 1_400_216), (2, 64, False, 11_593_024),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [AnatomicalEmbeddingNet, MergedEmbeddingNet])
def test_sizes(cls: Any, spatial_dims: int, base: int, semantic: bool, expected: int) -> None:
    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        encoder = AnisotropicResNet(spatial_dims, base_channels=base)
        net = cls(encoder, encoder.channels, spatial_dims, semantic=semantic)
    assert count(net) == expected
    if base == 64 and spatial_dims == 3:
        assert (count(net.local_head), count(net.global_head)) == (500_224, 508_160)
        assert len(net.state_dict()) == (138 if not semantic else 146)


def test_names() -> None:
    names = {name.rpartition(".")[0] for name in small(semantic=True).state_dict() if not name.startswith("encoder.")}
    heads = [
        f"{head}.{part}"
        for head in ("local_head", "semantic_head")
        for part in ("lateral.0", "lateral.1", "lateral.2", "smooth")
    ]
    assert names == {*heads, "global_head.lateral.0", "global_head.smooth"}


def test_maps_of_a_published_view() -> None:
    with torch.device("meta"):
        encoder = AnisotropicResNet()
        net = AnatomicalEmbeddingNet(encoder, encoder.channels)
        view = torch.empty(3, 1, 32, 96, 96)
        assert [tuple(m.shape) for m in net(view, view)] == [(6, 128, 16, 48, 48), (6, 128, 8, 6, 6)]
        assert MergedEmbeddingNet.sharing(net)(view).shape == (3, 256, 16, 48, 48)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("semantic", [False, True])
def test_forward_by_hand(spatial_dims: int, semantic: bool) -> None:
    net, x = small(spatial_dims, semantic=semantic).eval(), image(spatial_dims)
    maps = net.encoder(x)

    def pyramid(head: Any) -> Tensor:
        deep, middle, fine = (head.lateral[i](maps[i]) for i in (2, 1, 0))
        repeat = lambda a, like: F.interpolate(a, scale_factor=[n / m for n, m in zip(like.shape[2:], a.shape[2:])])
        total = middle + repeat(deep, middle)
        return F.normalize(head.smooth(fine + repeat(total, fine)), dim=1)

    expected = [
        pyramid(net.local_head),
        F.normalize(net.global_head.smooth(net.global_head.lateral[0](maps[3])), dim=1),
    ]
    expected += [pyramid(net.semantic_head)] if semantic else []
    output = net(x)
    assert isinstance(output, list)
    assert len(output) == len(expected)
    for a, b in zip(output, expected):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.norm(dim=1), torch.ones_like(a[:, 0]))
    assert not torch.allclose(output[0], output[-1][..., : output[0].shape[-1]]) if semantic else True


def test_pairs_of_views() -> None:
    """Rows of view 1 before those of view 2, by one pass through the encoder."""
    net, first, second = small().eval(), image(seed=1), image(seed=2)
    calls: list[int] = []
    net.encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    output = net(first, second)
    assert calls == [4]
    for together, a, b in zip(output, net(first), net(second)):
        torch.testing.assert_close(together, torch.cat([a, b]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("semantic", [False, True])
def test_merged_inner_product_is_the_mean_cosine(spatial_dims: int, semantic: bool) -> None:
    net, x = small(spatial_dims, semantic=semantic).eval(), image(spatial_dims)
    maps = net(x)
    size = maps[0].shape[2:]
    mode = "bilinear" if spatial_dims == 2 else "trilinear"
    merged = MergedEmbeddingNet.sharing(net)(x)
    assert merged.shape == (2, 7 * len(maps), *size)
    large = [F.interpolate(m, size=size, mode=mode, align_corners=False).flatten(2) for m in maps]
    mean = sum(F.cosine_similarity(m[0][:, :, None], m[1][:, None, :], dim=0) for m in large) / len(maps)
    torch.testing.assert_close(merged[0].flatten(1).T @ merged[1].flatten(1), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.norm(dim=1), torch.ones_like(merged[:, 0]))


def test_single_levels() -> None:
    """One map for the fine head; its up-sampling goes to the size, also where that is odd."""
    net = small(local_levels=(1,), global_level=2)
    assert [tuple(m.shape[1:]) for m in net(image())] == [(7, 8, 12), (7, 4, 6)]
    torch.manual_seed(0)
    odd = AnatomicalEmbeddingNet(Fixed((6, 9), (2, 3)), (2, 2), 2, 5, local_levels=(0, -1))
    assert odd(torch.rand(1, 1, 12, 18))[0].shape == (1, 5, 6, 9)


class Fixed(nn.Module):
    """Maps of given sizes."""

    def __init__(self, *sizes: tuple[int, ...], channels: int = 2) -> None:
        super().__init__()
        self.sizes = sizes
        self.conv = nn.Conv2d(1, channels, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.adaptive_avg_pool2d(self.conv(x), size) for size in self.sizes]


@pytest.mark.parametrize("level, size", [(0, (48, 16, 16)), (0, (4, 256, 16)), (1, (96, 16, 16)), (1, (4, 16, 448))])
def test_receptive_field(level: int, size: tuple[int, ...]) -> None:
    """Voxels to either side that a cell sees: 12 and about 56 of the local map, 28 and about 124 of the global one."""
    torch.manual_seed(0)
    encoder = AnisotropicResNet(3, base_channels=1)
    net = AnatomicalEmbeddingNet(encoder, encoder.channels, 3, embed_dim=1).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_().add_(0.1)  # so that nothing cancels or dies
    x = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    maps = encoder(x)
    output = net.local_head(maps[:3]) if level == 0 else net.global_head(maps[3:])
    axis = max(range(3), key=lambda a: size[a])
    centre = [n // 2 for n in output.shape[2:]]
    seen = torch.autograd.grad(output[(0, 0, *centre)], x)[0][0, 0]
    reach = (seen != 0).sum([a for a in range(3) if a != axis]).nonzero()[:, 0]
    stride = size[axis] // output.shape[2 + axis]
    middle = (centre[axis] + 0.5) * stride - 0.5
    expected = {0: (12, 56), 1: (28, 124)}[level][axis > 0]
    # padding shifts the field of strided convolutions by some voxels
    assert abs(float(reach.min() + reach.max()) / 2 - middle) <= 8
    assert float(reach.max() - reach.min() + 1) / 2 == pytest.approx(expected, abs=1)


# ---- one network, two forms ------------------------------------------------------------------------------------------


def test_sharing() -> None:
    """The very same tensors and keys; what one learns the other has learnt."""
    net = small(semantic=True)
    merged = MergedEmbeddingNet.sharing(net)
    for name in ("encoder", "local_head", "global_head", "semantic_head"):
        assert getattr(merged, name) is getattr(net, name)
    assert same(merged.state_dict(), net.state_dict())
    assert list(merged.state_dict()) == list(net.state_dict())
    other = MergedEmbeddingNet(AnisotropicResNet(2, base_channels=4), (4, 8, 16, 32), 2, 7, semantic=True)
    assert list(other.state_dict()) == list(net.state_dict())
    before = merged.eval()(image())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(image()), before)
    with torch.no_grad():
        net.local_head.smooth.weight.mul_(-1)
    assert not torch.allclose(merged(image()), before)
    assert {id(p) for p in merged.parameters()} == {id(p) for p in net.parameters()}
    back = AnatomicalEmbeddingNet.sharing(merged)
    torch.testing.assert_close(back(image())[0], net(image())[0])
    with pytest.raises(TypeError, match="got Linear"):
        MergedEmbeddingNet.sharing(nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kwargs", [{}, {"semantic": True}, {"local_levels": (1,), "global_level": 2}], ids=str)
def test_scripted(spatial_dims: int, kwargs: dict[str, Any]) -> None:
    net, x = small(spatial_dims, **kwargs).eval(), image(spatial_dims)
    merged = MergedEmbeddingNet.sharing(net)
    scripted = torch.jit.script(net)
    for a, b in zip(scripted(x), net(x)):
        torch.testing.assert_close(a, b)
    for a, b in zip(scripted(x, x), net(x, x)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.jit.script(merged)(x), merged(x))


# ---- other encoders and training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, channels, size",
    [
        (
            lambda: ResNetFeatures("resnet10", pretrained=False, spatial_dims=2, in_channels=1),
            (64, 64, 128, 256, 512),
            (32, 64),
        ),
        (lambda: UNetEncoder(UNet(2, 1, 2, (4, 6, 8, 10), (2, 2, 2), num_res_units=1)), (4, 6, 8, 10), (32, 48)),
    ],
)
def test_other_encoders(build: Callable[[], nn.Module], channels: tuple[int, ...], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = AnatomicalEmbeddingNet(build(), channels, 2, embed_dim=6)
    views = torch.rand(2, 2, 1, *size)
    local, coarse = net(*views)
    stride = [n // m for n, m in zip(size, local.shape[2:])]
    assert local.shape == (4, 6, *[n // s for n, s in zip(size, stride)])
    affine = torch.diag(torch.tensor([2.0, 2, 1], dtype=torch.float64)).repeat(2, 2, 1, 1)
    AnatomicalEmbeddingLoss(size)([local, coarse], affine).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.local_head.parameters())


@pytest.mark.parametrize("spatial_dims, embed_dim", [(2, 7), (3, 5)])
def test_no_parameter_is_without_gradient(spatial_dims: int, embed_dim: int) -> None:
    """Else DistributedDataParallel would need its search for unused parameters; and no width is wired in."""
    net = small(spatial_dims, embed_dim)
    roi = (16, 32, 48)[-spatial_dims:]
    transform = RandPairedViews(roi, (0.8, 1.2), placement="seed").set_random_state(0)
    views = [transform(torch.rand(1, *(2 * r for r in roi))) for _ in range(2)]
    first, second, affine = (torch.stack(parts).as_subclass(Tensor) for parts in zip(*views))
    maps = net(first, second)
    assert maps[0].shape[1] == maps[1].shape[1] == embed_dim
    loss = AnatomicalEmbeddingLoss(roi, LocalPairSampler(16, negatives=(99, 50), exclusion_radius=5.0))
    loss(maps, affine).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_through_monais_engine() -> None:
    """Views and matrix as collated; the loss called with the list."""
    net, roi = small(), (32, 48)
    transform = RandPairedViews(roi, (0.8, 1.2), placement="seed").set_random_state(0)
    first, second, affine = (
        torch.stack(p).as_subclass(Tensor) for p in zip(*[transform(torch.rand(1, 70, 99)) for _ in range(3)])
    )
    batch = {"image": first, "image_2": second, "view_affine": affine}
    loss = AnatomicalEmbeddingLoss(roi, LocalPairSampler(16, negatives=(99, 50)), GlobalPairSampler(negatives=(9, 5)))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=[batch, batch], network=net,
        optimizer=torch.optim.SGD(net.parameters(), 0.02), loss_function=loss,
        prepare_batch=PrepareBatchTensor(label_key="view_affine", extra_keys=["image_2"]), decollate=False,
    ).run()  # fmt: skip
    assert loss.last_terms is not None
    moved = [name for name, t in net.named_parameters() if not torch.equal(before[name], t)]
    assert len(moved) == len(list(net.parameters()))


def test_autocast() -> None:
    net, x = small(), image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, merged = net(x), MergedEmbeddingNet.sharing(net)(x)
    for m in (*maps, merged):
        assert m.dtype == torch.float32
        torch.testing.assert_close(m.norm(dim=1), torch.ones_like(m[:, 0]))
    assert net.double()(x.double())[0].dtype == torch.float64


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AnatomicalEmbeddingNet, MergedEmbeddingNet])
def test_sizes_that_do_not_fit(cls: Any) -> None:
    net = cls.sharing(small())
    for size in ((32, 40), (30, 48), (4, 8)):  # the last is not even seen in the maps, of one cell
        with pytest.raises(ValueError, match="must be a multiple of the strides") as error:
            net(torch.rand(2, 1, *size))
        assert str((2, 1, *size)) in str(error.value)
    with pytest.raises(ValueError, match="2 spatial axes"):
        net(torch.rand(2, 1, 32, 32, 32))
    other = cls(Fixed((6, 9), (5, 3)), (2, 2), 2, 5, local_levels=(0,))
    with pytest.raises(ValueError, match=r"no multiple of the map \(5, 3\) of level -1"):
        other(torch.rand(1, 1, 12, 18))


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        small()(image(), image()[:1])
    with pytest.raises(TypeError, match="Identity returned Tensor"):
        AnatomicalEmbeddingNet(nn.Identity(), (1,), 2, local_levels=(0,))(image())
    with pytest.raises(ValueError, match=r"have \[2\] channels, channels=\[3\]"):
        AnatomicalEmbeddingNet(Fixed((16, 24)), (3,), 2, local_levels=(0,))(image())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"spatial_dims": 1}, "2 or 3, got 1"),
        ({"local_levels": (0, 4)}, r"local_levels \(0, 4\)"),
        ({"local_levels": (1, 0)}, r"local_levels \(1, 0\)"),
        ({"local_levels": ()}, "local_levels"),
        ({"global_level": 4}, "global_level 4 of 4 maps"),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnatomicalEmbeddingNet(nn.Identity(), (1, 2, 3, 4), **kwargs)
