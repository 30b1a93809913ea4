# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes with few labels from scratch and from pretrained encoders, and prints both in one table.

    python -m benchmarks.label_efficiency benchmarks/studies/hippocampus.yaml --dataset_dir DIR --output_dir OUT

A study file names the pretraining bundles (`arms`), the fine-tuning bundle, the numbers of labelled volumes and the
number of draws. Test volumes are fixed and never seen in pretraining; the learning rate is chosen for training from
scratch, on volumes that are neither trained on nor tested; both arms then get it and the same number of steps. Every
finished run leaves a file, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigWorkflow

from monai_ssl.data import build_datalist, select_labelled

REPOSITORY = Path(__file__).resolve().parent.parent
SCRATCH = "scratch"


def run_bundle(spec: dict[str, Any], extra_configs: list[str], overrides: dict[str, Any]) -> ConfigWorkflow:
    """Runs a bundle's configs with the study's and the caller's overrides, and returns the finished workflow."""
    root = REPOSITORY / spec["bundle"] / "configs"
    workflow = ConfigWorkflow(
        config_file=[str(root / name) for name in [*spec["configs"], *extra_configs]],
        meta_file=None,
        logging_file=False,
        workflow_type="train",
        **{**spec.get("overrides", {}), **overrides},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


class Study:
    """The runs of one study file; `output_dir` holds one folder per run and `results.json` in each finished one."""

    def __init__(self, spec: dict[str, Any], dataset_dir: str, output_dir: Path) -> None:
        self.spec = spec
        self.output_dir = output_dir
        items = [
            item
            for part in build_datalist(
                dataset_dir, val_fraction=0.0, with_labels=True, phantom=spec.get("phantom")
            ).values()
            for item in part
        ]
        items.sort(key=lambda item: item["name"])
        random.Random(spec["split_seed"]).shuffle(items)
        num_test, num_choice = spec["num_test"], spec["num_validation"]
        if len(items) <= num_test + num_choice + max(spec["num_labelled"]):
            raise ValueError(f"{dataset_dir or 'the phantom'} holds {len(items)} volumes, too few for this study")
        self.test, self.choice = items[:num_test], items[num_test : num_test + num_choice]
        self.pool = items[num_test + num_choice :]

    def datalist(self, name: str, training: list[dict], test: list[dict], labels: bool) -> str:
        """Writes a Decathlon datalist and returns its path; without labels for pretraining."""
        keys = ("image", "label") if labels else ("image",)
        parts = {"training": training, "test": test, "validation": []}
        if not labels:  # the pretext task is validated on part of its own pool
            held = max(2, round(self.spec.get("pretext_val_fraction", 0.1) * len(training)))
            parts = {"training": training[held:], "validation": training[:held], "test": []}
        path = self.output_dir / "datalists" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = {part: [{k: item[k] for k in keys} for item in entries] for part, entries in parts.items()}
        path.write_text(json.dumps(listed, indent=1))
        return str(path)

    def once(self, name: str, work: Any) -> dict[str, Any]:
        """The result of a run: read from its file, or computed and written there."""
        file = self.output_dir / name / "results.json"
        if file.is_file():
            return json.loads(file.read_text())
        start = time.perf_counter()
        result = {**work(self.output_dir / name), "minutes": (time.perf_counter() - start) / 60}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(file)
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float)), flush=True)
        return result

    def pretrain(self, arm: str) -> str:
        """Pretrains one arm on the pool's images and returns its weights; an interrupted run is resumed.

        An arm may say `after`, the arm whose weights it starts from, and `file`, the name of its own.
        """
        spec = self.spec["arms"][arm]

        def work(folder: Path) -> dict[str, Any]:
            models = folder / "models"
            workflow = run_bundle(
                spec,
                [],
                {
                    "dataset_dir": self.datalist(f"pretrain_{arm}", self.pool, [], labels=False),
                    "output_dir": str(folder / "eval"),
                    "ckpt_dir": str(models),
                    "resume": any(models.glob("checkpoint*")),
                    "seed": self.spec.get("seed", 0),
                    **before,
                },
            )
            metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
            return {k: float(v) for k, v in metrics.items()}

        before = {"pretrained": self.pretrain(spec["after"])} if "after" in spec else {}  # the stage before
        self.once(f"pretrain_{arm}", work)
        return str(self.output_dir / f"pretrain_{arm}" / "models" / spec.get("file", "encoder.pt"))

    def finetune(self, arm: str, count: int, draw: int, lr: float, encoder: str, choosing: bool) -> dict[str, Any]:
        """Trains on `count` labelled volumes and evaluates on the test volumes, or on those for choosing the rate."""
        spec = self.spec["finetune"]
        training = select_labelled(self.pool, count, seed=draw)
        name = f"lr_{count}_{lr:g}" if choosing else f"{arm}_{count}_{lr:g}_{draw}"
        test = self.choice if choosing else self.test

        def work(folder: Path) -> dict[str, Any]:
            batches = math.ceil(count / spec["overrides"]["batch_size"])
            common = {
                "dataset_dir": self.datalist(name, training, test, labels=True),
                "output_dir": str(folder / "eval"),
                "ckpt_dir": str(folder / "models"),
                "lr": lr,
                "seed": self.spec.get("seed", 0) + draw,
                "max_epochs": math.ceil(spec["steps"] / batches),
            }
            resume = any((folder / "models").glob("checkpoint*"))
            run_bundle(spec, [], {**common, "pretrained": encoder, "resume": resume})
            evaluated = run_bundle(spec, [spec.get("evaluate", "evaluate.yaml")], {**common, "save_predictions": False})
            state = evaluated.parser.get_parsed_content("validate#evaluator").state
            dice = state.metric_details["mean_dice"]
            return {
                **{k: float(v) for k, v in state.metrics.items()},
                "cases": dice.nanmean(dim=1).tolist(),
                "classes": dice.nanmean(dim=0).tolist(),
                "training": [item["name"] for item in training],
                "lr": lr,
            }

        result = self.once(name, work)
        for file in (self.output_dir / name / "models").glob("checkpoint*"):
            file.unlink()  # finished: model.pt is enough
        return result

    def run(self) -> str:
        """The whole study; returns its table as Markdown."""
        encoders = {SCRATCH: "", **{arm: self.pretrain(arm) for arm in self.spec["arms"]}}
        rows = []
        for count in self.spec["num_labelled"]:
            tried = {lr: self.finetune(SCRATCH, count, 100, lr, "", choosing=True) for lr in self.spec["lr"]}
            lr = max(tried, key=lambda key: tried[key]["mean_dice"])
            runs = {
                arm: [self.finetune(arm, count, d, lr, encoder, choosing=False) for d in range(self.spec["draws"])]
                for arm, encoder in encoders.items()
            }
            rows += [table_row(count, arm, lr, runs[arm], runs[SCRATCH]) for arm in runs]
        return "\n".join([*self.header(), *rows])

    def header(self) -> list[str]:
        spec = self.spec
        return [
            f"{spec['title']}. {len(self.pool)} volumes for pretraining (images only) and label draws, "
            f"{len(self.test)} test volumes, {spec['finetune']['steps']} steps for every arm, {spec['draws']} draws, "
            f"split seed {spec['split_seed']}, run seed {spec.get('seed', 0)} + draw, {datetime.date.today()}.",
            "",
            "| labelled | encoder | learning rate | Dice, mean ± std over draws | surface distance, mm "
            "| Dice against scratch, mean (draws won) |",
            "|---|---|---|---|---|---|",
        ]


