# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_ssl.networks import ProjectionHead

VOCO = ("batch", {"affine": False, "track_running_stats": False})


def names(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head]


@pytest.mark.parametrize(
    "norm, spatial_dims, expected",
    [
        (VOCO, 0, ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]),
        ("batch", 2, ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]),
        ("batch", 3, ["Conv3d", "BatchNorm3d", "ReLU", "Conv3d", "BatchNorm3d", "ReLU", "Conv3d"]),
        ("instance", 3, ["Conv3d", "InstanceNorm3d", "ReLU", "Conv3d", "InstanceNorm3d", "ReLU", "Conv3d"]),
        (("group", {"num_groups": 2}), 0, ["Linear", "GroupNorm", "ReLU", "Linear", "GroupNorm", "ReLU", "Linear"]),
        (None, 0, ["Linear", "ReLU", "Linear", "ReLU", "Linear"]),
    ],
)
def test_layers(norm: object, spatial_dims: int, expected: list[str]) -> None:
    head = ProjectionHead((3, 4, 6, 5), norm=norm, spatial_dims=spatial_dims)
    assert names(head) == expected
    assert next(iter(head.state_dict())) == "0.weight"


def test_two_widths_are_one_layer() -> None:
    assert names(ProjectionHead((3, 5))) == ["Linear"]


@pytest.mark.parametrize("spatial_dims, size", [(0, ()), (2, (5, 6)), (3, (5, 6, 7))])
def test_shapes(spatial_dims: int, size: tuple[int, ...]) -> None:
    head = ProjectionHead((3, 4, 5), norm="batch", spatial_dims=spatial_dims)
    assert head(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_voxels_do_not_mix() -> None:
    """1x1 convolutions: a change of one voxel changes the output at that voxel only."""
    head = ProjectionHead((3, 4, 5), norm=None, spatial_dims=3)
    x = torch.rand(1, 3, 5, 6, 7)
    y = x.clone()
    y[..., 2, 3, 4] += 1
    changed = (head(x) != head(y)).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 3, 4]]


def test_without_bias() -> None:
    head = ProjectionHead((3, 4, 5), norm="batch", bias=False)
    assert head[0].bias is None
    assert head[-1].bias is None


@pytest.mark.parametrize(
    "channels, norm, spatial_dims, bias, parameters",
    [
        ((1152, 1024, 1024, 1024), VOCO, 0, True, 3_279_872),
        ((1152, 2048, 2048, 2048), VOCO, 0, True, 10_754_048),
        ((768, 2048, 2048, 2048), VOCO, 0, True, 9_967_616),
        ((496, 1024, 1024, 1024), VOCO, 0, True, 2_608_128),
        ((128, 1024, 256), "batch", 3, True, 396_544),  # PGL, projector and predictor
        ((256, 1024, 256), "batch", 3, True, 527_616),
        ((4608, 1024, 128), None, 0, False, 4_849_664),  # global contrast
        ((32, 32, 32), "batch", 2, False, 2_112),
    ],
)
def test_published_sizes(
    channels: tuple[int, ...], norm: object, spatial_dims: int, bias: bool, parameters: int
) -> None:
    with torch.device("meta"):
        head = ProjectionHead(channels, norm=norm, spatial_dims=spatial_dims, bias=bias)
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_equals_the_formula() -> None:
    """Linear, (h - mean) / sqrt(biased variance + 1e-5), ReLU, Linear: in train and, for VoCo's norm, in eval too."""
    head = ProjectionHead((3, 4, 2), norm=VOCO).double()
    x = torch.rand(6, 3, dtype=torch.float64)
    h = x @ head[0].weight.T + head[0].bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    expected = h.relu() @ head[3].weight.T + head[3].bias
    for mode in (True, False):
        torch.testing.assert_close(head.train(mode)(x), expected)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"channels": (4,)}, "at least an input and an output"),
        ({"channels": (4, 0, 4)}, "all positive"),
        ({"channels": (4, 4), "spatial_dims": 4}, "spatial_dims must be"),
        ({"channels": (4, 4, 4), "norm": "instance"}, "no meaning for vectors"),
        ({"channels": (4, 4, 4), "norm": ("INSTANCE", {"affine": True})}, "no meaning for vectors"),
    ],
)
def test_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionHead(**kwargs)


def test_scripts() -> None:
    head = ProjectionHead((3, 4, 5)).eval()
    x = torch.rand(2, 3)
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))
