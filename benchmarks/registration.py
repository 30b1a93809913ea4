# SPDX-License-Identifier: Apache-2.0
"""Organs of one patient's scan moved onto another's, step by step and by other means: Dice, folding, seconds per pair.

    python -m benchmarks.registration STUDY.yaml --dataset_dir openkbp --output_dir OUT

The embedding and both networks are trained on volumes that are not tested, without labels. Each test volume is moved
onto the next one. Compared: the scans as they lie in the world; an affine by ITK (Mattes mutual information); the
affine and coarse steps on matched points, a U-Net after them and instance optimisation after that; and VoxelMorph, the
same U-Net without features, after ITK's affine. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from benchmarks.label_efficiency import REPOSITORY, run_bundle
from monai_ssl.apps import PointMatcher, load_matcher, load_registration, register_affine, register_coarse
from monai_ssl.apps.preprocessing import load_image
from monai_ssl.apps.registration import Registration, jacobian_determinant, write_alignment
from monai_ssl.apps.registration.deform import register_deform
from monai_ssl.apps.registration.instance import register_instance
from monai_ssl.data import build_datalist, registration_pairs
from monai_ssl.networks import RegistrationUNet, load_pretrained

Pair = dict[str, Any]
BODY = -17.4  # -500 HU on the scale of the network's input


def unmoved(matcher: PointMatcher, pair: Pair) -> Registration:
    """The scans as they lie in the world."""
    grid = matcher.prepare(pair["fixed"])
    empty = torch.zeros(0, 2, 3, dtype=torch.float64)
    affine = grid.affine.double()
    return Registration(torch.eye(4).double(), None, affine, tuple(grid.shape[1:]), empty, torch.zeros(0), {})


def itk_affine(matcher: PointMatcher, pair: Pair, seed: int) -> Registration:
    """Affine by ITK: Mattes mutual information, three resolutions, gradient descent, centres of mass to begin with."""
    import itk

    images = [matcher.prepare(pair[role]) for role in ("fixed", "moving")]
    fixed, moving = (_itk_image(itk, image) for image in images)
    kind = type(fixed)
    transform = itk.AffineTransform[itk.D, 3].New()
    centres = [_centre(image) for image in images]
    transform.SetCenter([float(v) for v in centres[0]])
    transform.SetTranslation([float(v) for v in centres[1] - centres[0]])
    metric = itk.MattesMutualInformationImageToImageMetricv4[kind, kind].New()
    metric.SetNumberOfHistogramBins(50)
    optimizer = itk.RegularStepGradientDescentOptimizerv4[itk.D].New()
    optimizer.SetLearningRate(1.0)
    optimizer.SetMinimumStepLength(1e-4)
    optimizer.SetNumberOfIterations(200)
    optimizer.SetRelaxationFactor(0.7)
    scales = itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New()
    scales.SetMetric(metric)
    optimizer.SetScalesEstimator(scales)
    method = itk.ImageRegistrationMethodv4[kind, kind].New()
    method.SetFixedImage(fixed)
    method.SetMovingImage(moving)
    method.SetMetric(metric)
    method.SetOptimizer(optimizer)
    method.SetInitialTransform(transform)
    method.InPlaceOn()
    method.SetNumberOfLevels(3)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SetMetricSamplingStrategy(itk.ImageRegistrationMethodv4Enums.MetricSamplingStrategy_REGULAR)
    method.SetMetricSamplingPercentage(0.2)
    method.MetricSamplingReinitializeSeed(seed)
    method.Update()
    linear = itk.array_from_matrix(transform.GetMatrix())
    shift = np.array(transform.GetTranslation())
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift + centre - linear @ centre
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS <-> RAS
    start = unmoved(matcher, pair)
    return Registration(
        torch.from_numpy(flip @ matrix @ flip), None, start.grid_affine, start.grid_size, start.points, start.scores, {}
    )


def _centre(image: MetaTensor) -> np.ndarray:
    """Centre of the body, LPS mm."""
    voxel = (image[0] > BODY).nonzero().double().mean(0).numpy()
    affine = image.affine.numpy()
    return (affine[:3, :3] @ voxel + affine[:3, 3]) * [-1, -1, 1]


def _itk_image(itk: Any, image: MetaTensor) -> Any:
    """(1, *size) with a RAS affine as an ITK image; both list the axes in opposite order."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine = flip @ image.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    result = itk.image_from_array(np.ascontiguousarray(image[0].numpy().astype(np.float32).T))
    result.SetSpacing([float(s) for s in spacing])
    result.SetOrigin([float(v) for v in affine[:3, 3]])
    result.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3] / spacing)))
    return result


