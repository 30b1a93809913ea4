# SPDX-License-Identifier: Apache-2.0
"""Losses, one class per file with a free function for each term."""

from __future__ import annotations
