# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings

import pytest
import torch
from monai.networks.nets import SegResNetDS, SwinUNETR, UNet
from torch import nn

from monai_ssl.networks import EncoderFeatures, SwinUNETREncoder, UNetEncoder


class Levels(nn.Module):
    """Three maps that are filled with their index."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.full((x.shape[0], 2, 4 - i), float(i)) for i in range(3)]


@pytest.mark.parametrize("level, value", [(-1, 2), (0, 0), (1, 1), (-3, 0)])
def test_picks_the_level(level: int, value: int) -> None:
    out = EncoderFeatures(Levels(), level)(torch.zeros(5, 1, 8))
    assert out.shape == (5, 2, 4 - value)
    assert out.unique().tolist() == [value]


def test_default_is_the_coarsest_and_keys_have_the_prefix() -> None:
    encoder = UNetEncoder(UNet(3, 1, 2, (4, 8), (2,)))
    features = EncoderFeatures(encoder)
    assert features.encoder is encoder
    assert list(features.state_dict()) == [f"encoder.{name}" for name in encoder.state_dict()]
    x = torch.rand(1, 1, 10, 12, 14)
    assert torch.equal(features(x), encoder(x)[-1])


@pytest.mark.parametrize("level", [3, -4])
def test_level_out_of_range(level: int) -> None:
    with pytest.raises(ValueError, match=rf"level {level} of 3 maps of Levels"):
        EncoderFeatures(Levels(), level)(torch.zeros(5, 1, 8))


def test_an_encoder_that_returns_a_tensor_is_refused() -> None:
    """Indexing the tensor would give the last item of the batch and go unnoticed."""
    with pytest.raises(TypeError, match="Conv1d returned Tensor, expected a list of maps"):
        EncoderFeatures(nn.Conv1d(1, 2, 3))(torch.zeros(5, 1, 8))


@pytest.mark.parametrize("level", [0, -1])
@pytest.mark.parametrize(
    "encoder",
    [UNetEncoder(UNet(3, 1, 2, (4, 8), (2,))), SegResNetDS(init_filters=8, blocks_down=(1, 1)).encoder],
    ids=["adapter", "MONAI encoder"],
)
def test_scripts(encoder: nn.Module, level: int) -> None:
    features, x = EncoderFeatures(encoder, level).eval(), torch.rand(1, 1, 10, 12, 14)
    torch.testing.assert_close(torch.jit.script(features)(x), features(x))


def test_traces_where_the_encoder_does_not_script() -> None:
    net = SwinUNETR(1, 2, depths=(1, 1, 1, 1), feature_size=12, spatial_dims=2)
    features, x = EncoderFeatures(SwinUNETREncoder(net)).eval(), torch.rand(1, 1, 64, 96)
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's shape arithmetic
        traced = torch.jit.trace(features, x, check_trace=False)
    torch.testing.assert_close(traced(x), features(x))
