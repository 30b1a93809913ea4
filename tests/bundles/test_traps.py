# SPDX-License-Identifier: Apache-2.0
"""What data, configurations and names do in MONAI 1.6.1 where a remedy of ours depends on it.

A test here that fails after an upgrade says that the remedy named in its docstring can be simplified or must change.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, PersistentDataset, list_data_collate
from monai.data.utils import pickle_hashing
from monai.losses import ContrastiveLoss
from monai.networks.nets import BasicUNet
from torch import nn


def scan(name: str = "PATIENT_0042.nii.gz", value: float = 1.0, size: tuple[int, ...] = (4,)) -> MetaTensor:
    return MetaTensor(torch.full((1, *size), value), affine=torch.eye(4), meta={"filename_or_obj": name})


def batch_of(*scans: MetaTensor) -> MetaTensor:
    return list_data_collate([{"image": item} for item in scans])["image"]


def test_g_a_buffer_assigned_from_a_scan_carries_its_file_name(tmp_path: Path) -> None:
    """Remedy: PrepareBatchTensor hands plain tensors to the network, and buffers are written in place."""

    class Mean(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.in_place = in_place
            self.mean: torch.Tensor
            self.register_buffer("mean", torch.zeros(1, 1, 4))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if self.in_place:
                self.mean.mul_(0.9).add_(image, alpha=0.1)
            else:
                self.mean = self.mean * 0.9 + image.detach() * 0.1
            return image

    for in_place in (False, True):
        module = Mean(in_place)
        module(batch_of(scan()))
        torch.save(module.state_dict(), tmp_path / "model.pt")
        assert isinstance(module.mean, MetaTensor) is not in_place
        assert (b"PATIENT_0042" in (tmp_path / "model.pt").read_bytes()) is not in_place
        if in_place:
            torch.load(tmp_path / "model.pt", weights_only=True)
        else:
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "model.pt", weights_only=True)


def test_h_a_queue_of_scans_fails_when_it_outgrows_the_batch() -> None:
    """Remedy: as for G; the error comes late, when the queue has filled up."""
    batch, queue = batch_of(scan("a"), scan("b")), batch_of(scan("c"), scan("d"))
    joined = torch.cat([batch, queue])
    assert len(joined[:2]) == 2
    with pytest.raises(ValueError, match="Inconsistent batched metadata dicts"):
        joined[:3]
    plain = torch.cat([batch.as_tensor(), queue.as_tensor()])
    assert len(plain[:3]) == 3


def test_i_stacked_crops_all_get_the_place_of_the_first() -> None:
    """Remedy: transforms that stack views write the matrices as plain tensors under their own key."""
    volume = MetaTensor(torch.arange(5 * 6 * 7.0).reshape(1, 5, 6, 7), affine=torch.eye(4))
    crops = [mt.SpatialCrop(roi_start=(start, 0, 0), roi_end=(start + 2, 3, 4))(volume) for start in (0, 3)]
    assert [crop.affine[0, 3].item() for crop in crops] == [0, 3]
    assert [crop.affine[0, 3].item() for crop in torch.stack(crops)] == [0, 0]


def test_j_a_persistent_dataset_forgets_places_and_confuses_parameters(tmp_path: Path) -> None:
    """Remedy: cached_dataset hashes the pickled transforms, and matrices travel as plain tensors."""

    def read(factor: float, **kwargs: Any) -> torch.Tensor:
        transform = mt.ScaleIntensityd("image", minv=None, maxv=None, factor=factor - 1)
        data = [{"image": "volume"}]
        first = mt.Compose([mt.Lambdad("image", load), transform])
        return PersistentDataset(data, first, cache_dir=tmp_path, **kwargs)[0]["image"]

    assert read(2.0).max() == 2
    assert not isinstance(read(2.0), MetaTensor)
    assert read(3.0).max() == 2, "the stale volume"
    assert read(2.0, hash_transform=pickle_hashing).max() == 2
    assert read(3.0, hash_transform=pickle_hashing).max() == 3


def load(_: str) -> MetaTensor:
    return MetaTensor(torch.tensor([[0.0, 1.0]]), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))


def test_k_monais_contrastive_loss_is_not_finite_at_low_temperature() -> None:
    """Remedy: NTXentLoss."""
    embedding = torch.nn.functional.one_hot(torch.arange(4), 6).float()
    assert ContrastiveLoss(temperature=0.5)(embedding, embedding).isfinite()
    assert not ContrastiveLoss(temperature=0.005)(embedding, embedding).isfinite()


@pytest.mark.parametrize(
    "handler, allowed",
    [
        ("class=StreamHandler\nargs=(sys.stdout,)", True),
        ("class=logging.handlers.MemoryHandler\nargs=(10,)", True),
        ("class=handlers.MemoryHandler\nargs=(10,)", False),
        ("class=monai_ssl.handlers.RunProgressBar\nargs=()", False),
        ("class=FileHandler\nargs=(os.path.join('a', 'b'),)", False),
    ],
)
def test_l_logging_conf_takes_stdlib_handlers_and_literals_only(tmp_path: Path, handler: str, allowed: bool) -> None:
    """Remedy: progress bars attach in the configuration."""
    conf = "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n[logger_root]\nhandlers=h\n[handler_h]\n"
    (tmp_path / "logging.conf").write_text(conf + handler + "\n")
    (tmp_path / "train.yaml").write_text("run: [$1]\n")
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    try:
        if allowed:
            ConfigWorkflow(str(tmp_path / "train.yaml"))
            assert root.handlers != before
        else:
            with pytest.raises(ValueError, match="refusing to apply"):
                ConfigWorkflow(str(tmp_path / "train.yaml"))
    finally:
        root.handlers = before


@pytest.mark.parametrize("value", [np.float64(1), np.float32(1), np.zeros(2)], ids=["float64", "float32", "array"])
def test_m_numpy_values_make_a_file_unloadable(tmp_path: Path, value: Any) -> None:
    """Remedy: everything that is saved is a tensor or a plain Python value."""
    torch.save({"value": value}, tmp_path / "file.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=True)
    torch.save({"value": value.tolist()}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True)["value"] == value.tolist()


def test_n_an_array_draw_doubles_the_precision() -> None:
    """Remedy: scalars are drawn without a size."""
    state, image = np.random.RandomState(0), np.ones(2, dtype=np.float32)
    assert (image * state.uniform()).dtype == np.float32
    assert (image * state.uniform(size=1)[0]).dtype == np.float64


class BuiltAtEachCall(mt.Transform):
    """A random transform that builds its random part too late, which no seed reaches."""

    def __call__(self, data: Any) -> torch.Tensor:
        return torch.tensor(mt.RandScaleIntensity(factors=0.5, prob=1.0)(torch.ones(1, 2))[0, 0].item())


def test_o_a_random_part_built_at_each_call_repeats_in_every_worker() -> None:
    """Remedy: random parts are built in __init__ and set_random_state reaches them."""
    mt.Randomizable.R = np.random.RandomState(0)
    dataset = Dataset([0] * 4, mt.Compose([BuiltAtEachCall()]))
    drawn = torch.cat(list(DataLoader(dataset, batch_size=1, num_workers=2)))
    assert len(drawn.unique()) == 2


def test_q_a_random_transform_that_does_not_say_so_is_cached() -> None:
    """Remedy: the contract test wants RandomizableTrait on all random transforms."""
    drawn = iter(range(10))

    class Silent(mt.Transform):
        def __call__(self, data: Any) -> int:
            return next(drawn)

    class Declared(Silent, mt.RandomizableTrait):
        pass

    for transform, same in ((Silent(), True), (Declared(), False)):
        dataset = CacheDataset([0], mt.Compose([transform]), progress=False, num_workers=0)
        assert (dataset[0] == dataset[0]) is same


def test_t_warnings_as_errors_break_ignite() -> None:
    """Remedy: the filters in pyproject.toml, under which this very module was imported.

    With "error" alone, ``import monai`` succeeds and silently takes ignite for absent.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import ignite.handlers"], capture_output=True, text=True
    )
    assert "DeprecationWarning: `torch.jit" in done.stderr


def test_u_an_item_of_a_parser_is_no_dictionary() -> None:
    """Remedy: get_parsed_content."""
    parser = ConfigParser({"a": {"b": 1}})
    assert not isinstance(parser.a, dict)
    assert isinstance(parser.get_parsed_content("a"), dict)


def test_short_names_resolve_to_monais_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remedy: no public class of ours bears the name of one of MONAI's."""
    ours = types.ModuleType("monai_clash")
    ours.BasicUNet = type("BasicUNet", (), {"__module__": "monai_clash"})  # type: ignore[attr-defined]
    ours.BasicVNet = type("BasicVNet", (), {"__module__": "monai_clash"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "monai_clash", ours)
    parser = ConfigParser({"clash": {"_target_": "BasicUNet"}, "free": {"_target_": "BasicVNet"}})
    with pytest.warns(UserWarning, match="more than 1 component have name `BasicUNet`"):
        assert isinstance(parser.get_parsed_content("clash"), BasicUNet)
    assert isinstance(parser.get_parsed_content("free"), ours.BasicVNet)
