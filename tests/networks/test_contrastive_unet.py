# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.networks.nets import BasicUNet, SegResNet, UNet
from torch import nn

from monai_ssl.data import PrepareSliceBatch
from monai_ssl.losses import PartitionContrastiveLoss, RegionContrastiveLoss, published_regions, region_starts
from monai_ssl.networks import (
    ContrastiveUNet,
    UNetFeatures,
    load_pretrained,
    read_provenance,
    save_pretrained,
    trained_prefixes,
    unet_features,
    unet_stages,
)

PLANE = (64, 80)


def unet(seed: int = 0, channels: tuple[int, ...] = (4, 6, 8), **kwargs: Any) -> UNet:
    torch.manual_seed(seed)
    return UNet(2, 1, 3, channels, (2,) * (len(channels) - 1), **{"num_res_units": 1, "norm": "batch", **kwargs})


def build(network: nn.Module, blocks: int = 0, plane: Any = PLANE, **kwargs: Any) -> ContrastiveUNet:
    return ContrastiveUNet(network, plane, blocks, hidden_channels=10, out_channels=7, **kwargs)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def under(state: dict[str, torch.Tensor], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith(tuple(f"{n}." for n in names))}


def image(num: int = 4, plane: tuple[int, int] = PLANE, seed: int = 1) -> torch.Tensor:
    return torch.rand(num, 1, *plane, generator=torch.Generator().manual_seed(seed))


# ---- what comes out


def test_stage_1() -> None:
    net, x = build(unet()).eval(), image()
    assert net(x).shape == (4, 7)
    bottleneck = unet_features(net.network, x)
    assert bottleneck.shape == (4, 8, 16, 20)
    assert torch.equal(net(x), net.g1(bottleneck.flatten(1)))
    assert net.g1[0].in_features == 8 * 16 * 20
    assert [m.bias for m in net.g1 if isinstance(m, nn.Linear)] == [None, None]


def test_stage_1_pooled_takes_any_plane() -> None:
    net = build(unet(), pool=True).eval()
    assert net.g1[0].in_features == 8
    for plane in (PLANE, (32, 48), (40, 36)):
        x = image(2, plane)
        torch.testing.assert_close(net(x), net.g1(unet_features(net.network, x).mean((2, 3))))


@pytest.mark.parametrize("region_size, regions", [(1, "lattice"), (3, "lattice"), (3, "published")])
def test_stage_2_is_a_convolution_read_at_the_starts(region_size: int, regions: str) -> None:
    net, x = build(unet(), 1, region_size=region_size, regions=regions).eval().double(), image().double()
    features = net.g2(unet_features(net.network, x, 1))
    size = tuple(features.shape[2:])
    assert size == (32, 40)
    starts = region_starts(size, region_size) if regions == "lattice" else published_regions(size)[0]
    weight = net.dense.weight.unflatten(1, (features.shape[1], region_size, region_size))
    expected = F.conv2d(features, weight)[:, :, starts[:, 0], starts[:, 1]].transpose(1, 2)
    assert net(x).shape == (4, 13 if regions == "lattice" else 17, 7)
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)
    assert RegionContrastiveLoss(regions=regions)(net(x), torch.tensor([0, 0, 1, 1])).isfinite()


def test_stage_2_of_other_planes() -> None:
    """Only with pool, as in stage 1; the places follow the map."""
    net = build(unet(), 1, pool=True).eval()
    assert net(image(2, (32, 64))).shape == (2, 13, 7)
    with pytest.raises(ValueError, match=r"map after 1 decoder blocks has \(14, 32\) cells.*3 need 15"):
        net(image(2, (28, 64)))


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4])
def test_basic_unet(blocks: int) -> None:
    network = BasicUNet(2, 1, 3, (4, 4, 4, 4, 4, 4), norm="batch")
    region_size = 1 if blocks < 3 else 3
    net = build(network, blocks, (64, 80), region_size=region_size)
    assert net(image(2)).shape == ((2, 13, 7) if blocks else (2, 7))


def test_3d() -> None:
    network = UNet(3, 1, 2, (4, 6, 8), (2, 2), norm="batch")
    assert build(network, plane=(12, 16, 20))(torch.rand(2, 1, 12, 16, 20)).shape == (2, 7)
    assert build(network, 1, (12, 16, 20), region_size=1)(torch.rand(2, 1, 12, 16, 20)).shape == (2, 35, 7)


def test_published_counts() -> None:
    network = UNet(2, 1, 4, (16, 32, 64, 128, 128, 128), (2,) * 5, num_res_units=2, norm="BATCH", act="RELU")
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(ContrastiveUNet(network, 192).g1) == 4_849_664
    net = ContrastiveUNet(network, 192, 3)
    assert (count(net.g2), count(net.dense)) == (2_112, 36_864)


# ---- what is trained


