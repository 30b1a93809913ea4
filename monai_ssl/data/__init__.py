# SPDX-License-Identifier: Apache-2.0
"""Volumes in: the embedded phantom, datalists, checks, caches and reproducible loading."""

from __future__ import annotations
