# SPDX-License-Identifier: Apache-2.0
"""Pretext networks."""

from __future__ import annotations

from .voco_net import VoCoNet

__all__ = ["VoCoNet"]