def table_row(count: int, arm: str, lr: float, runs: list[dict[str, Any]], scratch: list[dict[str, Any]]) -> str:
    """One line of the table: an arm at a number of labelled volumes, paired with scratch draw by draw."""
    dice = [run["mean_dice"] for run in runs]
    surface = [run["surface_distance_mm"] for run in runs]
    spread = statistics.stdev(dice) if len(dice) > 1 else math.nan
    gains = [run["mean_dice"] - other["mean_dice"] for run, other in zip(runs, scratch)]
    versus = "" if arm == SCRATCH else f"{statistics.mean(gains):+.4f} ({sum(g > 0 for g in gains)} of {len(gains)})"
    return (
        f"| {count} | {arm} | {lr:g} | {statistics.mean(dice):.4f} ± {spread:.4f} | {statistics.mean(surface):.2f} "
        f"| {versus} |"
    )


def pictures(output_dir: Path) -> list[Path]:
    """What a reader should open: pretext views, curves, and the overlays of the first draw of each arm."""
    found = [*output_dir.glob("pretrain_*/eval/preview_*.png"), *output_dir.glob("pretrain_*/eval/curves.png")]
    return sorted(found) + sorted(output_dir.glob("*_[0-9]*_0/eval/overlays/*.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file, e.g. benchmarks/studies/demo.yaml")
    parser.add_argument("--dataset_dir", default="", help="labelled volumes; empty: the embedded phantom")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs; the same one resumes")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR", help="another pretraining arm")
    args = parser.parse_args()
    spec = yaml.safe_load(args.study.read_text())
    for entry in args.bundle:
        name, _, bundle = entry.partition("=")
        template = next(iter(spec["arms"].values()))
        spec["arms"][name] = {**template, "bundle": bundle}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = Study(spec, args.dataset_dir, args.output_dir.resolve()).run()
    (args.output_dir / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nPictures:")
    for picture in pictures(args.output_dir):
        print(f"  {picture}")
    print(f"Delete {args.output_dir} to run anew.")


if __name__ == "__main__":
    main()
