# SPDX-License-Identifier: Apache-2.0
"""What is known of many pairs before a network is trained on them: their affine and coarse registration, as files."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from torch import nn
from tqdm import tqdm

from monai_ssl.data.files import atomic_path, file_signature, is_first_process
from monai_ssl.networks import load_pretrained
from monai_ssl.networks.state_file import load_file, read_state_dict
from monai_ssl.transforms.linear_resize import resize_linear

from ..image_embedding import tensor_digest
from ..point_matcher import PointMatcher
from .pipeline import register
from .result import Registration

__all__ = ["align_pairs", "load_embedder", "read_alignment", "write_alignment"]

logger = logging.getLogger(__name__)
_PREFIX = "embedder."  # of EmbeddingRegistrationNet
_NODE = 8  # voxels between the nodes that are kept of a coarse field, whose own nodes are 16 apart


def load_embedder(embedder: nn.Module, file: str | Path) -> nn.Module:
    """Fill a network of embeddings, strictly, and return it.

    Args:
        embedder: of the architecture of the file.
        file: models/model.pt of a SAM bundle, or of a registration bundle, whose embedder is taken; "random" keeps the
            weights as they are, to try a pipeline out.

    Raises:
        ValueError: no file was named, or it does not fit.
        OSError: no such file.
    """
    if not str(file):
        raise ValueError(
            "embedder_file is empty: train bundles/sam_resnet18_ct and give its models/model.pt, with base_channels "
            "and embed_dim as there, or --embedder_file random to try the pipeline without"
        )
    if str(file) == "random":
        return embedder
    state = read_state_dict(file)
    part = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    if not part:
        load_pretrained(embedder, file)
        return embedder
    try:
        embedder.load_state_dict(part)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(
            f"the embedder in {file} is another network: {first} Give base_channels and embed_dim as in its training, "
            "or the same list of configs (small.yaml)"
        ) from error
    return embedder


def align_pairs(
    pairs: Sequence[Mapping[str, Any]],
    matcher: PointMatcher,
    cache_dir: str | Path,
    steps: Sequence[str] = ("affine", "coarse"),
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Register each pair by its embeddings, once: a file for each in `cache_dir`, which later runs read.

    Of several processes each takes its share. A pair that cannot be aligned, for lack of confident matches say, is left
    out with a warning that names it.

    Args:
        pairs: with "moving", "fixed" and "name"; one that has an "alignment" keeps it.
        matcher: embeds the images.
        cache_dir: folder of the files. They depend on the images, the network, its transform, the steps and the
            options.
        steps: of :func:`register`: "affine", "coarse"; none: images are taken to lie in one space.
        progress: show a bar.
        seed: of the trials of method "ransac", for each pair anew.
        options: of :func:`register`.

    Returns:
        the pairs with "alignment", the file of :func:`read_alignment`.

    Raises:
        ValueError: no pair can be aligned, with the first reason.
    """
    folder = Path(cache_dir)
    known = tensor_digest(
        matcher.weights_sha256, _transform_digest(matcher), matcher.body_threshold, tuple(steps), seed,
        sorted(options.items()),
    )  # fmt: skip
    files = [Path(pair.get("alignment") or folder / f"{_key(pair, known)}.pt") for pair in pairs]
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    # shared out before looking: other processes may have written some of theirs by now
    missing = [(pair, file) for pair, file in list(zip(pairs, files))[rank::size] if not file.is_file()]
    for pair, file in tqdm(missing, "aligning pairs", disable=not (progress and missing and is_first_process())):
        try:
            trials = torch.Generator().manual_seed(seed)
            found = register(pair["moving"], pair["fixed"], steps, matcher=matcher, generator=trials, **options)
            write_alignment(file, found)
        except ValueError as error:
            with atomic_path(file) as temporary:
                torch.save({"refused": str(error)}, temporary)
    if size > 1:
        dist.barrier()
    refused = {pair["name"]: reason for pair, file in zip(pairs, files) if (reason := load_file(file).get("refused"))}
    if refused and len(refused) == len(pairs):
        name, reason = next(iter(refused.items()))
        raise ValueError(f"none of {len(pairs)} pairs can be aligned; {name}: {reason}")
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(pairs)} pairs cannot be aligned and are left out: "
            + "; ".join(f"{name} ({reason})" for name, reason in list(refused.items())[:5]),
            stacklevel=2,
        )
    return [{**pair, "alignment": str(file)} for pair, file in zip(pairs, files) if pair["name"] not in refused]


def write_alignment(file: str | Path, result: Registration) -> None:
    """Keep a registration, its displacement at every eighth voxel: some 200 kB instead of 100 MB for a trunk at 2 mm.

    Args:
        file: to write; it appears whole or not at all, and its folder is made.
        result: to keep, with the matches but without the report.
    """
    content = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if result.displacement is not None:
        nodes = [max(2, (length - 1) // _NODE + 1) for length in result.grid_size]
        content["displacement"] = resize_linear(result.displacement, nodes, align_corners=True)
    content["grid_size"], content["report"] = list(result.grid_size), {}
    with atomic_path(Path(file)) as temporary:
        torch.save(content, temporary)


def read_alignment(file: str | Path) -> Registration:
    """The registration in a file, its displacement on the whole grid.

    Args:
        file: of :func:`write_alignment`.

    Raises:
        OSError: no such file.
        ValueError: another kind of file.
    """
    content = load_file(Path(file))
    if "grid_size" not in content or "affine" not in content:
        raise ValueError(f"{file} holds no registration: it was not written by write_alignment")
    content["grid_size"] = tuple(content["grid_size"])
    if content["displacement"] is not None:
        content["displacement"] = resize_linear(content["displacement"], content["grid_size"], align_corners=True)
    return Registration(**content)


def _key(pair: Mapping[str, Any], known: str) -> str:
    return tensor_digest([file_signature(pair[role]) for role in ("moving", "fixed")], known)


def _transform_digest(matcher: PointMatcher) -> str:
    """Spacing and intensities decide on the result as the weights do; a Compose itself also holds a random state."""
    transform = matcher.transform
    try:
        return pickle_hashing(transform.flatten().transforms if isinstance(transform, Compose) else transform).decode()
    except Exception as error:  # pickle raises PicklingError, AttributeError or TypeError
        raise ValueError(
            f"the transform of matcher must be one that can be pickled, to know its results again ({error}): replace a "
            "lambda by a function of a module"
        ) from error
