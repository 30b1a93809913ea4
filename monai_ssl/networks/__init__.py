# SPDX-License-Identifier: Apache-2.0
"""Encoders, heads, teachers, pretext networks and strict loading."""

from __future__ import annotations

from .blocks import EncoderFeatures, ProjectionHead, align_overlap, integrate_velocity, overlap_theta
from .blocks.correlation_volume import correlation_volume  # not by `blocks`: there the name is that of the file
from .checkpoint import LoadReport, load_pretrained, save_pretrained
from .encoder_adapter import encoder_channels
from .encoders import (
    BasicUNetEncoder,
    DynUNetEncoder,
    ResNetPyramid,
    SegResNetEncoder,
    SwinUNETREncoder,
    UNetEncoder,
    ViTEncoder,
)
from .momentum_teacher import MomentumTeacher
from .nets import (
    AnatomicalEmbeddingNet,
    AnisotropicResNet,
    ContrastiveUNet,
    CPCNet,
    EmbeddingRegistrationNet,
    MergedEmbeddingNet,
    MultiTaskNet,
    PatchClassifier,
    PGLNet,
    RegistrationUNet,
    VoCoNet,
    cpc_indices,
)
from .provenance import make_provenance, read_provenance
from .rebuild import rebuild_network
from .released_weights import inflate_resnet18, load_mmdet_checkpoint
from .unet_stages import (
    UNetFeatures,
    UNetStages,
    check_plane_size,
    trained_blocks,
    trained_prefixes,
    unet_features,
    unet_stages,
)

__all__ = [
    "AnatomicalEmbeddingNet",
    "AnisotropicResNet",
    "BasicUNetEncoder",
    "CPCNet",
    "ContrastiveUNet",
    "DynUNetEncoder",
    "EmbeddingRegistrationNet",
    "EncoderFeatures",
    "LoadReport",
    "MergedEmbeddingNet",
    "MomentumTeacher",
    "MultiTaskNet",
    "PGLNet",
    "PatchClassifier",
    "ProjectionHead",
    "RegistrationUNet",
    "ResNetPyramid",
    "SegResNetEncoder",
    "SwinUNETREncoder",
    "UNetEncoder",
    "UNetFeatures",
    "UNetStages",
    "ViTEncoder",
    "VoCoNet",
    "align_overlap",
    "check_plane_size",
    "correlation_volume",
    "cpc_indices",
    "encoder_channels",
    "inflate_resnet18",
    "integrate_velocity",
    "load_mmdet_checkpoint",
    "load_pretrained",
    "make_provenance",
    "overlap_theta",
    "read_provenance",
    "rebuild_network",
    "save_pretrained",
    "trained_blocks",
    "trained_prefixes",
    "unet_features",
    "unet_stages",
]
