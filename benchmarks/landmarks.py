# SPDX-License-Identifier: Apache-2.0
"""Organ centres of one patient found in others by the embedding of SAM, and by simpler means.

    python -m benchmarks.landmarks benchmarks/studies/openkbp_landmarks.yaml --dataset_dir openkbp --output_dir OUT

The network is trained on volumes that are not tested, without labels. A centre (centroid of a label) of each template
is searched in all other test volumes; the error is the distance to the centroid there. Compared with: the same network
with random weights; the same place relative to the box around the body; the place whose surroundings correlate best
with those of the template point (normalised cross-correlation of patches). The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Spacing

from benchmarks.label_efficiency import run_bundle
from monai_ssl.apps import PointMatcher, load_matcher
from monai_ssl.data import build_datalist

Answer = Callable[
    [Any, Any, np.ndarray], np.ndarray
]  # template, query, points (P, 3) in RAS mm -> the same in the query


class Scan:
    """A test volume: its file, the centres of its labels in RAS mm, and the image at a coarse spacing."""

    def __init__(self, item: dict[str, Any], spacing: float, body: float) -> None:
        load = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS", labels=None)])
        label, image = load(item["label"]), load(item["image"])
        self.file, self.name = item["image"], item["name"]
        self.image: MetaTensor = Spacing([spacing] * 3, mode="bilinear")(image)
        inside = (self.image[0] > body).nonzero().float()
        self.box = torch.stack([inside.amin(0), inside.amax(0)]).double().numpy()
        affine = label.affine.numpy()
        values = [int(v) for v in torch.unique(label) if v > 0]
        centres = {v: (label[0] == v).nonzero().double().mean(0).numpy() for v in values}
        self.centres = {v: affine[:3, :3] @ c + affine[:3, 3] for v, c in centres.items()}


def world(scan: Scan, index: np.ndarray) -> np.ndarray:
    affine = scan.image.affine.numpy()
    return index @ affine[:3, :3].T + affine[:3, 3]


def voxel(scan: Scan, points: np.ndarray) -> np.ndarray:
    affine = scan.image.affine.numpy()
    return (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


def by_position(template: Scan, query: Scan, points: np.ndarray) -> np.ndarray:
    """The same place relative to the box around the body."""
    share = (voxel(template, points) - template.box[0]) / (template.box[1] - template.box[0])
    return world(query, query.box[0] + share * (query.box[1] - query.box[0]))


def by_correlation(size: int) -> Answer:
    """The place whose patch of `size` voxels along each axis correlates best."""

    def answer(template: Scan, query: Scan, points: np.ndarray) -> np.ndarray:
        half, image = size // 2, query.image.as_tensor()[None].clamp(-200, 300)
        source = F.pad(template.image.as_tensor().clamp(-200, 300), [half] * 6, value=-200.0)[0]
        padded, ones = F.pad(image, [half] * 6, value=-200.0), torch.ones(1, 1, size, size, size)
        mean = F.conv3d(padded, ones) / size**3
        spread = (F.conv3d(padded**2, ones) / size**3 - mean**2).clamp_min(1.0).sqrt()
        found = []
        for start in np.rint(voxel(template, points)).astype(int):
            start = np.clip(start, 0, np.array(source.shape) - size)
            patch = source[tuple(slice(s, s + size) for s in start)]
            patch = (patch - patch.mean()) / patch.std().clamp_min(1.0)
            score = F.conv3d(padded, patch[None, None]) / size**3 / spread
            found.append(np.unravel_index(int(score.argmax()), score.shape[2:]))
        return world(query, np.array(found, dtype=float))

    return answer


def by_embedding(matcher: PointMatcher) -> Answer:
    def answer(template: Scan, query: Scan, points: np.ndarray) -> np.ndarray:
        return matcher.match(template.file, query.file, torch.as_tensor(points)).points.numpy()

    return answer


def errors(answer: Answer, scans: Sequence[Scan], templates: int) -> dict[int, list[float]]:
    """Distances in mm by label, over all pairs of a template and another scan."""
    found: dict[int, list[float]] = {}
    for template in scans[:templates]:
        for query in scans:
            labels = sorted(set(template.centres) & set(query.centres))
            if query is template or not labels:
                continue
            points = answer(template, query, np.stack([template.centres[v] for v in labels]))
            for label, point in zip(labels, points):
                found.setdefault(label, []).append(float(np.linalg.norm(point - query.centres[label])))
    return found


def row(name: str, found: dict[int, list[float]], labels: Sequence[int]) -> str:
    every = np.concatenate([found[v] for v in labels])
    single = " | ".join(f"{np.median(found[v]):.1f}" for v in labels)
    return f"| {name} | {np.median(every):.1f} | {every.mean():.1f} | {100 * (every <= 10).mean():.0f} % | {single} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    spec, out = yaml.safe_load(args.study.read_text()), args.output_dir.resolve()
    parts = build_datalist(args.dataset_dir, val_fraction=0.0, with_labels=True)
    items = sorted((item for part in parts.values() for item in part), key=lambda item: item["name"])
    random.Random(spec["split_seed"]).shuffle(items)
    test, pool = items[: spec["num_test"]], items[spec["num_test"] :]
    out.mkdir(parents=True, exist_ok=True)
    lists = {"training": pool[spec["num_validation"] :], "validation": pool[: spec["num_validation"]]}
    listed = {part: [{"image": item["image"]} for item in entries] for part, entries in lists.items()}
    (out / "pretraining.json").write_text(json.dumps(listed, indent=1))
    models = out / "models"
    if not (models / "model.pt").is_file():
        places = {
            "dataset_dir": str(out / "pretraining.json"),
            "output_dir": str(out / "eval"),
            "ckpt_dir": str(models),
        }
        run_bundle(spec["arm"], [], {**places, "resume": any(models.glob("checkpoint*")), "seed": spec["seed"]})
    scans = [Scan(item, spec["spacing"], spec["body"]) for item in test]
    trained, untrained = (load_matcher(models / "model.pt", device="cpu") for _ in range(2))
    torch.manual_seed(spec["seed"])
    for module in untrained.network.modules():
        if module is not untrained.network and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    answers = {
        "SAM": by_embedding(trained),
        "the same network, random weights": by_embedding(untrained),
        "same place in the box around the body": by_position,
        f"correlation of patches of {spec['patch']} x {spec['spacing']:g} mm": by_correlation(spec["patch"]),
    }
    found = {name: errors(answer, scans, spec["templates"]) for name, answer in answers.items()}
    labels = sorted(set.intersection(*(set(entry) for entry in found.values())))
    names = spec.get("labels", {})
    count = sum(len(v) for v in next(iter(found.values())).values())
    lines = [
        f"{spec['title']}: {len(listed['training'])} volumes for training without labels, {len(test)} test volumes, "
        f"{spec['templates']} of them as templates, {count} searches, split seed {spec['split_seed']}, seed "
        f"{spec['seed']}, {datetime.date.today()}. Errors in mm.",
        "",
        "| | median | mean | within 10 mm | " + " | ".join(f"{names.get(v, v)}, median" for v in labels) + " |",
        "|---|---|---|---|" + "---|" * len(labels),
        *(row(name, entry, labels) for name, entry in found.items()),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
