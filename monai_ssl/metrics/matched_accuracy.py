# SPDX-License-Identifier: Apache-2.0
"""Public place of :func:`matched_accuracy`.

Its code lies in a module of another name: MONAI looks a short name up as an attribute of its module, and the package's
attribute ``matched_accuracy`` is the function.
"""

from __future__ import annotations

from .matched_voxels import MatchedAccuracyMetric, matched_accuracy, matched_chance

__all__ = ["MatchedAccuracyMetric", "matched_accuracy", "matched_chance"]
