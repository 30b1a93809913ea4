# SPDX-License-Identifier: Apache-2.0
"""The command ``register`` of ``python -m monai_ssl``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from inspect import signature
from typing import Any

from monai_ssl.apps import register, register_files
from monai_ssl.apps.registration.affine_fit import FIT_METHODS
from monai_ssl.apps.registration.grid_matches import MATCHINGS

__all__ = ["add_registration_command"]

REGISTER = """Register two scans by the anatomical embeddings of a trained network: move one onto the other.
  python -m monai_ssl register --moving a.nii.gz --fixed b.nii.gz --model bundles/sam_resnet18_ct --out DIR
Prints a line for each step, how much the field folds, and the files: transforms of ITK (.tfm, .h5), the displacement
(.nii.gz), the moving scan on the grid of the fixed one, a picture of before and after, and report.json. Transforms map
points of the fixed scan to the moving one, as resampling needs it."""

# option: argument of monai_ssl.apps.register, type or choices, help
OPTIONS: dict[str, tuple[str, Any, str]] = {
    "method": ("method", FIT_METHODS, "fit of the affine"),
    "matching": ("matching", MATCHINGS, "filter of the matches"),
    "min_score": ("min_score", float, "least similarity of a match, at most 1"),
    "stride": ("stride", int, "voxels between the points that are matched"),
    "node_spacing": ("node_spacing", int, "voxels between the nodes of the coarse field, of which 8 follows more"),
    "smoothness": ("coarse_smoothness", float, "of the coarse field, for node_spacing 8 give 0.4"),
    "max_residual": (
        "max_residual",
        float,
        "mm from the affine beyond which matches do not count for the coarse field",
    ),
    "coarse_steps": ("coarse_steps", int, "steps of its fit"),
    "instance_steps": ("instance_steps", int, "steps of the optimisation for this pair"),
    "instance_smoothness": ("instance_smoothness", float, "of the field that it finds"),
}


def add_registration_command(commands: Any) -> None:
    """Add the command to a parser's subparsers."""
    text = argparse.RawDescriptionHelpFormatter
    summary = "move one scan onto another"
    parser = commands.add_parser("register", help=summary, description=REGISTER, formatter_class=text)
    add = parser.add_argument
    add("--moving", required=True, help="scan that is moved: a file, or a folder with a DICOM series")
    add("--fixed", required=True, help="scan that it is moved onto")
    add("--model", required=True, help="bundle folder, or file of weights: bundle sam_resnet18_ct or samreg_unet_ct")
    add("--provenance", metavar="JSON", help="of the weights; encoder.json beside them if there is one")
    add("--out", "--output_dir", required=True, metavar="DIR", help="folder for the results")
    add("--steps", help="some of affine,coarse,deform,instance; affine,coarse, and deform if the model can")
    add("--moving_mask", metavar="FILE", help="where points of the moving scan may lie; its body")
    add("--fixed_mask", metavar="FILE", help="likewise of the fixed scan")
    add("--labels", metavar="FILE", help="label map of the moving scan, which is moved too")
    for name, (argument, kind, explanation) in OPTIONS.items():
        default = signature(register).parameters[argument].default
        form = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
        add(f"--{name}", default=default, help=explanation + ("" if default is None else f"; {default}"), **form)
    add("--seed", type=int, default=0, metavar="N", help="of method ransac; 0")
    add("--spacing", type=float, metavar="MM", help="of the network's input; that of the training")
    add("--percentiles", type=float, nargs=2, metavar=("LOW", "HIGH"), help="for MR, e.g. 0.2 99.8")
    add("--cache_dir", metavar="DIR", help="keep embeddings, some 300 MB per scan, for later calls")
    add("--slab_size", type=int, metavar="N", help="voxels along the body at a time, if memory is short")
    add("--device", help="such as cpu or cuda:1; a GPU where there is one")
    add("--formats", help="some of tfm,h5,nifti,warped; all of them")
    add("--no_picture", action="store_true", help="write no picture")
    parser.set_defaults(run=_register)


def _register(args: argparse.Namespace) -> int:
    given = {"spacing": args.spacing, "percentiles": args.percentiles}
    options = {argument: getattr(args, name) for name, (argument, _, _) in OPTIONS.items()}
    report = register_files(
        args.moving,
        args.fixed,
        args.model,
        args.out,
        args.steps,
        labels=args.labels,
        formats=args.formats,
        picture=not args.no_picture,
        preprocessing={key: value for key, value in given.items() if value is not None},
        provenance=args.provenance,
        matcher_options={"device": args.device, "cache_dir": args.cache_dir, "slab_size": args.slab_size},
        seed=args.seed,
        moving_mask=args.moving_mask,
        fixed_mask=args.fixed_mask,
        **options,
    )
    matching = next((step for step in report["steps"] if step in ("affine", "coarse")), None)
    for step, measured in report["steps"].items():
        print(_sentence(step, measured, report["counts"] if step == matching else {}))
    jacobian = report["jacobian"]
    spread = "none" if jacobian["sdlogj"] is None else f"{jacobian['sdlogj']:.3f}"
    print(f"folding: {100 * jacobian['folding_share']:.2g} % of the voxels, SDlogJ {spread}")
    print(f"results in {args.out}: {', '.join([*report['files'], 'report.json'])}")
    return 0


def _sentence(step: str, measured: Mapping[str, float], counts: Mapping[str, int]) -> str:
    parts = []
    if counts:
        parts.append(f"{list(counts.values())[-1]} matches kept of {counts['grid']} grid points")
    if "residual_mean_mm" in measured:
        mean, median = measured["residual_mean_mm"], measured["residual_median_mm"]
        parts.append(f"residual {mean:.1f} mm, median {median:.1f} mm")
    parts.append(f"{measured['seconds']:.1f} s")
    return f"{step}: {', '.join(parts)}"
