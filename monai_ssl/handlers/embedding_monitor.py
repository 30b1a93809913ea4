# SPDX-License-Identifier: Apache-2.0
"""Watches whether the embeddings of different images still differ."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import nn

from monai_ssl.handlers._processes import device_of
from monai_ssl.metrics import effective_rank, embedding_std, uniformity

__all__ = ["EmbeddingMonitor"]

logger = logging.getLogger(__name__)


class EmbeddingMonitor:
    """Embed the images of a batch now and then, or of a whole epoch, and warn when the embeddings have collapsed.

    Writes ``embedding_std``, ``effective_rank`` and ``uniformity`` (see ``monai_ssl.metrics``) to
    ``engine.state.metrics``, whence StatsHandler, TensorBoardStatsHandler and CurvesHandler take them. Runs in eval
    mode without gradients and leaves weights, buffers, modes of all layers and random states as they were.

    Args:
        embed: maps images (N, C, *spatial) to embeddings (N, D), feature maps (N, D, *spatial), which are averaged over
            space, or a list of maps, whose last is taken. A module or a method of one, such as ``pretext.embed``.
        interval: iterations between two looks, at the images of one batch; None looks at those of all batches of an
            epoch (and process) together when it ends, for an evaluator.
        min_std: below this ``embedding_std`` the embeddings count as collapsed.
        min_effective_rank: at or below this ``effective_rank`` they do too; of few images N, whose rank cannot exceed
            N - 1, half of that is asked for.
        image_key: key of the images in the batch.
        flatten: leading axes of the images that count as items: 1 for (B, C, *spatial), 2 for stacked crops
            (B, R, C, *spatial).

    Raises:
        ValueError: when ``embed`` is neither a module nor a method of one, or a number is out of range.
    """

    def __init__(
        self,
        embed: Callable[[torch.Tensor], Any],
        interval: int | None = 100,
        min_std: float = 1e-4,
        min_effective_rank: float = 2.0,
        image_key: str = "image",
        flatten: int = 1,
    ) -> None:
        module = embed if isinstance(embed, nn.Module) else getattr(embed, "__self__", None)
        if not isinstance(module, nn.Module):
            raise ValueError("`embed` must be a torch.nn.Module or a method of one, so that its mode can be restored.")
        if (interval is not None and interval < 1) or flatten < 1:
            raise ValueError(f"`interval` and `flatten` must be at least 1, got {interval} and {flatten}.")
        self.embed = embed
        self.module = module
        self.interval = interval
        self.min_std = min_std
        self.min_effective_rank = min_effective_rank
        self.image_key = image_key
        self.flatten = flatten
        self._collapsed = False
        self._too_few = False
        self._epoch: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a ``SupervisedTrainer`` with ``decollate=False``, or to an evaluator."""
        if self.interval is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
            return
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self._epoch.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self._epoch.append(self._embedded(e)))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: self._write(e, torch.cat(self._epoch)))

    def __call__(self, engine: Engine) -> None:
        """Embed the current batch and write the three numbers."""
        self._write(engine, self._embedded(engine))

    def _embedded(self, engine: Engine) -> torch.Tensor:
        """Embeddings (N, D) of the current batch."""
        images = engine.state.batch[self.image_key]
        images = images.as_tensor() if isinstance(images, MetaTensor) else images
        device = device_of(engine)
        amp = bool(getattr(engine, "amp", False)) and device.type == "cuda"
        with _undisturbed(self.module, device), torch.autocast(device.type, enabled=amp):
            return _pooled(self.embed(images.flatten(0, self.flatten - 1).to(device)))

    def _write(self, engine: Engine, embeddings: torch.Tensor) -> None:
        if len(embeddings) < 2:
            if not self._too_few:
                logger.warning("There is one image to embed: its embedding alone says nothing about collapse.")
            self._too_few = True
            return
        health = embedding_health(embeddings)
        engine.state.metrics.update(health)
        self._report(engine, health, min(self.min_effective_rank, (len(embeddings) - 1) / 2))

    def _report(self, engine: Engine, health: dict[str, float], least: float) -> None:
        # written so that NaN counts as collapsed
        healthy = health["embedding_std"] >= self.min_std and health["effective_rank"] > least
        if not healthy and not self._collapsed:
            logger.warning(
                "The embeddings have collapsed at iteration %d: std %.2g (least %.2g), effective rank %.2f (above "
                "%.2f). Look at the pretext preview: constant or empty crops? Else lower the learning rate, raise the "
                "regulariser's weight or the teacher's momentum, use less dropout, or larger batches.",
                engine.state.iteration, health["embedding_std"], self.min_std,
                health["effective_rank"], least,
            )  # fmt: skip
        elif healthy and self._collapsed:
            logger.info("The embeddings have recovered at iteration %d.", engine.state.iteration)
        self._collapsed = not healthy


def embedding_health(embeddings: Any) -> dict[str, float]:
    """The three numbers of a batch of embeddings; NaN where an embedding is not finite.

    Args:
        embeddings: (N, D), (N, D, *spatial), or a list of the latter.
    """
    features = _pooled(embeddings)
    if not bool(features.isfinite().all()):
        return dict.fromkeys(("embedding_std", "effective_rank", "uniformity"), float("nan"))
    return {
        "embedding_std": float(embedding_std(features)),
        "effective_rank": float(effective_rank(features)),
        "uniformity": float(uniformity(features)),
    }


def _pooled(embeddings: Any) -> torch.Tensor:
    """(N, D) of embeddings, of maps or of the last of several maps."""
    features = embeddings[-1] if isinstance(embeddings, (list, tuple)) else embeddings
    features = features.detach().float()
    return features.flatten(2).mean(2) if features.ndim > 2 else features


@contextmanager
def _undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients, then its own mode for every layer (MONAI's ``eval_mode`` puts all into train)."""
    modes = [(layer, layer.training) for layer in module.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            module.eval()
            yield
    finally:
        for layer, training in modes:
            layer.training = training
