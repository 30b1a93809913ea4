# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers, each attached by a bundle to a MONAI engine."""

from __future__ import annotations
