# SPDX-License-Identifier: Apache-2.0
"""Encoders, heads, teachers, pretext networks and strict loading."""

from __future__ import annotations