@pytest.mark.parametrize("network", [unet, lambda: BasicUNet(2, 1, 3, (4, 4, 4, 4, 4, 4), norm="batch")])
@pytest.mark.parametrize("blocks", [0, 1])
def test_exactly_the_trained_part_has_gradients(network: Callable[[], nn.Module], blocks: int) -> None:
    net = build(network(), blocks, region_size=1)
    net(image()).square().mean().backward()
    stages = unet_stages(net.network)
    trained = tuple(f"network.{name}." for name in (stages.decoder[:blocks] if blocks else stages.encoder))
    for name, parameter in net.named_parameters():
        expected = name.startswith((*trained, "g1.", "g2.", "dense."))
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name


def test_next_stage_of_the_same_network() -> None:
    """Built one after the other around one network, each stage trains its own part."""
    network = unet()
    build(network)
    net = build(network, 1)
    assert [name for name, p in net.network.named_parameters() if p.requires_grad] == [
        name for name, _ in network.named_parameters() if name.startswith("model.1.submodule.2.")
    ]


def test_building_leaves_the_network_as_it_is() -> None:
    network = unet()
    network.model[0].eval()
    before, modes = snapshot(network), [module.training for module in network.modules()]
    net = build(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert net.network is network


def batch(num: int = 4) -> dict[str, Any]:
    return {
        "image": image(2 * num).unflatten(0, (num, 2)),
        "partition": torch.arange(num) % 2,
        "volume": torch.arange(num) // 2,
        "slice_index": 3 * torch.arange(num),
    }


def run_trainer(net: ContrastiveUNet, loss: nn.Module, iterations: int = 2) -> None:
    trained = [p for p in net.parameters() if p.requires_grad]
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch()] * iterations,
        network=net,
        optimizer=torch.optim.AdamW(trained, 1e-2, weight_decay=0.1),
        loss_function=lambda z, ids: loss(z, **ids),
        prepare_batch=PrepareSliceBatch(),
        decollate=False,
    ).run()


@pytest.mark.parametrize("network", [unet, lambda: BasicUNet(2, 1, 3, (4, 4, 4, 4, 4, 4), norm="batch")])
def test_frozen_encoder_is_bit_identical(network: Callable[[], nn.Module]) -> None:
    """Weights and all buffers, through MONAI's trainer, which calls train() at every iteration."""
    net = build(network(), 1, region_size=1)
    before, stages = snapshot(net.network), unet_stages(net.network)
    run_trainer(net, RegionContrastiveLoss("LD", region_size=1, matched_negatives=True))
    after = net.network.state_dict()
    assert any("num_batches_tracked" in name for name in under(before, stages.encoder))
    for name, value in under(before, stages.encoder + stages.decoder[1:] + stages.head).items():
        assert torch.equal(after[name], value), name
    for name, value in under(before, stages.decoder[:1]).items():
        assert not torch.equal(after[name], value), name
    assert net.training
    assert net.g2.training
    assert not any(m.training for name in stages.encoder for m in net.network.get_submodule(name).modules())


def test_stage_1_trains_the_encoder_alone() -> None:
    net = build(unet())
    before, stages = snapshot(net.network), unet_stages(net.network)
    run_trainer(net, PartitionContrastiveLoss())
    after = net.network.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in under(before, stages.encoder).items())
    assert all(torch.equal(after[name], value) for name, value in under(before, stages.decoder).items())
    assert all(m.training for m in net.modules())


def test_no_graph_in_the_frozen_encoder() -> None:
    net = build(unet(), 1)
    kept: list[bool] = []
    for name in unet_stages(net.network).encoder:
        net.network.get_submodule(name).register_forward_hook(lambda m, i, out: kept.append(out.requires_grad))
    net(image())
    assert kept == [False] * 3


# ---- the files between the stages


def stage_file(net: ContrastiveUNet, file: Path) -> Path:
    prefixes = trained_prefixes(net.network, net.num_decoder_blocks)
    provenance = {"method": "global_local_contrast", "num_decoder_blocks": net.num_decoder_blocks}
    return save_pretrained(net.network, file, provenance, include=prefixes)


def remaining(network: nn.Module, blocks: int) -> list[str]:
    stages = unet_stages(network)
    return [*stages.decoder[blocks:], *stages.head]


@pytest.mark.parametrize("blocks", [0, 1])
def test_stage_files_hold_the_trained_prefixes(blocks: int, tmp_path: Path) -> None:
    net = build(unet(), blocks)
    run_trainer(net, RegionContrastiveLoss() if blocks else PartitionContrastiveLoss())
    file = stage_file(net, tmp_path / "unet.pt")
    prefixes = trained_prefixes(net.network, blocks)
    saved = torch.load(file, weights_only=True)
    assert list(saved) == [name for name in net.network.state_dict() if name.startswith(tuple(prefixes))]
    provenance = read_provenance(file)
    assert (provenance["prefixes"], provenance["num_decoder_blocks"]) == (prefixes, blocks)
    network = unet(seed=5)
    before = snapshot(network)
    report = load_pretrained(network, file, exclude=remaining(network, blocks))
    assert report.loaded == list(saved)
    after = network.state_dict()
    assert all(torch.equal(after[name], saved[name]) for name in saved)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in saved)


