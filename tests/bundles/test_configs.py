# SPDX-License-Identifier: Apache-2.0
"""The configurations of every bundle: MONAI's property checks, the style rules behind them, exports and variants."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import monai
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ckpt_export, verify_net_in_out

from .conftest import Trained
from .running import BUNDLES, NAMES, copy_bundle, item, load_config, make, run, settings_of, variants
from .settings import BundleSettings

VARIANTS = [(name, file) for name in NAMES for file in variants(BUNDLES / name)]


@pytest.mark.parametrize("files", [("train.yaml",), ("train.yaml", "evaluate.yaml")], ids="+".join)
def test_training_properties(bundle: Path, files: tuple[str, ...], overrides: dict[str, Any], tmp_path: Path) -> None:
    workflow = make(copy_bundle(bundle, tmp_path), *files, **overrides)
    assert workflow.check_properties() == []


def test_inference_properties(bundle: Path, settings: BundleSettings, scans: Path, tmp_path: Path) -> None:
    root = copy_bundle(bundle, tmp_path)
    workflow = make(root, "inference.yaml", kind="infer", **settings.inference, dataset_dir=str(scans))
    assert workflow.check_properties() == []


def test_network_takes_and_gives_what_metadata_says(bundle: Path) -> None:
    """At full size, which is that of train.yaml and of inference.yaml."""
    config = bundle / "configs"
    verify_net_in_out("network_def", str(config / "metadata.json"), str(config / "inference.yaml"), device="cpu")
    parsers = [ConfigParser(load_config(bundle, file)) for file in ("train.yaml", "inference.yaml")]
    shapes = [shapes_of(parser.get_parsed_content("network_def")) for parser in parsers]
    assert shapes[0] == shapes[1]


def shapes_of(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def test_checkpoint_export(bundle: Path, trained: Trained, settings: BundleSettings, tmp_path: Path) -> None:
    """The Zoo scripts `network_def` of inference.yaml with models/model.pt; where that cannot work, tracing must."""
    declared = json.loads((bundle / "configs" / "metadata.json").read_text())["ssl"]["export"]["torchscript"]
    if declared == "none":
        return
    arguments = {
        **settings.inference,
        "config_file": str(bundle / "configs" / "inference.yaml"),
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "ckpt_file": str(trained.root / "models" / "model.pt"),
        "filepath": str(tmp_path / "model.ts"),
    }
    if declared == "trace":
        with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
            ckpt_export("network_def", **arguments)
        arguments |= {"use_trace": True, "input_shape": settings.network_input}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)  # numpy's ceil of a tensor
        ckpt_export("network_def", **arguments)
    network = item(make(trained.root, "inference.yaml", kind="infer", **settings.inference), "network_def").eval()
    network.load_state_dict(torch.load(trained.root / "models" / "model.pt", weights_only=True))
    image = torch.rand(settings.network_input, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = network(image), torch.jit.load(tmp_path / "model.ts").eval()(image)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bundle, file", VARIANTS, indirect=["bundle"], ids=["-".join(pair) for pair in VARIANTS])
def test_variants_train(bundle: Path, file: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    before, more = settings_of(bundle).variants.get(file, ([], {}))
    workflow = make(
        copy_bundle(bundle, tmp_path), "train.yaml", *before, file, **{**overrides, **more, "max_epochs": 1}
    )
    assert workflow.check_properties() == []
    losses: list[float] = []
    trainer = item(workflow, "train#trainer")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    run(workflow)
    assert len(losses) == 1
    assert 0 < abs(losses[0]) < 100  # a cosine may be negative


PATCHES = ("cpc", "exemplar", "jigsaw", "rotation", "rpl")
PATCH_BUNDLES = [*(f"{name}_segresnet_ct" for name in PATCHES), "multi_task_pretraining"]


@pytest.mark.parametrize("bundle", PATCH_BUNDLES, indirect=True)
def test_sizes_may_be_one_number(bundle: Path, overrides: dict[str, Any], tmp_path: Path) -> None:
    root, batches = copy_bundle(bundle, tmp_path), []
    known = load_config(bundle, "train.yaml")
    sizes = {name: 48 if name == "roi_size" else known[name][0] for name in ("roi_size", "grid_size") if name in known}
    for given in ({name: [size] * 3 for name, size in sizes.items()}, sizes):
        workflow = make(root, "train.yaml", **{**overrides, **given})
        item(workflow, "pretext")
        monai.utils.set_determinism(0)
        batches.append(next(iter(item(workflow, "train#dataloader"))))
    assert torch.equal(batches[0]["image"], batches[1]["image"])


def test_variants_change_what_exists(bundle: Path) -> None:
    """A misspelt item of a variant would be added in silence."""
    config = load_config(bundle, "train.yaml")
    for file in variants(bundle):
        before, _ = settings_of(bundle).variants.get(file, ([], {}))
        known = set(config).union(*(load_config(bundle, name) for name in before))
        changed = {key.split("#")[0].split("::")[0] for key in load_raw(bundle / "configs" / file)}
        new = changed - known
        used = (bundle / "configs" / file).read_text()
        assert {key for key in new if f"@{key}" not in used} == set(), file


def load_raw(path: Path) -> dict[str, Any]:
    """The keys as they are written, with the # of nested ones."""
    return ConfigParser.load_config_file(path)


