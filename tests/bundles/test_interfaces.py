# SPDX-License-Identifier: Apache-2.0
"""Every bundle in the hands of others: several processes, federated learning, monai.bundle.load, MLflow."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils.enums import CommonKeys

import monai_ssl.data
from monai_ssl.bundle_export import export_bundle

from .conftest import Trained
from .running import copy_bundle, make, run, start
from .settings import BundleSettings

TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
from bundles.running import item, make, run
root, files, overrides, out = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
workflow = make(root, *files, "multi_gpu_train.yaml", **overrides)
wrong = workflow.check_properties()
trainer = item(workflow, "train#trainer")
run(workflow)
weights = {name: value.double().sum().item() for name, value in trainer.network.state_dict().items()}
report = {"wrong": wrong, "iterations": trainer.state.iteration, "wrapper": type(trainer.network).__name__}
(out / f"rank{os.environ['RANK']}.json").write_text(json.dumps({**report, "weights": weights}))
"""


def test_two_processes(bundle: Path, settings: BundleSettings, quick: dict[str, Any], tmp_path: Path) -> None:
    """They end, with equal weights, and one of them writes."""
    root = copy_bundle(bundle, tmp_path)
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    overrides = json.dumps({**quick, **settings.two_processes, "max_epochs": 1})
    arguments = [str(root), json.dumps(settings.quick_files), overrides, str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    tests = str(Path(__file__).resolve().parents[1])
    done = start([*torchrun, str(tmp_path / "train.py"), *arguments], tmp_path, tests)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["wrong"] == []
    assert first["wrapper"] == "DistributedDataParallel"
    assert first["iterations"] == 1, "each process has taken half of the two batches"
    assert first == second
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in state)


@pytest.fixture(scope="module")
def exported(trained: Trained, settings: BundleSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained bundle in its release form, with the small sizes for defaults, so that the weights fit."""
    root = tmp_path_factory.mktemp("exported") / trained.root.name
    model = trained.root / "models" / "model.pt"
    entry = {"path": "models/model.pt", "url": "https://example.org/model.pt", "hash_type": "sha256"}
    entry["hash_val"] = hashlib.sha256(model.read_bytes()).hexdigest()
    (trained.root / "large_files.yml").write_text(json.dumps({"large_files": [entry]}))
    assert export_bundle(trained.root, root) == []
    for name, overrides in (("train", trained.overrides), ("inference", settings.inference)):
        path = root / "configs" / f"{name}.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, **overrides, "bundle_root": str(root)}))
    return root


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_load_gives_the_trained_network(
    exported: Path, trained: Trained, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any data: whoever loads a network has perhaps none."""
    monkeypatch.setattr(monai_ssl.data, "check_volumes", lambda *args, **kwargs: pytest.fail("data are read"))
    with pytest.warns(UserWarning, match="parsing config_file"):
        network = monai.bundle.load(exported.name, bundle_dir=exported.parent, workflow_type=kind, device="cpu")
    assert isinstance(network, torch.nn.Module)
    expected = torch.load(trained.root / "models" / "model.pt", weights_only=True)
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in expected.items())


def copied(exchange: ExchangeObject) -> dict[str, torch.Tensor]:
    """On a CPU the client hands out the live tensors."""
    return {name: value.clone() for name, value in exchange.weights.items()}


def test_federated_learning(quickly_trained: Trained, tmp_path: Path) -> None:
    """A round on a client, from the JSON files of the release form."""
    export_bundle(quickly_trained.root, tmp_path / "release")
    files = [f"configs/{Path(file).stem}.json" for file in quickly_trained.files]
    client = MonaiAlgo(
        str(tmp_path / "release"),
        send_weight_diff=False,
        config_train_filename=files,
        config_evaluate_filename=[*files, "configs/evaluate.json"],
        final_model_filepath="models/model.pt",
        train_kwargs=dict(quickly_trained.overrides),
        eval_kwargs=dict(quickly_trained.overrides),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "executing", UserWarning)
        client.initialize({ExtraItems.CLIENT_NAME: "site"})
    start_weights = copied(client.get_weights())
    client.train(ExchangeObject(weights=start_weights))
    after = copied(client.get_weights())
    assert after.keys() == start_weights.keys()
    assert any(not torch.equal(after[name], value) for name, value in start_weights.items())
    metrics = client.evaluate(ExchangeObject(weights=after)).metrics
    assert metrics
    evaluated = client.evaluator.network.state_dict()
    assert all(torch.equal(evaluated[name], value) for name, value in after.items()), "a checkpoint got in the way"
    client.send_weight_diff = True
    difference = client.get_weights()
    assert difference.weight_type == WeightType.WEIGHT_DIFF
    for name, value in difference.weights.items():
        torch.testing.assert_close(value, after[name] - start_weights[name])
    final = client.get_weights({ExtraItems.MODEL_TYPE: ModelType.FINAL_MODEL}).weights
    client.train(ExchangeObject(weights=final))
    with pytest.raises(RuntimeError, match="No global weights converted"):
        client.train(ExchangeObject(weights={"nosuch": torch.zeros(1)}))
    client.finalize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow", "ignore:The ``noload`` loader strategy")
def test_mlflow(bundle: Path, settings: BundleSettings, quick: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    root = copy_bundle(bundle, tmp_path)
    tracking = str(root / "configs" / "tracking_mlflow.yaml")
    run(make(root, *settings.quick_files, **{**quick, "max_epochs": 1}, tracking=tracking))
    assert (root / "eval" / "mlruns.db").stat().st_size > 0


def test_mlflow_logs_a_number(bundle: Path) -> None:
    """MONAI's own default reads the loss as a tuple, which MLflow refuses at the first iteration."""
    settings = monai.bundle.ConfigParser.load_config_file(bundle / "configs" / "tracking_mlflow.yaml")
    parser = monai.bundle.ConfigParser({"read": settings["configs"]["trainer"]["output_transform"]})
    assert float(parser.get_parsed_content("read")({CommonKeys.LOSS: torch.tensor(0.5)})) == 0.5
    assert {"trainer", "validator"} <= set(settings["handlers_id"])
