# SPDX-License-Identifier: Apache-2.0
"""Weights that others released, in the networks of SAM: mmdet checkpoints, and ResNet-18 of ImageNet inflated to 3D."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .nets.anatomical_embedding_net import AnatomicalEmbeddingNet, MergedEmbeddingNet
from .nets.anisotropic_resnet import AnisotropicResNet
from .state_file import read_state_dict

__all__ = ["inflate_resnet18", "load_mmdet_checkpoint"]

_HEADS = {"neck": "local_head", "read_out_head": "global_head", "semantic_head": "semantic_head"}
_NAMES = [
    (r"backbone\.conv1\.conv", "encoder.conv1"),
    (r"backbone\.conv1\.bn", "encoder.bn1"),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.conv", r"encoder.layer\1.\2.conv\3"),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.bn", r"encoder.layer\1.\2.bn\3"),
    (r"backbone\.layer(\d)\.(\d+)\.downsample\.conv", r"encoder.layer\1.\2.downsample.0"),
    (r"backbone\.layer(\d)\.(\d+)\.downsample\.bn", r"encoder.layer\1.\2.downsample.1"),
    *((rf"{theirs}\.lateral_convs\.(\d+)\.conv", rf"{ours}.lateral.\1") for theirs, ours in _HEADS.items()),
    *((rf"{theirs}\.fpn_convs\.0\.conv", f"{ours}.smooth") for theirs, ours in _HEADS.items()),
]


def load_mmdet_checkpoint(path: str | Path, network: AnatomicalEmbeddingNet | MergedEmbeddingNet) -> None:
    """Fill a network from the weights that SAM's and UAE's authors released (``SAM.pth``, UAE-S).

    Source: names and shapes of the released model code of arXiv 2012.02383 and arXiv 2311.15111. The released file
    itself was not at hand. It wants images in the order SPL at 2 mm, intensities of [-50, 205].

    Args:
        path: a state dict, alone or under "state_dict", of names with or without ``module.`` in front.
        network: around an :class:`AnisotropicResNet`; of UAE-S with ``semantic=True``. Nothing is written on errors.

    Raises:
        OSError: no such file.
        KeyError: tensors of the file that the network lacks, or of the network that the file lacks, all listed.
        ValueError: the file cannot be read, or shapes differ.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in read_state_dict(path).items()}
    own = network.state_dict()
    ours = {name: _our_name(name) for name in state}
    unknown = [name for name, our in ours.items() if our not in own]
    counted = {our for our in ours.values() if our is not None}
    missing = [name for name in own if name not in counted and not name.endswith("num_batches_tracked")]
    if unknown or missing:
        raise KeyError(f"{path} has tensors that {type(network).__name__} lacks: {unknown}; it lacks {missing}")
    _fill(network, {str(ours[name]): tensor for name, tensor in state.items()}, str(path))


def inflate_resnet18(state_dict_2d: Mapping[str, Tensor] | str | Path, encoder: AnisotropicResNet) -> None:
    """Fill an encoder from a ResNet-18 of RGB pictures, as trained on ImageNet.

    Source: the initialisation of SAM (arXiv 2012.02383) in its released code. In 3D the colours of the stem become its
    three taps along the first axis; kernels of depth 1 are taken over, those of depth 3 repeated and divided by 3. In
    2D the stem is summed over colours. The first block's shortcut, which a ResNet-18 does not have because it pools
    there, keeps its weights, and ``fc`` is dropped.

    Args:
        state_dict_2d: torchvision's names, or a file with them; nothing is downloaded.
        encoder: of one input channel, 64 base channels and two blocks per layer. Nothing is written on errors.

    Raises:
        OSError: no such file.
        KeyError: tensors that do not belong together, all listed.
        ValueError: the file cannot be read, shapes differ, or the encoder has other than one input channel.
    """
    file = "the state dict" if isinstance(state_dict_2d, Mapping) else str(state_dict_2d)
    state = state_dict_2d if isinstance(state_dict_2d, Mapping) else read_state_dict(state_dict_2d)
    if encoder.conv1.in_channels != 1:
        raise ValueError(f"colours fill a stem of one input channel, the encoder has {encoder.conv1.in_channels}")
    own = encoder.state_dict()
    given = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    unknown = [name for name in given if name not in own]
    kept = ("layer1.0.downsample.", "num_batches_tracked")  # old files do not count batches
    missing = [n for n in own if n not in given and not n.startswith(kept[0]) and not n.endswith(kept[1])]
    if unknown or missing:
        raise KeyError(f"{file} has tensors that the encoder lacks: {unknown}; it lacks {missing}")
    _fill(encoder, {name: _inflated(name, tensor, own[name]) for name, tensor in given.items()}, file)


def _our_name(name: str) -> str | None:
    layer, _, tensor = name.rpartition(".")
    for theirs, ours in _NAMES:
        found = re.fullmatch(theirs, layer)
        if found:
            return f"{found.expand(ours)}.{tensor}"
    return None


def _inflated(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if name == "conv1.weight":
        # the RGB axis is the depth of a stem with one input channel: (64, 3, 7, 7) -> (64, 1, 3, 7, 7) or (64, 1, 7, 7)
        return tensor[:, None] if like.ndim == 5 else tensor.sum(1, keepdim=True)
    if like.ndim == 5 and tensor.ndim == 4:
        depth = like.shape[2]
        return tensor[:, :, None].expand(-1, -1, depth, -1, -1) / depth
    return tensor


def _fill(network: nn.Module, source: Mapping[str, Tensor], file: str) -> None:
    own = network.state_dict()
    differ = [
        f"{name} {tuple(tensor.shape)} in {file}, {tuple(own[name].shape)} in the network"
        for name, tensor in source.items()
        if tensor.shape != own[name].shape
    ]
    if differ:
        raise ValueError(f"nothing was loaded, shapes differ: {differ}")
    with torch.no_grad():
        network.load_state_dict(source, strict=False)
