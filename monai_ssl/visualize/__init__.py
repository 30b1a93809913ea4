# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a network is shown and what it learned."""

from __future__ import annotations
