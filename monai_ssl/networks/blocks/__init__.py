# SPDX-License-Identifier: Apache-2.0
"""Parts that several pretext networks share."""

from __future__ import annotations
