# SPDX-License-Identifier: Apache-2.0
"""Time of RandPairedViews against a plain resampling of the same two crops and against SpatialResample, as ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from monai_ssl.transforms import RandPairedViews

try:
    from benchmarks.timing import interleaved
except ModuleNotFoundError:  # run as a script, whose folder is on the path
    from timing import interleaved

SAM: dict[str, Any] = {"min_overlap": 0.0, "overlap_prob": 0.8, "flip_prob": 0.0, "placement": "seed"}
# name: shape and spacing of the volume, the transform, and the least gain over SpatialResample aimed at
CASES: dict[str, tuple[tuple[int, ...], float, dict[str, Any], float]] = {
    "PGL": ((160, 256, 256), 1.5, {"roi_size": 96, "scale_range": [(1.1, 1.4)] * 3}, 5),
    "SAM": ((400, 320, 320), 1.6, {"roi_size": (32, 96, 96), "scale_range": (0.8, 1.2), "pixdim": 2.0, **SAM}, 2.5),
}
DRAWS, AIM = 16, 1.3


def resized(image: torch.Tensor, box: Sequence[Sequence[Any]], roi: Sequence[int], flipped: bool) -> torch.Tensor:
    """The box and nothing else, without meta data, flipped as the view is or not."""
    start, extent, flip = box
    window = (slice(None), *(slice(s, s + e) for s, e in zip(start, extent)))
    view = F.interpolate(image[window][None], size=tuple(roi), mode="trilinear", align_corners=False)[0]
    return view.flip([axis + 1 for axis, flips in enumerate(flip) if flips]) if flipped else view


def candidates(size: Sequence[int], spacing: float, args: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """What is timed, by name: pairs drawn alike, but not those that another has just left in the cache."""
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(1, *size), affine=affine)
    plain = image.as_tensor()
    transform, resample = RandPairedViews(**args), SpatialResample(padding_mode="border", align_corners=False)
    boxes, affines = [], []
    transform.set_random_state(seed=0)
    for _ in range(DRAWS):
        *views, _ = transform(image)
        boxes.append(list(zip(transform.start.tolist(), transform.extent.tolist(), transform.flip.tolist())))
        affines.append([view.affine for view in views])
    roi, boxes, boxes_2, affines = views[0].shape[1:], cycle(boxes), cycle(boxes), cycle(affines)
    return {
        "RandPairedViews": lambda: transform(image),
        "slice and F.interpolate": lambda: [resized(plain, box, roi, False) for box in next(boxes)],
        "the same, and flip": lambda: [resized(plain, box, roi, True) for box in next(boxes_2)],
        "SpatialResample": lambda: [resample(image, dst_affine=m, spatial_size=roi) for m in next(affines)],
    }


def main(repeats: int = 48) -> None:
    """Print milliseconds for a pair of views and ratios for one and two threads."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, (size, spacing, args, gain) in CASES.items():
            seconds = interleaved(candidates(size, spacing, args), repeats)
            print(f"{name}: two views of {args['roi_size']} out of {size}, {threads} thread(s)")
            for what, value in seconds.items():
                print(f"  {what:26s} {1e3 * value:8.2f} ms")
            own = seconds["RandPairedViews"]
            plain, resample = seconds["slice and F.interpolate"], seconds["SpatialResample"]
            flipped = own / seconds["the same, and flip"]
            print(
                f"  RandPairedViews / slice and F.interpolate: {own / plain:.2f}, with flips {flipped:.2f} (aim {AIM})"
            )
            print(f"  SpatialResample / RandPairedViews: {resample / own:.1f} (aim: at least {gain})")


if __name__ == "__main__":
    main()
