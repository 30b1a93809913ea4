# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are a MONAI network's state dict: saved with provenance, loaded strictly."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .provenance import KEY, complete_provenance
from .state_file import read_state_dict, write_atomic
from .state_matching import covering_prefixes, inflate, match_names, names_beside, reads_image, shape_of, tails, under

__all__ = ["LoadReport", "load_pretrained", "save_pretrained"]

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What became of every tensor of a file and of a network; prints as a table."""

    file: str
    network: str
    loaded: list[str] = field(default_factory=list)  # names in the network
    inflated: list[str] = field(default_factory=list)  # loaded, adapted to another number of input channels
    excluded: list[str] = field(default_factory=list)  # named by `exclude`, in the network or the file
    missing: list[str] = field(default_factory=list)  # in the network only
    unexpected: list[str] = field(default_factory=list)  # in the file only
    shape: list[str] = field(default_factory=list)  # in both, with different shapes

    def __str__(self) -> str:
        lines = [f"{self.file} -> {self.network}"]
        for kind in ("loaded", "inflated", "excluded", "missing", "unexpected", "shape"):
            names = getattr(self, kind)
            if names or kind == "loaded":
                more = ", .." if len(names) > 3 else ""
                lines.append(f"  {kind:<10} {len(names):>5}  {', '.join(names[:3])}{more}".rstrip())
        return "\n".join(lines)


def load_pretrained(
    network: nn.Module, file: str | Path, exclude: Sequence[str] = (), in_channels: str = "strict"
) -> LoadReport:
    """Fill a network from a checkpoint; every tensor of both must be accounted for, else nothing is written.

    Understood: plain state dicts; nested under "state_dict", "model" or "network"; a prefix on all keys (``module.``,
    ``encoder.``, ``network.``, and ``backbone.``, ``student.`` of released VoCo weights); ``swinViT`` as ``swin_vit``.

    Args:
        network: what to fill; for part of a network, the part or an adapter of it (``UNetEncoder(net)``).
        file: written by :func:`save_pretrained`, a MONAI bundle or ``torch.save``.
        exclude: prefixes, up to a dot or the end of a name, of tensors that keep their values (network) or are left
            out (file).
        in_channels: "strict", or "inflate": the convolutions that read the image may have another number of input
            channels. Their weights are repeated cyclically and scaled by old / new; to one channel they are summed.

    Returns:
        the report, which is also logged.

    Raises:
        OSError: no such file.
        ValueError: the file cannot be read, does not fit, or a prefix of ``exclude`` matches nothing.
    """
    if in_channels not in ("strict", "inflate"):
        raise ValueError(f"in_channels must be 'strict' or 'inflate', got {in_channels!r}")
    prefixes = _prefixes(exclude)
    own = network.state_dict(keep_vars=True)
    if any(getattr(t, "is_meta", False) for t in own.values()):
        raise ValueError(f"{type(network).__name__} is on the meta device, where loading has no effect")
    state = read_state_dict(file)
    unused = [p for p in prefixes if not any(under(tail, [p]) for key in [*own, *state] for tail in tails(key))]
    if unused:
        raise ValueError(f"exclude={unused} matches nothing in {file} or in {type(network).__name__}")
    names = match_names(state, own, prefixes)  # file key -> name in the network, without the excluded
    source = {name: state[key] for key, name in names.items()}
    both = [name for name in own if name in source]
    filled = {id(own[name]) for name in both}  # one tensor may bear several names, as in DynUNet
    differ = [name for name in both if shape_of(source[name]) != shape_of(own[name])]
    other_channels = reads_image(network, {name: source[name] for name in differ})

    report = LoadReport(str(file), type(network).__name__)
    report.excluded = [n for n in own if under(n, prefixes)] + [k for k in state if k not in names]
    report.unexpected = [key for key, name in names.items() if name not in own]
    report.missing = [n for n in own if n not in source and not under(n, prefixes) and id(own[n]) not in filled]
    if other_channels and in_channels == "inflate":
        report.inflated, differ = differ, []
        source.update({name: inflate(source[name], own[name].shape[1]) for name in report.inflated})
    report.shape = [f"{n} {shape_of(source[n])} in the file, {shape_of(own[n])} in the network" for n in differ]
    report.loaded = [name for name in both if name not in differ]
    if report.missing or report.unexpected or report.shape or not report.loaded:
        remedy = _remedy(report, list(own), list(state), other_channels)
        raise ValueError(f"nothing was loaded, the file does not fit\n{report}\n{remedy}")
    network.load_state_dict({name: source[name] for name in report.loaded}, strict=False)
    logger.info("%s", report)
    return report


def save_pretrained(
    network: nn.Module, file: str | Path, provenance: Mapping[str, Any], include: Sequence[str] | None = None
) -> Path:
    """Write the plain state dict of a network, with its provenance inside and beside it as ``.json``.

    ``torch.load(file, weights_only=True)`` gives what ``load_state_dict`` takes, without this package; the provenance
    sits in the ``_metadata`` of the state dict. Date and package versions are added. Both files appear whole or not.

    Args:
        network: what to save; under DDP the module, not its wrapper, and by one process.
        file: e.g. ``encoder.pt``; then the other is ``encoder.json``.
        provenance: plain JSON without names of files, see :func:`make_provenance`.
        include: prefixes, up to a dot or the end of a name, of the tensors to save, where only a part of the network
            is trained; they are added to the provenance as "prefixes". ``load_pretrained`` then needs the others as
            ``exclude``. None saves all.

    Raises:
        ValueError: the provenance is not plain JSON or names files, the state dict holds more than tensors, or a prefix
            of ``include`` matches nothing.
    """
    file = Path(file)
    provenance = complete_provenance(provenance)
    state = network.state_dict()
    if include is not None:
        prefixes = _prefixes(include)
        unused = [p for p in prefixes if not any(under(name, [p]) for name in state)]
        if unused or not prefixes:
            raise ValueError(f"include={unused} matches nothing in {type(network).__name__}")
        for name in [name for name in state if not under(name, prefixes)]:
            del state[name]
        provenance["prefixes"] = [include] if isinstance(include, str) else list(include)
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"the state dict of {type(network).__name__} holds more than tensors: {others[:3]}")
    # a MetaTensor would bring the name of the patient's file into the checkpoint
    plain = OrderedDict((name, t.detach().cpu().as_subclass(torch.Tensor)) for name, t in state.items())
    plain._metadata = OrderedDict(getattr(state, "_metadata", {}))  # type: ignore[attr-defined]
    plain._metadata[KEY] = provenance  # type: ignore[attr-defined]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, lambda temporary: torch.save(plain, temporary))
    text = json.dumps(provenance, indent=4) + "\n"
    write_atomic(file.with_suffix(".json"), lambda temporary: temporary.write_text(text))
    return file


def _prefixes(names: Sequence[str]) -> list[str]:
    return [name.rstrip(".") for name in ([names] if isinstance(names, str) else names)]


def _remedy(report: LoadReport, own: list[str], keys: list[str], other_channels: bool) -> str:
    if other_channels and not (report.missing or report.unexpected):
        return "only the number of input channels differs: pass in_channels='inflate' to adapt the first convolution"
    if not report.loaded:
        beside = names_beside(own, keys)
        if beside:
            return f"part of the file fits, leave out the rest: exclude={beside}"
        return f"this is a checkpoint of another network: its keys begin with {keys[:2]}, the network's with {own[:2]}"
    advice = []
    if report.shape:
        advice.append("the network was built with other arguments, compare them with the file's provenance")
    if report.missing or report.unexpected:
        prefixes = covering_prefixes(report.missing + report.unexpected, report.loaded)
        listed = ", ".join(map(repr, prefixes[:8])) + (", .." if len(prefixes) > 8 else "")
        advice.append(f"if they are to be left out on purpose, name them: exclude=[{listed}]")
    return "; ".join(advice)