def test_handlers_are_written_for_the_property_check(bundle: Path) -> None:
    """As references or expressions they crash check_properties."""
    for handlers in (load_config(bundle, "train.yaml")["train"]["handlers"],):
        assert isinstance(handlers, list)
        assert all(isinstance(handler, dict) and handler["_target_"] for handler in handlers)


def test_savers_are_built_in_every_process(bundle: Path) -> None:
    """A saver's constructor takes part in collectives: built by one process alone, it stops all of them for ever."""
    config = load_config(bundle, "train.yaml", "multi_gpu_train.yaml")
    for part in ("train", "validate"):
        for handler in config[part]["handlers"]:
            handler = config[handler.removeprefix("@")] if isinstance(handler, str) else handler
            if "Saver" in handler["_target_"] or "Resume" in handler["_target_"]:
                assert "rank" not in str(handler.get("_disabled_", "")), handler["_target_"]
    assert any("ignite.distributed.sync()" in str(step) for step in config["initialize"])


def test_nothing_holds_the_distributed_wrapper(bundle: Path) -> None:
    """With several processes @network is the wrapper, whose state dict has other keys."""
    config = load_config(bundle, "train.yaml")
    users = {"optimizer": config["optimizer"], "train": config["train"]["handlers"]}
    users["validate"] = config["validate"]["handlers"]
    for name, user in users.items():
        text = json.dumps(user).replace("@network_def", "")
        assert "@network" not in text, name


def test_weights_are_restored_strictly_and_not_in_federated_evaluation(bundle: Path) -> None:
    """Only handlers named CheckpointLoader are switched off there; others would overwrite the global weights."""
    evaluation = load_config(bundle, "train.yaml", "evaluate.yaml")["validate"]["handlers"]
    for handlers in (evaluation, load_config(bundle, "inference.yaml")["handlers"]):
        loaders = [handler for handler in handlers if "CheckpointLoader" in handler["_target_"]]
        assert len(loaders) == 1
        assert loaders[0].get("strict", True) is True


def test_evaluation_needs_no_training_volumes(bundle: Path) -> None:
    config = load_config(bundle, "train.yaml", "evaluate.yaml")
    assert config["min_training"] == 0
    assert "min_training=@min_training" in config["data"]


@pytest.mark.parametrize("bundle", ["exemplar_segresnet_ct", "pgl_segresnet_ct"], indirect=True)
def test_batch_norm_of_heads_is_that_of_all_gpus(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of one process would give away which codes are its own. The parameters stay those of the optimiser."""
    parser = ConfigParser(load_config(bundle, "train.yaml", "multi_gpu_train.yaml"))
    parser.update({"device": "$torch.device('cpu')", "init_filters": 8})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser.get_parsed_content("imports")
    pretext = parser.get_parsed_content("pretext")
    before = list(pretext.parameters())
    module = parser.get_parsed_content("network#module")
    assert module is pretext
    assert not any(type(part).__name__.startswith("BatchNorm") for part in module.modules())
    assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules())
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))


def test_schedules_do_not_follow_the_trainer(bundle: Path) -> None:
    """Federated learning sets the trainer's max_epochs to the epochs of one round."""
    for path in (bundle / "configs").glob("*.yaml"):
        assert "@train#trainer#max_epochs" not in path.read_text(), path


def test_trainer_does_not_decollate(bundle: Path) -> None:
    assert load_config(bundle, "train.yaml")["train"]["trainer"]["decollate"] is False
