# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor
from monai.utils import IgniteInfo, min_version, optional_import

from monai_ssl.apps.registration import jacobian_determinant
from monai_ssl.handlers._processes import rank
from monai_ssl.visualize import plot_registration

Events, _ = optional_import("ignite.engine", IgniteInfo.OPT_IMPORT_VERSION, min_version, "Events")
if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["RegistrationPreview"]


class RegistrationPreview:
    """Draws the first pairs of an evaluation before and after the network, with the Jacobian determinant.

    For a MONAI evaluator with `decollate` whose postprocessing is `RegisteredPaird`. Of each item it takes `image`
    (2, *size), pre-aligned moving and fixed, `moved` (1, *size) and `ddf` (n, *size), the total displacement in voxels;
    `fixed` for proportions and directions and `name` for the heading, where they are there. Writes
    `<output_dir>/registration_<epoch>_<number>.png`, the epoch that of the trainer whose `ValidationHandler` runs the
    evaluator, else 1.

    Args:
        output_dir: folder of the pictures.
        max_items: pairs per evaluation; drawing takes about a second each.
        interval: evaluations from one with pictures to the next; the first has them.
    """

    def __init__(self, output_dir: str | Path, max_items: int = 3, interval: int = 1) -> None:
        if interval < 1 or max_items < 1:
            raise ValueError(f"`interval` and `max_items` must be at least 1, got {interval} and {max_items}.")
        self.output_dir = Path(output_dir)
        self.max_items = max_items
        self.interval = interval
        self._evaluations = 0
        self._drawn = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator; only the first process draws."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _started(self, _engine: Engine) -> None:
        self._drawn = 0 if self._evaluations % self.interval == 0 else self.max_items
        self._evaluations += 1

    def __call__(self, engine: Engine) -> None:
        """Draw the items of the batch, until there are `max_items`."""
        if not isinstance(engine.state.output, list):
            raise ValueError("RegistrationPreview needs the evaluator's items one by one: give it decollate=True")
        for batch, output in zip(engine.state.batch, engine.state.output):
            if self._drawn == self.max_items:
                return
            self._drawn += 1
            item = {**batch, **output}  # the postprocessing puts what is new into the output
            pair, moved = (torch.as_tensor(item[key]).as_subclass(torch.Tensor).cpu() for key in ("image", "moved"))
            fixed, place = pair[1:2], item.get("fixed")
            if isinstance(place, MetaTensor):
                fixed = MetaTensor(fixed, affine=place.affine)
            determinant = jacobian_determinant(torch.as_tensor(item["ddf"]).as_subclass(torch.Tensor).cpu()[None])
            file = self.output_dir / f"registration_{engine.state.epoch:04d}_{self._drawn}.png"
            plot_registration(fixed, pair[:1], moved, determinant, str(item.get("name", "")), file)