def dice(result: Registration, pair: Pair, labels: Sequence[int]) -> dict[int, float]:
    """Of each organ that both scans show, on the fixed scan's own grid."""
    moving, fixed = load_image(pair["moving_label"]), load_image(pair["fixed_label"])
    warped = result.warp(moving, like=fixed, mode="nearest", padding_mode="zeros").as_tensor().round().long()
    target = fixed.as_tensor().round().long()
    source = set(torch.unique(moving.as_tensor().round().long()).tolist())
    found = {}
    for label in labels:
        a, b = warped == label, target == label
        if label in source and b.any():
            found[label] = float(2 * (a & b).sum() / (a.sum() + b.sum()))
    return found


class Study:
    """Files of the study in `output_dir`; every finished pair of a method leaves one."""

    def __init__(self, spec: dict[str, Any], dataset_dir: str, output_dir: Path) -> None:
        self.spec, self.out = spec, output_dir
        parts = build_datalist(dataset_dir, val_fraction=0.0, with_labels=True)
        items = sorted((item for part in parts.values() for item in part), key=lambda item: item["name"])
        random.Random(spec["split_seed"]).shuffle(items)
        self.test, self.pool = items[: spec["num_test"]], items[spec["num_test"] :]
        self.pairs = registration_pairs({"test": self.test})["test"][: spec["pairs"]]
        held = spec["num_validation"]
        lists = {"training": self.pool[held:], "validation": self.pool[:held]}
        self.lists = {part: [{"image": item["image"]} for item in entries] for part, entries in lists.items()}
        self.datalist = output_dir / "pretraining.json"
        output_dir.mkdir(parents=True, exist_ok=True)
        self.datalist.write_text(json.dumps(self.lists, indent=1))

    def train(self, part: dict[str, Any], name: str, extra: list[str], overrides: dict[str, Any]) -> Path:
        """Weights of a bundle, trained once."""
        models = self.out / name / "models"
        if not (models / "model.pt").is_file():
            places = {"output_dir": str(self.out / name / "eval"), "ckpt_dir": str(models), "seed": self.spec["seed"]}
            run_bundle(part, extra, {**places, "resume": any(models.glob("checkpoint*")), **overrides})
        return models / "model.pt"

    def measure(
        self, method: str, register: Callable[[Pair, Registration | None], Registration], after: str = ""
    ) -> None:
        """Register all pairs by a method, each after the result of another where one is named."""
        labels = list(self.spec["labels"])
        for number, pair in enumerate(self.pairs):
            file = self.out / "pairs" / method / f"{number:02d}.json"
            if file.is_file():
                continue
            before = torch.load(self._kept(after, number), weights_only=False) if after else None
            start = time.perf_counter()
            try:
                result, failure = register(pair, before), ""
            except ValueError as error:  # as it is documented: go on with the step before
                result, failure = before or unmoved(self.matcher, pair), str(error)
            seconds = time.perf_counter() - start
            determinant = jacobian_determinant(result.ddf())
            row = {
                "pair": pair["name"],
                "dice": dice(result, pair, labels),
                "folding": float((determinant <= 0).double().mean()),
                "seconds": seconds,
                "failure": failure,
                "report": {k: v for k, v in result.report.items() if isinstance(v, (int, float, str))},
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(result, self._kept(method, number))
            file.write_text(json.dumps(row, indent=1))
            print(
                f"{method}, {pair['name']}: Dice {np.mean(list(row['dice'].values())):.3f}, {seconds:.1f} s {failure}",
                flush=True,
            )

    def _kept(self, method: str, number: int) -> Path:
        return self.out / "pairs" / method / f"{number:02d}.pt"

    def row(self, method: str) -> str:
        files = sorted((self.out / "pairs" / method).glob("*.json"))[: len(self.pairs)]
        rows = [json.loads(file.read_text()) for file in files]
        means = [statistics.mean(row["dice"].values()) for row in rows]
        single = [[row["dice"][str(v)] for row in rows if str(v) in row["dice"]] for v in self.spec["labels"]]
        cells = " | ".join(f"{statistics.mean(values):.3f}" for values in single)
        failures = sum(bool(row["failure"]) for row in rows)
        folding, seconds = statistics.mean(r["folding"] for r in rows), statistics.median(r["seconds"] for r in rows)
        return (
            f"| {method} | {statistics.mean(means):.3f} ± {statistics.stdev(means):.3f} | {100 * folding:.3f} % "
            f"| {seconds:.1f} | {failures} | {cells} |"
        )

    def run(self) -> str:
        spec, seed = self.spec, self.spec["seed"]
        embedder = self.train(spec["embedder"], "embedder", [], {"dataset_dir": str(self.datalist)})
        self.matcher = matcher = load_matcher(embedder, device="cpu", cache_dir=self.out / "embeddings")
        coarse = spec["coarse"]
        options = lambda: {**spec["matching"], "generator": torch.Generator().manual_seed(seed)}
        self.measure("initial", lambda pair, _: unmoved(matcher, pair))
        self.measure("ITK affine", lambda pair, _: itk_affine(matcher, pair, seed))
        self.measure("SAM-affine", lambda pair, _: register_affine(matcher, pair["moving"], pair["fixed"], **options()))
        self.measure(
            "+ coarse",
            lambda pair, before: register_coarse(matcher, pair["moving"], pair["fixed"], initial=before, **coarse),
            "SAM-affine",
        )
        learned = self.train(
            spec["network"], "network", [], {"dataset_dir": str(self.datalist), "embedder_file": str(embedder)}
        )
        _, network = load_registration(learned, device="cpu")
        deform = lambda net: (
            lambda pair, before: register_deform(
                net, pair["moving"], pair["fixed"], initial=before, transform=matcher.transform
            )
        )
        self.measure("+ VoxelMorph", deform(network), "+ coarse")
        self.measure("VoxelMorph after ITK affine", deform(self.plain_voxelmorph(matcher, seed)), "ITK affine")
        instance = lambda pair, before: register_instance(matcher, pair["moving"], pair["fixed"], initial=before)
        self.measure("+ instance", instance, "+ VoxelMorph")
        methods = ["initial", "ITK affine", "SAM-affine", "+ coarse", "+ VoxelMorph", "+ instance"]
        return "\n".join([*self.header(), *(self.row(m) for m in [*methods, "VoxelMorph after ITK affine"])])

    def plain_voxelmorph(self, matcher: PointMatcher, seed: int) -> RegistrationUNet:
        """The same U-Net without features, trained on as many pairs, which ITK has aligned."""
        parts = registration_pairs(self.lists, self.spec["network"]["overrides"]["num_pairs"], seed)
        for part, pairs in parts.items():
            for number, pair in enumerate(pairs):
                file = self.out / "itk" / f"{part}_{number:03d}.pt"
                if not file.is_file():
                    write_alignment(file, itk_affine(matcher, pair, seed))
                pair["alignment"] = str(file)
        listed = self.out / "itk" / "pairs.json"
        listed.write_text(json.dumps(parts, indent=1, default=str))
        overrides = {"pairs": str(listed), "prealign": []}
        model = self.train(self.spec["network"], "voxelmorph", [self.spec["baseline"]], overrides)
        root = REPOSITORY / self.spec["network"]["bundle"] / "configs"
        config = ConfigParser.load_config_files([str(root / name) for name in self.spec["network"]["configs"]])
        network = RegistrationUNet(channels=config["channels"], up_channels=config["up_channels"])
        load_pretrained(network, model)
        return network

    def header(self) -> list[str]:
        names = " | ".join(self.spec["labels"].values())
        return [
            f"{self.spec['title']}: {len(self.pairs)} test pairs, {len(self.lists['training'])} volumes for training "
            f"without labels, split seed {self.spec['split_seed']}, seed {self.spec['seed']}, {datetime.date.today()}.",
            "",
            f"| | Dice, mean ± std over pairs | folding | seconds | failed | {names} |",
            "|---|---|---|---|---|" + "---|" * len(self.spec["labels"]),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    spec, out = yaml.safe_load(args.study.read_text()), args.output_dir.resolve()
    table = Study(spec, args.dataset_dir, out).run()
    (out / "table.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
