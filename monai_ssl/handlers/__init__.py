# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers, each attached by a bundle to a MONAI engine."""

from __future__ import annotations

from .class_predictions import ClassPredictionsHandler
from .confusion_matrix import ConfusionMatrixHandler
from .curves import CurvesHandler
from .embedding_monitor import EmbeddingMonitor
from .finite_loss import FiniteLossHandler
from .freeze import FreezeHandler
from .gradient_clip import GradientClipHandler
from .loss_terms import LossTermsHandler
from .momentum_update import MomentumUpdateHandler, cosine_momentum
from .network_seconds import NetworkSeconds
from .overlay import OverlayHandler
from .prepare_batch import PrepareBatchTensor
from .pretext_preview import PretextPreview
from .pretrained_saver import PretrainedSaver
from .registration_preview import RegistrationPreview
from .resume import ResumeHandler
from .run_progress_bar import RunProgressBar

__all__ = [
    "ClassPredictionsHandler",
    "ConfusionMatrixHandler",
    "CurvesHandler",
    "EmbeddingMonitor",
    "FiniteLossHandler",
    "FreezeHandler",
    "GradientClipHandler",
    "LossTermsHandler",
    "MomentumUpdateHandler",
    "NetworkSeconds",
    "OverlayHandler",
    "PrepareBatchTensor",
    "PretextPreview",
    "PretrainedSaver",
    "RegistrationPreview",
    "ResumeHandler",
    "RunProgressBar",
    "cosine_momentum",
]
