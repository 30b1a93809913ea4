# SPDX-License-Identifier: Apache-2.0
"""Pretext networks."""

from __future__ import annotations

from .cpc_net import CPCNet, cpc_indices
from .multi_task_net import MultiTaskNet
from .patch_classifier import PatchClassifier
from .pgl_net import PGLNet
from .voco_net import VoCoNet

__all__ = ["CPCNet", "MultiTaskNet", "PGLNet", "PatchClassifier", "VoCoNet", "cpc_indices"]
