# SPDX-License-Identifier: Apache-2.0
"""One progress bar for a whole run, or a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from ignite.engine import Engine, Events
from tqdm import tqdm

from monai_ssl.handlers._processes import rank
from monai_ssl.handlers._run_state import scalar_metrics

__all__ = ["RunProgressBar"]


class RunProgressBar:
    """Show iterations done, time left, loss and learning rate of the whole run, and each validation's metrics.

    A terminal shows a bar; elsewhere (a log file of a cluster) a line appears after 30 s, then at longer and longer
    gaps of up to 10 minutes, so that a run of days makes hundreds of lines. A resumed run counts on from its checkpoint
    and reckons the time left from its own speed.

    Args:
        optimizer: where the learning rate is read; None takes the trainer's.
        evaluator: engine whose metrics are shown after each of its runs.
        interval: iterations between two looks at the loss, each of which waits for the device.
        first_gap: seconds between the first lines where there is no terminal.
        file: stream; None is standard error.
    """

    def __init__(
        self,
        optimizer: Any = None,
        evaluator: Engine | None = None,
        interval: int = 10,
        first_gap: float = 30.0,
        file: TextIO | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.interval = interval
        self.first_gap = first_gap
        self.file = file
        self._bar: tqdm | None = None
        self._begun = (0.0, 0)  # seconds, iteration
        self._shown = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer; only the first process shows anything."""
        if rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._validated, engine)

    def _open(self, engine: Engine) -> None:
        self._begun = (time.monotonic(), engine.state.iteration)
        self._shown = self._begun[0]
        if self._stream().isatty():
            self._bar = tqdm(
                total=_total(engine), initial=engine.state.iteration, file=self._stream(), dynamic_ncols=True
            )

    def _advance(self, engine: Engine) -> None:
        iteration = engine.state.iteration
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)  # draws at most every 0.1 s
        if iteration % self.interval and iteration != _total(engine):
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(engine), refresh=False)
            return
        now = time.monotonic()
        gap = min(max(self.first_gap, 0.05 * (now - self._begun[0])), 600.0)
        if now - self._shown >= gap or iteration == _total(engine):
            self._shown = now
            self._write(self._line(engine, now - self._begun[0]))

    def _validated(self, evaluator: Engine, engine: Engine) -> None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in scalar_metrics(evaluator).items())
        self._write(f"validation after epoch {engine.state.epoch}: {numbers}")

    def _close(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _numbers(self, engine: Engine) -> str:
        optimizer = getattr(engine, "optimizer", None) if self.optimizer is None else self.optimizer
        rate = "" if optimizer is None else f", lr {optimizer.param_groups[0]['lr']:.3g}"
        loss = float(engine.state.output["loss"].detach())
        return f"epoch {engine.state.epoch}/{engine.state.max_epochs}, loss {loss:.4g}{rate}"

    def _line(self, engine: Engine, elapsed: float) -> str:
        numbers = self._numbers(engine)
        return tqdm.format_meter(
            engine.state.iteration, _total(engine), elapsed, ncols=0, postfix=numbers, initial=self._begun[1]
        )

    def _stream(self) -> TextIO:
        return sys.stderr if self.file is None else self.file

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream())
        else:
            print(line, file=self._stream(), flush=True)


def _total(engine: Engine) -> int | None:
    length, epochs = engine.state.epoch_length, engine.state.max_epochs
    return None if length is None or epochs is None else length * epochs
