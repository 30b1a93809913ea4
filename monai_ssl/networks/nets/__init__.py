# SPDX-License-Identifier: Apache-2.0
"""Pretext networks."""

from __future__ import annotations

from .anatomical_embedding_net import AnatomicalEmbeddingNet, MergedEmbeddingNet
from .anisotropic_resnet import AnisotropicResNet
from .contrastive_unet import ContrastiveUNet
from .cpc_net import CPCNet, cpc_indices
from .multi_task_net import MultiTaskNet
from .patch_classifier import PatchClassifier
from .pgl_net import PGLNet
from .registration_unet import EmbeddingRegistrationNet, RegistrationUNet
from .voco_net import VoCoNet

__all__ = [
    "AnatomicalEmbeddingNet",
    "AnisotropicResNet",
    "CPCNet",
    "ContrastiveUNet",
    "EmbeddingRegistrationNet",
    "MergedEmbeddingNet",
    "MultiTaskNet",
    "PGLNet",
    "PatchClassifier",
    "RegistrationUNet",
    "VoCoNet",
    "cpc_indices",
]
