# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a network is shown and what it learned."""

from __future__ import annotations

from .agreement import agreement_panels
from .confusion import plot_confusion
from .curves import plot_curves
from .matching import plot_match
from .multi_task import multi_task_panels
from .overlay import plot_overlay
from .paired_views import paired_view_panels
from .panels import COLOURS, Box, Panel, draw_panels, figure_image
from .partitions import partition_panels, region_panels
from .patches import cpc_panels, jigsaw_panels, relative_location_panels, rotation_panels, view_panels
from .registration import plot_registration
from .voco import voco_panels

__all__ = [
    "COLOURS",
    "Box",
    "Panel",
    "agreement_panels",
    "cpc_panels",
    "draw_panels",
    "figure_image",
    "jigsaw_panels",
    "multi_task_panels",
    "paired_view_panels",
    "partition_panels",
    "plot_confusion",
    "plot_curves",
    "plot_match",
    "plot_overlay",
    "plot_registration",
    "region_panels",
    "relative_location_panels",
    "rotation_panels",
    "view_panels",
    "voco_panels",
]
