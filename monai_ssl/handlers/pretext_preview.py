# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the network is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import

from monai_ssl.handlers._processes import rank
from monai_ssl.visualize import Panel, draw_panels, figure_image

__all__ = ["PretextPreview"]

SummaryWriter, _ = optional_import("torch.utils.tensorboard", name="SummaryWriter")


class PretextPreview:
    """Draw the first batch of an epoch with its target in words, before the network sees it.

    Writes ``<output_dir>/preview_epoch=0001.png`` and, with ``log_dir``, an image for TensorBoard.

    Args:
        panels: maps a batch to what is drawn, such as ``voco_panels`` with its sizes given.
        output_dir: folder of the pictures.
        interval: epochs from one picture to the next; the first is drawn at once.
        max_items: number of volumes of the batch that are drawn.
        log_dir: folder of TensorBoard's files, which get a subfolder ``preview``: of several files in one folder
            TensorBoard follows the newest only. None: none are written.
    """

    def __init__(
        self,
        panels: Callable[[dict[str, Any]], Sequence[Panel]],
        output_dir: str | Path,
        interval: int = 1,
        max_items: int = 2,
        log_dir: str | Path | None = None,
    ) -> None:
        if interval < 1 or max_items < 1:
            raise ValueError(f"`interval` and `max_items` must be at least 1, got {interval} and {max_items}.")
        self.panels = panels
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.max_items = max_items
        self.log_dir = log_dir
        self._due = False
        self._writer: Any = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; only the first process draws."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _epoch_started(self, engine: Engine) -> None:
        self._due = (engine.state.epoch - 1) % self.interval == 0

    def __call__(self, engine: Engine) -> None:
        """Draw if this is the first batch of an epoch whose turn it is."""
        if not self._due:
            return
        self._due = False
        figure = draw_panels(self.panels(_first(engine.state.batch, self.max_items)))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output_dir / f"preview_epoch={engine.state.epoch:04d}.png")
        if self.log_dir is not None:
            if self._writer is None:
                self._writer = SummaryWriter(str(Path(self.log_dir) / "preview"))
            self._writer.add_image("pretext_preview", figure_image(figure), engine.state.epoch, dataformats="HWC")
            self._writer.flush()

    def _close(self, engine: Engine) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _first(batch: Mapping[str, Any], items: int) -> dict[str, Any]:
    several = (torch.Tensor, np.ndarray, list, tuple)
    return {key: value[:items] if isinstance(value, several) else value for key, value in batch.items()}
