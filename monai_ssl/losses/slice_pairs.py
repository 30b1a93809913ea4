# SPDX-License-Identifier: Apache-2.0
"""Public place of :func:`slice_pairs`.

Its code lies in a module of another name: MONAI looks a short name up as an attribute of its module, and the package's
attribute ``slice_pairs`` is the function.
"""

from __future__ import annotations

from ._slice_pairs import slice_pairs

__all__ = ["slice_pairs"]