def test_what_is_absent_must_be_named(tmp_path: Path) -> None:
    """An untrained decoder block does not pass for a trained one, nor a damaged file for a whole one."""
    encoder = stage_file(build(unet()), tmp_path / "encoder.pt")
    decoder = stage_file(build(unet(), 1), tmp_path / "decoder.pt")
    for file, exclude in ((encoder, ()), (encoder, remaining(unet(), 1)), (decoder, ())):
        with pytest.raises(ValueError, match="nothing was loaded, the file does not fit"):
            load_pretrained(unet(), file, exclude=exclude)
    state = torch.load(decoder, weights_only=True)
    del state["model.1.submodule.2.0.conv.weight"]
    torch.save(state, decoder)
    with pytest.raises(ValueError, match=r"missing +1  model\.1\.submodule\.2\.0\.conv\.weight"):
        load_pretrained(unet(), decoder, exclude=remaining(unet(), 1))


def test_heads_do_not_travel(tmp_path: Path) -> None:
    net = build(unet())
    file = save_pretrained(net, tmp_path / "all.pt", {})
    with pytest.raises(ValueError, match="g1"):
        load_pretrained(unet(), file)


@pytest.mark.parametrize("include, message", [(["model.0", "conv"], r"include=\['conv'\]"), ([], r"include=\[\]")])
def test_include_must_match(include: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message + " matches nothing in UNet"):
        save_pretrained(unet(), tmp_path / "unet.pt", {}, include=include)
    assert not list(tmp_path.iterdir())


def test_features_survive_the_way_to_fine_tuning(tmp_path: Path) -> None:
    """Stage 1, its file, stage 2, its file, a new network: the statistics of the norms come along."""
    first = build(unet())
    run_trainer(first, PartitionContrastiveLoss())
    network = unet(seed=3)
    load_pretrained(network, stage_file(first, tmp_path / "encoder.pt"), exclude=remaining(network, 0))
    second, x = build(network, 1), image(3, seed=8)
    assert torch.equal(unet_features(first.eval().network, x), unet_features(second.eval().network, x))
    run_trainer(second, RegionContrastiveLoss(matched_negatives=True))
    assert torch.equal(unet_features(first.network, x), unet_features(second.eval().network, x))
    final = unet(seed=4)
    load_pretrained(final, stage_file(second, tmp_path / "decoder.pt"), exclude=remaining(final, 1))
    for blocks in (0, 1):
        assert torch.equal(unet_features(final.eval(), x, blocks), unet_features(second.network, x, blocks))
    assert all(p.requires_grad for p in final.parameters())


def test_network_def_holds_a_part_of_its_keys(tmp_path: Path) -> None:
    network = unet()
    net = build(network, 1)
    model = UNetFeatures(network, 1)
    assert set(model.state_dict()) == {name for name in net.state_dict() if name.startswith("network.")}
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load_pretrained(unet(seed=9), tmp_path / "model.pt")


# ---- refusals, and what any network can do


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_decoder_blocks must be between 0 and 1 for this UNet, got 2"):
        build(unet(), 2)  # the last block yields the logits
    with pytest.raises(ValueError, match="between 0 and 4 for this BasicUNet, got 5"):
        build(BasicUNet(2, 1, 2, (4,) * 6), 5)
    with pytest.raises(ValueError, match=r"plane_size \(64, 78\) must be a multiple of .* stride \(4, 4\)"):
        build(unet(), plane=(64, 78))
    with pytest.raises(ValueError, match=r"map after 1 decoder blocks has \(14, 32\) cells, regions of 3 need 15"):
        build(unet(), 1, plane=(28, 64))
    with pytest.raises(ValueError, match="regions must be one of lattice, published"):
        build(unet(), regions="grid")
    with pytest.raises(ValueError, match="3 for published regions"):
        build(unet(), 1, region_size=2, regions="published")
    for blocks in (0, 1):
        with pytest.raises(ValueError, match=r"input \(4, 1, 64, 64\) must be .* plane of \(64, 80\)"):
            build(unet(), blocks)(image(4, (64, 64)))
    with pytest.raises(TypeError, match=r"got monai\.networks\.nets\.segresnet\.SegResNet"):
        build(SegResNet(2))


@pytest.mark.parametrize("blocks", [0, 1])
def test_copies_and_short_name(blocks: int) -> None:
    net, x = build(unet(), blocks).eval(), image()
    for copy in (pickle.loads(pickle.dumps(net)), deepcopy(net)):
        assert torch.equal(copy(x), net(x))
    network = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    network |= {"channels": [4, 6, 8], "strides": [2, 2], "norm": "batch"}
    config = {"_target_": "ContrastiveUNet", "network": network, "plane_size": [64, 80], "num_decoder_blocks": blocks}
    parser = ConfigParser({"imports": ["$import monai_ssl"], "it": config})
    assert type(parser.get_parsed_content("it")) is ContrastiveUNet


@pytest.mark.parametrize("blocks", [0, 1])
def test_descent(blocks: int) -> None:
    net = build(unet(), blocks)
    loss = RegionContrastiveLoss(matched_negatives=True) if blocks else PartitionContrastiveLoss()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    x, ids = PrepareSliceBatch()(batch())
    values = []
    for _ in range(20):
        value = loss(net(x), **ids)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
