# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a network is shown and what it learned."""

from __future__ import annotations

from .curves import plot_curves
from .overlay import plot_overlay
from .panels import COLOURS, Box, Panel, draw_panels, figure_image
from .voco import voco_panels

__all__ = ["COLOURS", "Box", "Panel", "draw_panels", "figure_image", "plot_curves", "plot_overlay", "voco_panels"]
