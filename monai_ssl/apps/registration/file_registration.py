# SPDX-License-Identifier: Apache-2.0
"""Two scans registered, from files to files: transforms, the warped scan and label map, a picture and a report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_ssl.data.files import atomic_path, strip_suffix

from ..preprocessing import affine_of, image_name, load_image
from .fields import jacobian_determinant, jacobian_statistics
from .inner_step import on_grid
from .model_file import load_registration
from .pipeline import STEPS, register
from .result import Registration
from .transform_files import FORMATS, check_formats, write_image

__all__ = ["register_files"]

_TISSUE = (-200.0, 300.0)  # HU that pictures of CT show


def register_files(
    moving: str | Path,
    fixed: str | Path,
    model: str | Path,
    output_dir: str | Path,
    steps: str | Sequence[str] | None = None,
    *,
    labels: str | Path | None = None,
    formats: str | Sequence[str] | None = None,
    picture: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: str | Path | None = None,
    matcher_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Register two scans and write what is found into one folder, after all that is given has been checked.

    Its files are called after both scans, `<moving>_to_<fixed>` and then the endings of :meth:`Registration.save`,
    `_labels.nii.gz` and `.png`; beside them lies `report.json`.

    Args:
        moving: scan that is moved, a file or a folder with a DICOM series.
        fixed: scan that it is moved onto, likewise.
        model: of :func:`load_registration`.
        output_dir: folder, made if absent; files of the same name are replaced.
        steps: of :func:`register`, as names or in one text with commas; None: affine and coarse, and deform if the
            model holds a registration network.
        labels: label map of the moving scan, on its grid, to be warped too, by nearest neighbour.
        formats: of :meth:`Registration.save`, as names or in one text with commas; None: all, in 2D the warped image.
        picture: draw both scans before and after, and the Jacobian determinant.
        preprocessing: of :func:`load_registration`.
        provenance: likewise.
        matcher_options: likewise, such as `device`, `cache_dir` and `slab_size`.
        seed: of the trials of `method="ransac"`.
        options: of :func:`register`, such as `moving_mask`, `method`, `min_score` or `node_spacing`.

    Returns:
        the report, as written: the scans and steps, what :func:`register` reports, `jacobian`, see
        :func:`jacobian_statistics`, and `files`, the names of the files.

    Raises:
        OSError: a file is not there, or cannot be written.
        ValueError: files or arguments that cannot be used.
    """
    _check_files({"moving": moving, "fixed": fixed, "labels": labels, **options})
    matcher, network = load_registration(model, preprocessing, provenance, **(matcher_options or {}))
    steps = _steps(steps, network is not None, model)
    target = matcher.prepare(fixed)
    scans = {"moving": load_image(moving, target.ndim - 1), "fixed": load_image(fixed, target.ndim - 1)}
    kinds = _formats(formats, target)
    painted = None if labels is None else _label_map(labels, scans["moving"])
    result = register(
        **scans, steps=steps, matcher=matcher, network=network,
        generator=torch.Generator().manual_seed(seed), **options,
    )  # fmt: skip
    names = [strip_suffix(os.path.basename(os.path.abspath(scan))) for scan in (moving, fixed)]
    folder, name = Path(output_dir), "_to_".join(names)
    files = result.save(folder, name, kinds, moving=scans["moving"], like=scans["fixed"])
    if painted is not None:
        files.append(folder / f"{name}_labels.nii.gz")
        write_image(files[-1], result.warp(painted, scans["fixed"], "nearest", "zeros"))
    determinant = jacobian_determinant(result.ddf()).cpu()
    if picture:
        files.append(folder / f"{name}.png")
        limits = None if matcher.body_threshold is None else _TISSUE  # it is known for CT alone
        _draw(result, scans, determinant, f"{' to '.join(names)}: {', '.join(steps)}", files[-1], limits)
    report: dict[str, Any] = {
        "moving": str(moving),
        "fixed": str(fixed),
        "model": str(model),
        "chosen_steps": list(steps),
    }
    report |= {**result.report, "jacobian": jacobian_statistics(determinant), "files": [file.name for file in files]}
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=4) + "\n", encoding="utf-8")
    return report


def _check_files(given: Mapping[str, Any]) -> None:
    for name in ("moving", "fixed", "labels", "moving_mask", "fixed_mask"):
        file = given.get(name)
        if isinstance(file, (str, os.PathLike)) and not Path(file).exists():
            raise FileNotFoundError(f"{name} {file} does not exist")


def _steps(steps: str | Sequence[str] | None, trained: bool, model: str | Path) -> tuple[str, ...]:
    if steps is None:
        return STEPS[: 3 if trained else 2]
    names = _names(steps)
    if "deform" in names and not trained:
        raise ValueError(
            f"step deform needs a registration network, and model {model} holds an embedding alone: leave deform out "
            "of steps, or give a model of bundle samreg_unet_ct"
        )
    return names


def _formats(formats: str | Sequence[str] | None, target: MetaTensor) -> tuple[str, ...]:
    n = target.ndim - 1
    kinds = (tuple(FORMATS) if n == 3 else ("warped",)) if formats is None else tuple(filter(None, _names(formats)))
    check_formats(kinds, affine_of(target))
    return kinds


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))


def _label_map(labels: str | Path, moving: MetaTensor) -> MetaTensor:
    """A label map of whole numbers, int16 or wider."""
    found = load_image(labels, moving.ndim - 1)
    same = tuple(found.shape) == (1, *moving.shape[1:]) and torch.allclose(found.affine, moving.affine, atol=1e-2)
    if not same:
        raise ValueError(
            f"labels {labels} {tuple(found.shape)} must be one channel on the grid of moving {image_name(moving)} "
            f"{tuple(moving.shape)}, with the same affine: resample it to that scan, by nearest neighbour"
        )
    values = found.as_tensor()
    if not torch.equal(values, values.round()):
        raise ValueError(f"labels {labels} holds values that are not whole numbers: is it a label map?")
    wide = bool((values.abs() > torch.iinfo(torch.int16).max).any())
    return MetaTensor(values.to(torch.int32 if wide else torch.int16), affine=found.affine)


def _draw(
    result: Registration,
    scans: Mapping[str, MetaTensor],
    determinant: Tensor,
    title: str,
    file: Path,
    limits: tuple[float, float] | None,
) -> None:
    """All on the grid of the result, the moving scan first by the world coordinates of the files alone."""
    from monai_ssl.visualize import plot_registration  # which is built on metrics, and those on this package

    unmoved = on_grid(None, result.grid_affine, result.grid_size)
    shown = [
        transform.warp(scans[name][:1], padding_mode="background")
        for transform, name in ((unmoved, "fixed"), (unmoved, "moving"), (result, "moving"))
    ]
    fixed, before, after = shown
    plot_registration(fixed, before, after, determinant, title, file, limits)
