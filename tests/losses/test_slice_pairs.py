# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import pickle
import sys
from itertools import product

import pytest
import torch
from monai.bundle import ConfigParser

import monai_ssl
from monai_ssl.losses import slice_pairs

from .slice_batches import batch_a, slice_ids


@pytest.mark.parametrize(
    "mode, without_view, positives, negatives",
    [("GR", False, 8, 6), ("GD-", False, 8, 4), ("GD", False, 16, 4), ("GD", True, 24, 4)],
)
def test_counts_of_batch_a(mode: str, without_view: bool, positives: int, negatives: int) -> None:
    ids = batch_a()
    pos, neg = slice_pairs(mode, **(ids | {"view": None} if without_view else ids))
    assert (pos.dtype, neg.dtype) == (torch.bool, torch.bool)
    assert int(pos.sum()) == positives
    assert neg.sum(1).tolist() == [negatives] * 8


def test_counts_of_the_default_batch() -> None:
    ids = slice_ids(3, 4, 2)
    assert int(slice_pairs("GR", **ids)[0].sum()) == 24
    positives, negatives = slice_pairs("GD", **ids)
    assert int(positives.sum()) == 72
    assert negatives.sum(1).tolist() == [18] * 24


BATCHES = {
    "3 partitions": slice_ids(3, 3, 2),
    "4 partitions": slice_ids(2, 4, 3),
    "6 partitions": slice_ids(2, 6, 2),
    "one volume": slice_ids(1, 4, 2),
    "repeated volume": slice_ids([5, 2, 5], 3, 2),
    "repeated slices": {name: torch.cat([x, x]) for name, x in slice_ids(2, 2, 2).items()},
    "one partition": slice_ids(4, 1, 2),
}


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("mode", ["GR", "GD-", "GD", "GD without view"])
def test_equal_to_the_definition(mode: str, ids: dict[str, torch.Tensor]) -> None:
    if mode.endswith("view"):
        mode, ids = "GD", {**ids, "view": None}
    positives, negatives = slice_pairs(mode, **ids)
    order = torch.randperm(len(ids["source"]), generator=torch.Generator().manual_seed(0))
    shuffled = slice_pairs(mode, **{name: x if x is None else x[order] for name, x in ids.items()})
    items = [tuple(-1 if x is None else int(x[i]) for x in ids.values()) for i in range(len(ids["source"]))]
    for i, j in product(range(len(items)), repeat=2):
        (source, partition, volume, view), (source_j, partition_j, volume_j, view_j) = items[i], items[j]
        positive = source == source_j and i != j
        if mode == "GD" and partition == partition_j and volume != volume_j and view == view_j:
            positive = True
        negative = source != source_j if mode == "GR" else partition != partition_j
        assert (bool(positives[i, j]), bool(negatives[i, j])) == (positive, negative)
    assert torch.equal(shuffled[0], positives[order][:, order])
    assert torch.equal(shuffled[1], negatives[order][:, order])


def test_one_volume_has_no_partners() -> None:
    ids = slice_ids(1, 4, 2)
    for a, b in zip(slice_pairs("GD", **ids), slice_pairs("GD-", **ids)):
        assert torch.equal(a, b)


def test_errors() -> None:
    ids = batch_a()
    with pytest.raises(ValueError, match="mode must be one of GR, GD-, GD, got 'LR'"):
        slice_pairs("LR", **ids)
    with pytest.raises(ValueError, match="mode 'GD-' needs partition"):
        slice_pairs("GD-", ids["source"])
    with pytest.raises(ValueError, match="mode 'GD' needs partition and volume"):
        slice_pairs("GD", ids["source"])
    with pytest.raises(ValueError, match="mode 'GD' needs volume"):
        slice_pairs("GD", ids["source"], ids["partition"])
    with pytest.raises(ValueError, match=r"all of one length, got \{'source': \(8,\), 'partition': \(7,\)\}"):
        slice_pairs("GD-", ids["source"], ids["partition"][1:])
    with pytest.raises(ValueError, match=r"'view': \(8, 1\)"):
        slice_pairs("GR", ids["source"], view=ids["view"][:, None])
    with pytest.raises(ValueError, match=r"must be integers, got source of torch\.float32"):
        slice_pairs("GR", ids["source"].float())


def test_function_and_module_of_one_name() -> None:
    """The package's attribute is the function, whatever is imported afterwards; the module is found by its path."""
    module = importlib.import_module("monai_ssl.losses.slice_pairs")
    assert module is sys.modules["monai_ssl.losses.slice_pairs"]
    from monai_ssl.losses.slice_pairs import slice_pairs as from_module

    assert module.slice_pairs is from_module is slice_pairs is monai_ssl.losses.slice_pairs
    assert pickle.loads(pickle.dumps(slice_pairs)) is slice_pairs
    config = {"imports": ["$import monai_ssl"], "it": {"_target_": "slice_pairs", "_mode_": "callable"}}
    assert ConfigParser(config).get_parsed_content("it") is slice_pairs
