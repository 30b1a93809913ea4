# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_fields import PERMUTED, ct, inside, resnet
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from torch import Tensor, nn

from monai_ssl.apps import embedding_transform
from monai_ssl.apps.registration.deform import register_deform
from monai_ssl.apps.registration.fields import jacobian_determinant
from monai_ssl.apps.registration.inner_step import on_grid
from monai_ssl.apps.registration.result import Registration
from monai_ssl.losses import RegistrationLoss, ncc_loss
from monai_ssl.networks import EmbeddingRegistrationNet, RegistrationUNet
from monai_ssl.transforms.view_geometry import transform_points, voxel_index

AFFINE = torch.tensor(
    [[1.05, 0.02, 0, 3], [-0.03, 0.95, 0.04, -2], [0, -0.02, 1.08, 4], [0, 0, 0, 1]], dtype=torch.float64
)
OBLIQUE = torch.tensor(
    [[1.2, -0.9, 0, 5], [0.9, 1.2, 0, -7], [0, 0, -3, 40], [0, 0, 0, 1]], dtype=torch.float64
)  # spacing 1.5, 1.5, 3 mm


class Known(RegistrationUNet):
    """Answers with random numbers, and keeps them and what it was shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"channels": (2, 2), "up_channels": (2, 2), **kwargs})

    def forward(self, image: Tensor, features: Tensor | None = None) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert type(image) is Tensor
        self.shown, self.features = image, features
        g = torch.Generator().manual_seed(5)
        self.field = torch.randn(1, self.spatial_dims, *image.shape[2:], generator=g)
        return self.field


def unchanged(image: MetaTensor) -> MetaTensor:
    return image


def image(affine: Tensor, size: tuple[int, ...], seed: int = 0) -> MetaTensor:
    return MetaTensor(torch.randn(1, *size, generator=torch.Generator().manual_seed(seed)) * 30, affine=affine)


def coarse_result(affine: Tensor, size: tuple[int, ...], moves: bool) -> Registration:
    """An affine, perhaps with displacements of some mm."""
    g = torch.Generator().manual_seed(2)
    d = 4 * F.avg_pool3d(torch.randn(1, 3, *size, generator=g), 5, 1, 2)[0] if moves else None
    matches = torch.rand(9, 2, 3, generator=g) * 20
    return Registration(
        AFFINE, d, affine, size, matches, torch.ones(9), {"counts": {"grid": 9}, "seconds": {"match": 1.0}}
    )


@pytest.mark.parametrize("moves", [False, True])
def test_the_displacement_acts_before_the_initial_one(moves: bool) -> None:
    """T(x) = T_initial(x + R v(x)) with v in voxels of the fixed image, R its oblique axes."""
    size = (9, 11, 10)
    fixed, moving = image(OBLIQUE, size), image(PERMUTED, (8, 7, 13), 1)
    initial, network = coarse_result(OBLIQUE, size, moves), Known()
    result = register_deform(network, moving, fixed, initial, transform=unchanged)
    nodes = transform_points(OBLIQUE, voxel_index(size).double())
    v = network.field[0, :, :9, :11, :10].reshape(3, -1).T.double() @ OBLIQUE[:3, :3].T
    near = initial if initial.displacement is None else initial.then_inner(v.T.reshape(3, *size))
    truth = transform_points(AFFINE, nodes + v) if not moves else near.map_points(nodes)
    torch.testing.assert_close(result.map_points(nodes), truth, atol=1e-4, rtol=0)
    assert torch.equal(result.affine, AFFINE)
    assert result.grid_size == size


def test_what_the_network_is_shown() -> None:
    """The moving image where the initial result puts it, the fixed one, both from [-800, 400] HU to [-1, 1], padded."""
    size = (9, 11, 10)
    fixed, moving = image(OBLIQUE, size), image(PERMUTED, (8, 7, 13), 1)
    initial, network = coarse_result(OBLIQUE, size, True), Known()
    register_deform(network, moving, fixed, initial, transform=unchanged)
    pair = torch.cat([initial.warp(moving, like=fixed).as_tensor(), fixed.as_tensor()])
    expected = ((pair + 36.05) / (38.67 + 36.05) * 2 - 1).clamp(-1, 1)
    assert network.shown.shape == (1, 2, 12, 12, 12)
    torch.testing.assert_close(network.shown[0, :, :9, :11, :10], expected, atol=1e-5, rtol=0)
    assert torch.equal(network.shown[0, :, 9:], network.shown[0, :, 8:9].expand(-1, 3, -1, -1))
    assert torch.equal(network.shown[..., 10:], network.shown[..., 9:10].expand(*[-1] * 4, 2))
    register_deform(network, moving, fixed, initial, transform=unchanged, window=None)
    torch.testing.assert_close(network.shown[0, :, :9, :11, :10], pair)


def test_without_an_initial_result_both_images_lie_in_one_world() -> None:
    fixed, network = image(OBLIQUE, (9, 11, 10)), Known()
    result = register_deform(network, fixed, fixed, transform=unchanged, window=None)
    torch.testing.assert_close(network.shown[:, 0], network.shown[:, 1], atol=1e-4, rtol=0)
    assert torch.equal(result.affine, torch.eye(4).double())
    assert result.points.shape == (0, 2, 3)
    torch.testing.assert_close(result.ddf()[0], network.field[0, :, :9, :11, :10], atol=1e-4, rtol=0)


def test_an_initial_result_on_another_grid() -> None:
    """A displacement that is linear in space is the same on any grid; beyond its grid it ends."""
    linear = torch.tensor([[0.1, 0.05, 0], [0, -0.1, 0.02], [0.03, 0, 0.1]], dtype=torch.float64)
    wide = torch.diag(torch.tensor([4.0, 4, 4, 1], dtype=torch.float64))
    wide[:3, 3] = -60
    size = (30, 32, 34)
    d = (linear @ transform_points(wide, voxel_index(size).double()).T).reshape(3, *size)
    initial = Registration(AFFINE, d, wide, size, torch.zeros(0, 2, 3), torch.zeros(0), {})
    placed = on_grid(initial, OBLIQUE, (9, 11, 10))
    assert placed.grid_size == (9, 11, 10)
    points = inside(OBLIQUE, (8, 10, 9), 50, 0.1)
    expected = transform_points(AFFINE, points + points @ linear.T)
    torch.testing.assert_close(initial.map_points(points), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(placed.map_points(points), expected, atol=1e-4, rtol=0)


def test_default_transform_is_that_of_the_embedder() -> None:
    """1 mm in, 2 mm in SPL order out; -200 HU lie in the middle of the window."""
    affine = torch.diag(torch.tensor([1.0, 1, 1, 1], dtype=torch.float64))
    fixed = MetaTensor(torch.full((1, 13, 17, 21), -200.0), affine=affine)
    network = Known()
    result = register_deform(network, fixed, fixed)
    assert result.grid_size == tuple(embedding_transform()(fixed).shape[1:])
    assert result.grid_size[0] == 11
    torch.testing.assert_close(network.shown, torch.zeros_like(network.shown), atol=2e-4, rtol=0)


def test_report() -> None:
    size = (9, 11, 10)
    fixed, initial = image(OBLIQUE, size), coarse_result(OBLIQUE, size, False)
    result = register_deform(Known(), image(PERMUTED, (8, 7, 13)), fixed, initial, transform=unchanged)
    residual = (result.map_points(initial.points[:, 0]) - initial.points[:, 1]).norm(dim=1)
    assert result.report["counts"] == {"grid": 9}
    assert result.report["residual_mean_mm"] == pytest.approx(residual.mean().item())
    assert result.report["residual_median_mm"] == pytest.approx(residual.median().item())
    voxels = torch.einsum("ij,j...->i...", torch.linalg.inv(OBLIQUE[:3, :3]), result.displacement.double())
    share = (jacobian_determinant(voxels[None]) <= 0).double().mean()
    assert 0.05 < share < 0.9  # random numbers of a voxel fold
    assert result.report["folding_share"] == pytest.approx(share.item(), abs=1e-6)
    assert set(result.report["seconds"]) == {"match", "deform"}
    assert initial.report["seconds"] == {"match": 1.0}


def test_sizes_fit_the_embedder_too() -> None:
    """The U-Net needs multiples of 4, the embedder of (4, 16, 16); it is shown the images on its own scale."""
    shown = []
    embedder = resnet()
    embedder.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    network = EmbeddingRegistrationNet(embedder, Known(feature_channels=27))
    network.train()
    fixed, moving = ct(0, (19, 24, 22)), ct(1, (18, 25, 20))
    result = register_deform(network, moving, fixed)
    assert network.training
    assert network.unet.training
    assert not network.embedder.training
    prepared = embedding_transform()(fixed)
    assert result.grid_size == tuple(prepared.shape[1:]) == (22, 24, 19)
    assert network.unet.shown.shape == (1, 2, 24, 32, 32)
    torch.testing.assert_close(shown[1][0, :, :22, :24, :19], prepared.as_tensor(), atol=1e-4, rtol=0)
    assert network.unet.shown.abs().max() <= 1
    assert network.unet.features.shape == (1, 27, 12, 16, 16)


def test_a_trained_network_registers() -> None:
    """2D, trained on this pair with `integration_steps=0`: sign, axes and units agree from end to end."""
    x, y = (torch.arange(n).float() for n in (32, 24))
    pattern = lambda s, t: torch.sin((x[:, None] + s) / 2.5) * torch.cos((y + t) / 3)[None]
    grid = torch.tensor([[0, -1.5, 9], [2.0, 0, 4], [0, 0, 1]], dtype=torch.float64)
    moving, fixed = (MetaTensor(pattern(*s)[None], affine=grid) for s in ((0.0, 0.0), (1.2, -0.8)))
    torch.manual_seed(0)
    settings = {"channels": (4, 6), "up_channels": (6, 6, 4)}
    net = RegistrationUNet(2, integration_steps=0, **settings)
    loss, optimiser = RegistrationLoss(smoothness_weight=0.3), torch.optim.Adam(net.parameters(), lr=1e-2)
    pair = [v.as_tensor()[None] for v in (moving, fixed)]
    for _ in range(60):
        optimiser.zero_grad()
        loss(net(torch.cat(pair, 1)), {"moving": pair[0], "fixed": pair[1]}).backward()
        optimiser.step()
    trained = RegistrationUNet(2, **settings)
    trained.load_state_dict(net.state_dict())
    result = register_deform(trained, moving, fixed, transform=unchanged, window=None)
    points = inside(grid, (32, 24), 100, 0.3)
    truth = points + (grid[:2, :2] @ torch.tensor([1.2, -0.8]).double())
    before, after = ((p - truth).norm(dim=1).mean() for p in (points, result.map_points(points)))
    assert after < 0.35 * before
    warped = result.warp(moving, like=fixed).as_tensor()
    assert ncc_loss(warped[None], pair[1]) < 0.1 * ncc_loss(*pair)
    with torch.no_grad(), pytest.warns(UserWarning, match="native grid_sample"):
        expected = Warp()(pair[0], trained(torch.cat(pair, 1)))
    torch.testing.assert_close(warped[None], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "network, error, message",
    [
        (Known(integration_steps=0), ValueError, "integration_steps=7"),
        (Known(feature_channels=27), ValueError, "EmbeddingRegistrationNet"),
        (nn.Identity(), TypeError, "Identity"),
    ],
)
def test_networks_are_checked(network: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        register_deform(network, ct(), ct())


def test_images_are_checked(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.nii"):
        register_deform(Known(), tmp_path / "none.nii", ct())
    spoiled = ct()
    spoiled[0, 3, 4, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        register_deform(Known(), spoiled, ct())
    with pytest.raises(ValueError, match=r"transform must give .* \(2, "):
        register_deform(Known(), ct().repeat(2, 1, 1, 1), ct())
    with pytest.raises(ValueError, match="transform must give"):
        register_deform(Known(), ct(), ct(), transform=lambda x: x.as_tensor())
