# SPDX-License-Identifier: Apache-2.0
"""Time of RandVoCoCrops against plain copies of the same crops, as ratios: `python benchmarks/voco_crops.py`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandFlip, RandRotate90, RandShiftIntensity

from monai_ssl.transforms import RandVoCoCrops

try:
    from benchmarks.timing import interleaved
except ModuleNotFoundError:  # run as a script, whose folder is on the path
    from timing import interleaved

WINDOW, ROI, GRID, NUM_SAMPLES = (192, 192, 64), 64, (3, 3, 1), 4


def augmentation() -> Compose:
    """The default augmentation of the VoCo bundle."""
    flips = [RandFlip(0.2, axis) for axis in range(3)]
    return Compose([*flips, RandRotate90(0.2, 3, (0, 1)), RandShiftIntensity(0.1, prob=0.1)])


def candidates() -> dict[str, Callable[[], object]]:
    """What is timed, by name; all cut the same crops of one window, except that the two augmented ones draw anew."""
    image = MetaTensor(torch.rand(1, *WINDOW))
    plain_image = image.as_tensor()
    plain = RandVoCoCrops(ROI, GRID, NUM_SAMPLES)
    augmented = RandVoCoCrops(ROI, GRID, NUM_SAMPLES, crop_transform=augmentation())
    for transform in (plain, augmented):
        transform.set_random_state(seed=0)
        transform.randomize()
    origins = [*plain.origins.tolist(), *plain.starts.tolist()]
    slices = [(slice(None), *(slice(o, o + ROI) for o in origin)) for origin in origins]
    template, state = augmentation(), torch.Generator().manual_seed(0)

    def a_compose_per_crop() -> torch.Tensor:
        crops = []
        for s in slices:
            transform = deepcopy(template).set_random_state(seed=int(torch.randint(2**31, (1,), generator=state)))
            crops.append(transform(image[s].clone()))
        return torch.stack(crops)

    return {
        "torch.stack of slices": lambda: torch.stack([plain_image[s] for s in slices]),
        "slice, copy, stack": lambda: torch.stack([plain_image[s].clone() for s in slices]),
        "no crop_transform": lambda: plain(image, randomize=False),
        "default augmentation": lambda: augmented(image),
        "a Compose per crop on MetaTensors": a_compose_per_crop,
    }


def main(repeats: int = 60) -> None:
    """Print medians and ratios for one and two threads."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = interleaved(candidates(), repeats)
        print(f"{NUM_SAMPLES} + 9 crops of {ROI}^3 from {WINDOW}, {threads} thread(s)")
        for name, value in seconds.items():
            print(f"  {name:34s} {1e3 * value:8.2f} ms")
        for name, base in (
            ("no crop_transform", "torch.stack of slices"),
            ("default augmentation", "torch.stack of slices"),
            ("default augmentation", "slice, copy, stack"),
            ("default augmentation", "a Compose per crop on MetaTensors"),
        ):
            print(f"  {name} / {base}: {seconds[name] / seconds[base]:.2f}")


if __name__ == "__main__":
    main()
