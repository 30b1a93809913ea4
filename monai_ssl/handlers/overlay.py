# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor
from monai.utils import IgniteInfo, min_version, optional_import

from monai_ssl.visualize import plot_overlay

Events, _ = optional_import("ignite.engine", IgniteInfo.OPT_IMPORT_VERSION, min_version, "Events")
if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["OverlayHandler"]


class OverlayHandler:
    """Draws the first cases of an evaluation: the scan with the outline of its label and of the prediction.

    For a MONAI evaluator with `decollate` and a postprocessing that leaves one-hot `pred` and `label`, (C, *spatial),
    on the grid of `image`. Each picture is `<output_dir>/<number>_<name>.png` and is drawn anew at each evaluation.

    Args:
        output_dir: folder of the pictures.
        max_items: cases per evaluation; drawing takes about a second each.
        name_key: key of the case's name in the batch.
    """

    def __init__(self, output_dir: str | Path, max_items: int = 3, name_key: str = "name") -> None:
        self.output_dir = Path(output_dir)
        self.max_items = max_items
        self.name_key = name_key
        self._drawn = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _reset(self, _engine: Engine) -> None:
        self._drawn = 0

    def __call__(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output):
            if self._drawn == self.max_items:
                return
            self._drawn += 1
            name = Path(str(batch.get(self.name_key, "case"))).name
            image = output["image"]
            spacing = image.pixdim.tolist() if isinstance(image, MetaTensor) else None
            label, prediction = (torch.as_tensor(output[key]).argmax(0) for key in ("label", "pred"))
            file = self.output_dir / f"{self._drawn:02d}_{name.split('.')[0]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            plot_overlay(torch.as_tensor(image)[0], label, prediction, file, title=name, spacing=spacing)
