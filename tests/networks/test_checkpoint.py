# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.nets import BasicUNet, DynUNet, SegResNetDS, SwinUNETR, UNet
from torch import nn

import monai_ssl
from monai_ssl.networks import (
    DynUNetEncoder,
    EncoderFeatures,
    SwinUNETREncoder,
    UNetEncoder,
    VoCoNet,
    load_pretrained,
    make_provenance,
    read_provenance,
    save_pretrained,
)

PROVENANCE = {"method": "VoCo", "settings": {"lr": 1e-4, "roi_size": [12, 14, 16]}, "num_volumes": 3}
NET = {"in_channels": 1, "out_channels": 2, "channels": (4, 6, 8), "strides": (2, 2), "num_res_units": 2}


def unet(**changes) -> UNet:
    return UNet(2, **{**NET, "norm": "batch", **changes})


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_pretrained(UNetEncoder(unet()), tmp_path / "encoder.pt", PROVENANCE)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_fills_the_network_and_reports(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = unet()
    before, saved = snapshot(net), torch.load(file, weights_only=True)
    with caplog.at_level(logging.INFO, logger="monai_ssl"):
        report = load_pretrained(UNetEncoder(net), file)
    after = net.state_dict()
    assert report.loaded == list(saved)
    assert report.missing + report.unexpected + report.shape + report.excluded + report.inflated == []
    assert all(torch.equal(after[name], saved[name]) for name in saved)
    assert not torch.equal(after["model.0.residual.weight"], before["model.0.residual.weight"])
    assert all(torch.equal(after[name], before[name]) for name in before if name not in saved)  # decoder
    assert str(file) in caplog.text
    assert f"loaded     {len(saved):>5}" in caplog.text


def rewrite(file: Path, change: Callable[[OrderedDict], object]) -> None:
    """Replace the file by what ``change`` returns, or leaves behind."""
    state = torch.load(file, weights_only=True)
    result = change(state)
    torch.save(state if result is None else result, file)


WEIGHT, BOTTOM = "model.0.conv.unit0.conv.weight", "model.1.submodule.1.submodule.residual.bias"
WRONG = {
    "other network": (
        lambda s: BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)).state_dict(),
        r"(?s)unexpected .*conv_0.*checkpoint of another network: its keys begin with .*conv_0.*model\.0",
    ),
    "unknown prefix": (
        lambda s: {f"model.{name}": t for name, t in s.items()},
        r"(?s)missing .*another network: its keys begin with \['model\.model\.0",
    ),
    "one tensor missing": (
        lambda s: {n: t for n, t in s.items() if n != BOTTOM},
        rf"missing +1  {BOTTOM}\n.*exclude=\['{BOTTOM}'\]",
    ),
    "one tensor more": (
        lambda s: s.update({"head.weight": torch.zeros(2)}),
        r"unexpected +1  head\.weight\n.*exclude=\['head'\]",
    ),
    "shape": (
        lambda s: s.update({BOTTOM: torch.zeros(9)}),
        rf"shape +1  {BOTTOM} \(9,\) in the file, \(8,\) in the network\n.*other arguments",
    ),
    "input channels": (
        lambda s: UNetEncoder(unet(in_channels=3)).state_dict(),
        rf"{WEIGHT} \(4, 3, 3, 3\) in the file, \(4, 1, 3, 3\) in the network.*\n.*in_channels='inflate'",
    ),
    "no tensor": (lambda s: s.update({BOTTOM: 3}), rf"{BOTTOM} int in the file"),
    "full training checkpoint": (
        lambda s: {"model": VoCoNet(UNetEncoder(unet()), 18, 4, 4).state_dict(), "optimizer": {"state": {}}},
        r"part of the file fits, leave out the rest: exclude=\['projector', 'teacher_projector'\]",
    ),
    "several networks": (lambda s: {"model": s, "network": s}, r"several of \['model', 'network'\]"),
    "no state dict": (lambda s: {"epoch": 3}, r"no single state dict.*\['epoch'\]"),
    "a tensor": (lambda s: torch.zeros(3), r"holds Tensor, expected a state dict"),
    "code": (lambda s: {"model": s, "args": Path("x")}, r"cannot be read as a checkpoint.*weights_only"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_file_says_what_is_wrong_and_changes_nothing(file: Path, change: Callable, message: str) -> None:
    net = unet()
    before = snapshot(net)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(UNetEncoder(net), file)
    assert str(file) in str(error.value)
    assert equal(snapshot(net), before)


@pytest.mark.parametrize("damage", ["truncated", "cut header", "text", "empty"])
def test_unreadable_file_is_named(file: Path, damage: str) -> None:
    content = file.read_bytes()
    parts = {"truncated": content[: len(content) // 2], "cut header": content[:3], "text": b"a,b\n1,2\n", "empty": b""}
    file.write_bytes(parts[damage])
    with pytest.raises(ValueError, match=r"encoder\.pt cannot be read as a checkpoint: it is truncated"):
        load_pretrained(UNetEncoder(unet()), file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_provenance(file)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_pretrained(unet(), tmp_path / "nowhere.pt")


def test_a_wrong_last_tensor_leaves_the_network_as_it_was(file: Path) -> None:
    """The last tensor of the file is wrong: the ones before it must not have been written."""
    rewrite(file, lambda s: s.update({list(s)[-1]: torch.zeros(99)}))
    net = unet()
    before = snapshot(net)
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_pretrained(UNetEncoder(net), file)
    assert equal(snapshot(net), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"module.{name}": t for name, t in s.items()},
        lambda s: {f"encoder.{name}": t for name, t in s.items()},
        lambda s: {f"module.network.encoder.{name}": t for name, t in s.items()},
        lambda s: {"state_dict": s, "epoch": 7},
        lambda s: {"state_dict": {"model": {f"backbone.{name}": t for name, t in s.items()}}, "epoch": 7},
    ],
    ids=["module", "encoder", "three", "state_dict", "nested twice"],
)
def test_known_wrappings_are_taken_off(file: Path, change: Callable) -> None:
    saved = torch.load(file, weights_only=True)
    rewrite(file, change)
    encoder = UNetEncoder(unet())
    assert len(load_pretrained(encoder, file).loaded) == len(saved)
    assert all(torch.equal(t, saved[name]) for name, t in encoder.state_dict().items())


def test_a_prefix_on_some_keys_only_is_no_wrapping(file: Path) -> None:
    rewrite(file, lambda s: {("module." if i else "") + name: t for i, (name, t) in enumerate(s.items())})
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_pretrained(UNetEncoder(unet()), file)


def test_model_pt_and_encoder_pt_fill_the_same(tmp_path: Path) -> None:
    encoder = UNetEncoder(unet())
    torch.save(EncoderFeatures(encoder).state_dict(), tmp_path / "model.pt")
    net, features = unet(), EncoderFeatures(UNetEncoder(unet()))
    load_pretrained(UNetEncoder(net), tmp_path / "model.pt")
    load_pretrained(features, tmp_path / "model.pt")
    assert equal(UNetEncoder(net).state_dict(), encoder.state_dict())
    assert equal(features.encoder.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DDP"])
def test_encoder_of_a_training_checkpoint(tmp_path: Path, prefix: str) -> None:
    pretext = VoCoNet(UNetEncoder(unet()), 18, 4, 4)
    weights = {prefix + name: t for name, t in pretext.state_dict().items()}
    torch.save({"network": weights, "trainer": {"iteration": 4}}, tmp_path / "resume.pt")
    encoder = UNetEncoder(unet())
    report = load_pretrained(encoder, tmp_path / "resume.pt", exclude=["projector", "teacher_projector"])
    assert equal(encoder.state_dict(), pretext.encoder.state_dict())
    excluded = {name.removeprefix(prefix).split(".")[0] for name in report.excluded}
    assert excluded == {"projector", "teacher_projector"}


def test_released_key_dialect(tmp_path: Path) -> None:
    """VoCo's released files: ``backbone.`` and ``swin_vit`` for ``swinViT``; and back, for a network that says so."""
    make = lambda: SwinUNETR(1, 2, depths=(1, 1, 1, 1), feature_size=12, use_v2=True, spatial_dims=2)
    encoder, file = SwinUNETREncoder(make()), tmp_path / "released.pt"
    released = {f"backbone.{n.replace('swinViT', 'swin_vit')}": t for n, t in encoder.state_dict().items()}
    torch.save({"state_dict": released}, file)
    other = SwinUNETREncoder(make())
    load_pretrained(other, file)
    assert equal(other.state_dict(), encoder.state_dict())

    old = nn.ModuleDict({"swin_vit": make().swinViT})
    torch.save(nn.ModuleDict({"swinViT": encoder.swinViT}).state_dict(), file)
    load_pretrained(old, file)
    assert equal(old["swin_vit"].state_dict(), encoder.swinViT.state_dict())


# ---- exclude --------------------------------------------------------------------------------------------------------


def test_exclude_leaves_the_decoder_alone(file: Path) -> None:
    net = unet()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"exclude=\['model\.1\.submodule\.2', 'model\.2'\]"):
        load_pretrained(net, file)
    report = load_pretrained(net, file, exclude=("model.1.submodule.2", "model.2."))
    saved = torch.load(file, weights_only=True)
    assert report.excluded == [name for name in before if name not in saved]
    assert all(torch.equal(net.state_dict()[name], saved.get(name, before[name])) for name in before)


def test_exclude_works_on_both_sides_at_dots(file: Path) -> None:
    net = unet()
    before = snapshot(net)
    report = load_pretrained(UNetEncoder(net), file, exclude="model.0.conv")
    assert set(report.excluded) == {name for name in before if name.startswith("model.0.conv.")}
    assert torch.equal(net.state_dict()[WEIGHT], before[WEIGHT])
    assert not torch.equal(net.state_dict()["model.0.residual.weight"], before["model.0.residual.weight"])


def test_exclude_takes_a_whole_name(file: Path) -> None:
    net = unet()
    before = snapshot(net)
    assert load_pretrained(UNetEncoder(net), file, exclude=[WEIGHT]).excluded == [WEIGHT, WEIGHT]  # network, file
    assert torch.equal(net.state_dict()[WEIGHT], before[WEIGHT])


@pytest.mark.parametrize("prefix", ["model.0.con", "decoder", ""])
def test_exclude_that_matches_nothing(file: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        load_pretrained(UNetEncoder(unet()), file, exclude=[prefix])


def test_nothing_loaded_is_an_error(file: Path) -> None:
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_pretrained(UNetEncoder(unet()), file, exclude=["model"])


def test_tensors_with_two_names(tmp_path: Path) -> None:
    """DynUNet lists its blocks a second time as ``skip_layers``: filled once is filled."""
    make = lambda: DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8])
    source, net = make(), make()
    file = save_pretrained(DynUNetEncoder(source), tmp_path / "encoder.pt", {})
    load_pretrained(
        net, file, exclude=["upsamples", "output_block", "skip_layers.upsample", "skip_layers.next_layer.upsample"]
    )
    assert equal(DynUNetEncoder(net).state_dict(), DynUNetEncoder(source).state_dict())


def test_meta_device_is_refused(file: Path) -> None:
    with torch.device("meta"):
        encoder = UNetEncoder(unet())
    with pytest.raises(ValueError, match="meta device"):
        load_pretrained(encoder, file)


# ---- input channels -------------------------------------------------------------------------------------------------


def first_layer(old: int, new: int, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    source, net = unet(in_channels=old), unet(in_channels=new)
    file = save_pretrained(UNetEncoder(source), tmp_path / "encoder.pt", {})
    report = load_pretrained(UNetEncoder(net), file, in_channels="inflate")
    assert equal(
        {n: t for n, t in UNetEncoder(source).state_dict().items() if n not in report.inflated},
        {n: t for n, t in UNetEncoder(net).state_dict().items() if n not in report.inflated},
    )
    return source.state_dict()[WEIGHT], net.state_dict()[WEIGHT], report.inflated


def test_inflate_one_to_three(tmp_path: Path) -> None:
    old, new, names = first_layer(1, 3, tmp_path)
    assert names == [WEIGHT, "model.0.residual.weight"]
    torch.testing.assert_close(new, torch.cat([old / 3] * 3, dim=1))
    gray = torch.rand(1, 1, 7, 9)  # the same image in every channel gives the same response
    torch.testing.assert_close(
        nn.functional.conv2d(gray.expand(1, 3, 7, 9), new), nn.functional.conv2d(gray, old), rtol=0, atol=1e-6
    )


def test_deflate_three_to_one(tmp_path: Path) -> None:
    old, new, _ = first_layer(3, 1, tmp_path)
    torch.testing.assert_close(new, old.sum(1, keepdim=True))


@pytest.mark.parametrize("old, new, order", [(2, 3, [0, 1, 0]), (3, 2, [0, 1]), (2, 4, [0, 1, 0, 1])])
def test_other_channel_numbers_repeat_cyclically(old: int, new: int, order: list[int], tmp_path: Path) -> None:
    before, after, _ = first_layer(old, new, tmp_path)
    torch.testing.assert_close(after, before[:, order] * old / new)


def test_equal_channels_are_loaded_as_they_are(file: Path) -> None:
    assert not load_pretrained(UNetEncoder(unet()), file, in_channels="inflate").inflated


@pytest.mark.parametrize("changes", [{"channels": (4, 6, 10)}, {"channels": (6, 6, 8)}, {"kernel_size": 5}])
def test_inflate_is_no_excuse_for_other_shapes(file: Path, changes: dict) -> None:
    net = UNetEncoder(unet(in_channels=3, **changes))
    before = snapshot(net)
    with pytest.raises(ValueError, match="other arguments"):
        load_pretrained(net, file, in_channels="inflate")
    assert equal(snapshot(net), before)


def test_inflate_keeps_inner_layers_strict(tmp_path: Path) -> None:
    """An inner layer with other input channels is another network, even if the numbers look like image channels."""
    make = lambda inner: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(inner, 4, 3))
    torch.save(make(1).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="other arguments"):
        load_pretrained(make(3), tmp_path / "a.pt", in_channels="inflate")


def test_inflate_keeps_the_kernel_strict(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="other arguments"):
        load_pretrained(nn.Sequential(nn.Conv2d(3, 3, 5), nn.Conv2d(3, 4, 3)), tmp_path / "a.pt", in_channels="inflate")


def test_inflate_wants_one_number_of_channels(tmp_path: Path) -> None:
    make = lambda a, b: nn.ModuleList([nn.Conv2d(a, 3, 3), nn.Conv2d(b, 3, 3)])
    torch.save(make(1, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="other arguments"):
        load_pretrained(make(4, 4), tmp_path / "a.pt", in_channels="inflate")


def test_unknown_in_channels(file: Path) -> None:
    with pytest.raises(ValueError, match="'strict' or 'inflate'"):
        load_pretrained(unet(), file, in_channels="repeat")


# ---- saving and provenance ------------------------------------------------------------------------------------------


def test_provenance_inside_and_beside(file: Path, tmp_path: Path) -> None:
    inside, beside = read_provenance(file), json.loads((tmp_path / "encoder.json").read_text())
    assert inside == beside
    assert {name: inside[name] for name in PROVENANCE} == PROVENANCE
    assert inside["versions"]["monai_ssl"] == monai_ssl.__version__
    assert set(inside["versions"]) == {"monai_ssl", "monai", "torch", "numpy"}
    assert inside["created"].endswith("+00:00")
    assert len(inside["settings_sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "encoder.pt"]  # nothing temporary


def test_provenance_survives_saving_again_and_strict_loading(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    torch.save(state, tmp_path / "again.pt")
    assert read_provenance(tmp_path / "again.pt") == read_provenance(file)
    result = UNetEncoder(unet()).load_state_dict(state, strict=True)
    assert result.missing_keys + result.unexpected_keys == []
    assert "monai_ssl" not in state  # no key of its own


def test_no_provenance(tmp_path: Path) -> None:
    torch.save(unet().state_dict(), tmp_path / "a.pt")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    assert read_provenance(tmp_path / "a.pt") is None
    assert read_provenance(tmp_path / "b.pt") is None


def test_saved_tensors_are_plain_and_on_the_cpu(tmp_path: Path) -> None:
    """A buffer that was re-assigned from a loader's batch would carry the patient's file name."""
    net = nn.BatchNorm1d(3)
    net.running_mean = MetaTensor(torch.arange(3.0), meta={"filename_or_obj": "PATIENT_0042.nii.gz"})
    file = save_pretrained(net, tmp_path / "sub" / "encoder.pt", {})
    state = torch.load(file, weights_only=True)
    assert all(type(t) is torch.Tensor for t in state.values())
    assert b"PATIENT_0042" not in file.read_bytes()
    assert state["running_mean"].tolist() == [0, 1, 2]


def test_failed_save_keeps_the_old_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file.read_bytes()

    def broken(obj: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(UNetEncoder(unet()), file, PROVENANCE)
    assert file.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "encoder.pt"]


def test_save_replaces_the_file_at_once(file: Path) -> None:
    """Who has the old file open goes on reading the old one."""
    content = file.read_bytes()
    with file.open("rb") as reader:
        save_pretrained(UNetEncoder(unet()), file, PROVENANCE)
        assert reader.read() == content
    assert file.read_bytes() != content


@pytest.mark.parametrize(
    "value, place",
    [
        (torch.tensor(1.0), "Tensor"),
        (torch.tensor(1.0).numpy()[()], "float32"),
        (torch.tensor(1.0, dtype=torch.float64).numpy()[()], "float64"),
        ((1, 2), "tuple"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ({3: "x"}, "key 3"),
        (Path("x"), "Path"),
    ],
)
def test_provenance_must_be_plain_json(value: object, place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"provenance\['settings'\]\['deep'\]\[0\].*{place}"):
        save_pretrained(nn.Linear(1, 1), tmp_path / "a.pt", {"settings": {"deep": [value]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["/data/scans", "~/scans", "C:\\scans", "file:///x", "PATIENT_0042.nii.gz", "a/b.NII", "x.dcm", "y.nrrd", "z.mha"],
)
def test_provenance_must_not_name_files(name: str, tmp_path: Path) -> None:
    for provenance in ({"data": [{"x": name}]}, {"data": {name: 1}}):
        with pytest.raises(ValueError, match="must not name files"):
            save_pretrained(nn.Linear(1, 1), tmp_path / "a.pt", provenance)
    assert not list(tmp_path.iterdir())


def test_make_provenance() -> None:
    settings = {"lr": 0.5, "roi": (1, 2), "n": torch.tensor([2]).numpy()[0], "dataset_dir": "scans", "log": "/x/y"}
    a = make_provenance("VoCo", "2402.17300", {"_target_": "UNet", "channels": (4, 8)}, {"spacing": [1.5]}, settings, 3)
    b = make_provenance("VoCo", "2402.17300", {}, settings={"n": 2, "roi": [1, 2], "lr": 0.5, "dataset_dir": "other"})
    c = make_provenance("VoCo", "2402.17300", {}, settings={"n": 2, "roi": [1, 2], "lr": 0.6})
    assert a["settings"] == {"lr": 0.5, "roi": [1, 2], "n": 2}
    assert a["network"] == {"_target_": "UNet", "channels": [4, 8]}
    assert (a["preprocessing"], a["num_volumes"]) == ({"spacing": [1.5]}, 3)
    assert a["settings_sha256"] == b["settings_sha256"] != c["settings_sha256"]
    with pytest.raises(TypeError, match="got UNet"):
        make_provenance("VoCo", "2402.17300", unet())


def test_make_provenance_from_a_bundle(tmp_path: Path) -> None:
    parser = ConfigParser(
        {
            "imports": ["$import monai_ssl"],
            "lr": 1e-4,
            "roi_size": [12, 14, 16],
            "dataset_dir": "/data/scans",
            "provenance": {
                "_target_": "make_provenance",
                "method": "VoCo",
                "arxiv": "2402.17300",
                "network": "$dict(_target_='monai.networks.nets.UNet', channels=[4, 8])",
                "settings": {"lr": "@lr", "roi_size": "@roi_size", "dataset_dir": "@dataset_dir"},
            },
        }
    )
    parser.parse()
    provenance = parser.get_parsed_content("provenance")
    save_pretrained(nn.Linear(1, 1), tmp_path / "a.pt", provenance)
    found = read_provenance(tmp_path / "a.pt")
    assert found["network"] == {"_target_": "monai.networks.nets.UNet", "channels": [4, 8]}
    assert found["settings"] == {"lr": 1e-4, "roi_size": [12, 14, 16]}
    assert found["settings_sha256"] == provenance["settings_sha256"]


def test_loads_without_this_package(tmp_path: Path) -> None:
    """A user of plain MONAI: `import monai_ssl` fails there, the file loads strictly and gives the same features."""
    torch.manual_seed(0)
    kwargs = {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1)}
    encoder = SegResNetDS(**kwargs).encoder.eval()
    save_pretrained(encoder, tmp_path / "encoder.pt", PROVENANCE)
    x = torch.rand(1, 1, 10, 12)
    with torch.no_grad():
        torch.save({"x": x, "y": encoder(x)[-1]}, tmp_path / "reference.pt")
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "monai_ssl":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
try:
    import monai_ssl
    raise SystemExit("monai_ssl could be imported")
except ImportError:
    pass
import torch
from monai.networks.nets import SegResNetDS
net = SegResNetDS(**{kwargs!r}).eval()
state = torch.load("encoder.pt", weights_only=True)
print(net.encoder.load_state_dict(state, strict=True))
reference = torch.load("reference.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(net.encoder(reference["x"])[-1], reference["y"])
print(state._metadata["monai_ssl"]["method"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["<All keys matched successfully>", "VoCo"]
