# SPDX-License-Identifier: Apache-2.0
"""Optimisers that neither torch nor MONAI has."""

from __future__ import annotations

from .lars import LARS

__all__ = ["LARS"]
