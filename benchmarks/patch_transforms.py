# SPDX-License-Identifier: Apache-2.0
"""Time of the patch pretext transforms against plain copies of the same output, as ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.data import MetaTensor
from monai.transforms import RandFlip

from monai_ssl.transforms import (
    GridPatches,
    RandCubeRotation,
    RandGridPatches,
    RandJigsaw,
    RandRelativeLocation,
    RandViews,
    greedy_permutations,
    hamming_permutations,
)

try:
    from benchmarks.timing import interleaved
except ModuleNotFoundError:  # run as a script, whose folder is on the path
    from timing import interleaved

SIZE, GRID, SHARE, NUM_VIEWS = 128, 3, 0.125, 2
# quarter turns in numpy.rot90 of a class of RandCubeRotation: nothing, two transposes with a flip, two flips
TURNS = {0: (0, (1, 2)), 1: (1, (1, 2)), 5: (2, (2, 3)), 9: (1, (1, 3))}


def stack(image: torch.Tensor, origins: torch.Tensor, size: Sequence[int]) -> Callable[[], object]:
    """A plain copy of the patches at `origins`."""
    slices = [(slice(None), *(slice(o, o + s) for o, s in zip(row, size))) for row in origins.tolist()]
    return lambda: torch.stack([image[s] for s in slices])


def pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object], float]]:
    """By name: the transform with its draw, a plain copy of the same output, and the largest ratio aimed at."""
    image = MetaTensor(torch.rand(1, SIZE, SIZE, SIZE))
    plain = image.as_tensor()
    result: dict[str, tuple[Callable[[], object], Callable[[], object], float]] = {}
    fixed = GridPatches(GRID, jitter=SHARE, gap=SHARE)
    size = fixed(image).shape[2:]
    result["GridPatches"] = (lambda: fixed(image), stack(plain, fixed.starts, size), 4)
    for transform in (
        RandGridPatches(GRID, jitter=SHARE, gap=SHARE),
        RandRelativeLocation(GRID, SHARE, SHARE),
        RandJigsaw(GRID, 100, SHARE, SHARE),
    ):
        transform.set_random_state(seed=0)
        transform(image)
        origins = transform.origins(*transform.last_draw())
        name = f"{type(transform).__name__}, {len(origins)} patches"
        result[name] = (lambda transform=transform: transform(image), stack(plain, origins, size), 4)
    rotation = RandCubeRotation()
    for label, (k, dims) in TURNS.items():
        copy = (lambda k=k, dims=dims: torch.rot90(plain, k, dims).contiguous()) if k else plain.clone
        result[f"RandCubeRotation, class {label}"] = (lambda label=label: rotation.apply(image, label), copy, 2)
    views, flip = RandViews(NUM_VIEWS, RandFlip(1.0, 0)).set_random_state(seed=0), RandFlip(1.0, 0)
    result["RandViews of RandFlip"] = (
        lambda: views(image),
        lambda: torch.stack([flip(image.clone()).as_tensor() for _ in range(NUM_VIEWS)]),
        4,
    )
    return result


def tables() -> dict[str, tuple[Callable[[], object], float]]:
    """By name: a table of permutations and the seconds aimed at."""
    return {
        "hamming_permutations(27, 100)": (lambda: hamming_permutations(27, 100), 0.1),
        "hamming_permutations(27, 1000)": (lambda: hamming_permutations(27, 1000), 1),
        "hamming_permutations(64, 4032)": (lambda: hamming_permutations(64, 4032), 1),
        "greedy_permutations(27, 100, 0)": (lambda: greedy_permutations(27, 100, 0), 1),
    }


def main(repeats: int = 40) -> None:
    """Print samples per second and ratios for one and two threads, then the seconds that tables take."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        calls = {}
        for name, (transform, copy, _) in pairs().items():
            calls |= {name: transform, f"copy of {name}": copy}
        seconds = interleaved(calls, repeats)
        print(f"one volume of {SIZE}^3, grid {GRID}, jitter and gap {SHARE}, {threads} thread(s)")
        for name, (_, _, aim) in pairs().items():
            own, copy_ = seconds[name], seconds[f"copy of {name}"]
            print(f"  {name:36s} {1 / own:8.0f} samples/s, {own / copy_:5.2f} x a plain copy (aim: {aim:g})")
    for name, (call, aim) in tables().items():
        print(f"  {name:36s} {interleaved({name: call}, 5)[name]:8.4f} s (aim: {aim:g})")


if __name__ == "__main__":
    main()
