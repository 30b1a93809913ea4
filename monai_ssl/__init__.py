# SPDX-License-Identifier: Apache-2.0
"""Self-supervised pretraining of 3D medical image networks, native to MONAI.

Importing the package loads every public module, so that a MONAI bundle which has ``$import monai_ssl`` under
``imports`` can name any public class by its short ``_target_``.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import apps, data, handlers, inferers, losses, metrics, networks, optimizers, transforms, visualize

__all__ = [
    "__version__",
    "apps",
    "data",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "optimizers",
    "transforms",
    "visualize",
]
