# SPDX-License-Identifier: Apache-2.0
"""Contrast of slices and regions against loops over pairs, and whole training steps of both stages: time and memory.

    python -m benchmarks.partition_losses

A loop takes one pair (and region) after the other, its negatives at once. A step is network, loss, backward and
optimiser; the bare network runs forward and backward to the same map with the cheapest loss, in stage 2 with the
encoder frozen too. The difference is smaller than what other processes take on a busy machine: each step is compared
with the turn of the bare network before it, without CUDA in CPU seconds of this process. 12 slices of 192 x 192 in 2
views (on CUDA 48), the network of the published setting.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from benchmarks.timing import interleaved
from monai_ssl.losses import PartitionContrastiveLoss, RegionContrastiveLoss, slice_pairs
from monai_ssl.networks import ContrastiveUNet, unet_features
from monai_ssl.transforms import RandPartitionSlices

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TEMPERATURE, PLANE, PARTITIONS, VIEWS = 0.1, 192, 4, 2
VOLUMES = 12 if CUDA else 3


def slice_ids(volumes: int) -> dict[str, Tensor]:
    """Ids of the views of one slice of each partition."""
    volume, partition, view = torch.cartesian_prod(*map(torch.arange, (volumes, PARTITIONS, VIEWS))).to(DEVICE).T
    return {"source": volume * 2**20 + partition, "partition": partition, "volume": volume, "view": view}


def loop_over_slices(z: Tensor, ids: dict[str, Tensor]) -> Tensor:
    """G^D, one pair after the other."""
    positives, negatives = slice_pairs("GD", **ids)
    unit, terms = F.normalize(z, dim=-1), []
    for a, b in positives.nonzero().tolist():
        positive = unit[a] @ unit[b] / TEMPERATURE
        others = unit[negatives[a]] @ unit[a] / TEMPERATURE
        terms.append(torch.logsumexp(torch.cat([positive[None], others]), 0) - positive)
    return torch.stack(terms).mean()


def loop_over_regions(z: Tensor, ids: dict[str, Tensor]) -> Tensor:
    """L^D with matched negatives, one pair of maps and one region after the other."""
    positives, matched = slice_pairs("GD", **ids)
    unit, terms = F.normalize(z, dim=-1), []
    places = torch.arange(z.shape[1], device=z.device)
    for a, b in positives.nonzero().tolist():
        for r in range(z.shape[1]):
            positive = unit[a, r] @ unit[b, r] / TEMPERATURE
            rest = [unit[a][places != r], unit[b][places != r], unit[matched[a], r]]
            others = torch.cat(rest) @ unit[a, r] / TEMPERATURE
            terms.append(torch.logsumexp(torch.cat([positive[None], others]), 0) - positive)
    return torch.stack(terms).mean()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def compare(name: str, loop: Callable[..., Tensor], loss: nn.Module, shape: tuple[int, ...], volumes: int) -> None:
    """Forward and backward of both into fresh leaves."""
    z, ids = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE), slice_ids(volumes)

    def call(function: Callable[..., Tensor]) -> Tensor:
        leaf = z.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        wait()
        return value.detach()

    calls = {"loop": lambda: call(lambda x: loop(x, ids)), "loss": lambda: call(lambda x: loss(x, **ids))}
    difference = float(calls["loop"]() - calls["loss"]())
    seconds = interleaved(calls, repeats=5)
    ratio = seconds["loop"] / seconds["loss"]
    print(
        f"  {name:48s} {1e3 * seconds['loss']:7.2f} ms, {ratio:6.0f} x as fast as the loop (at least 20), "
        f"differs by {abs(difference):.0e}"
    )


class Setup:
    """One stage: network, images and the alternatives."""

    def __init__(self, blocks: int) -> None:
        torch.manual_seed(0)
        network = UNet(2, 1, 4, (16, 32, 64, 128, 128, 128), (2,) * 5, num_res_units=2, norm="BATCH", act="RELU")
        self.network = ContrastiveUNet(network.to(DEVICE), PLANE, blocks).to(DEVICE)
        self.loss: nn.Module = RegionContrastiveLoss(matched_negatives=True) if blocks else PartitionContrastiveLoss()
        self.ids, self.blocks = slice_ids(VOLUMES), blocks
        self.image = torch.rand(len(self.ids["source"]), 1, PLANE, PLANE, device=DEVICE)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

    def bare(self) -> None:
        """To the same map, with the same part trained."""
        self.optimizer.zero_grad()
        unet_features(self.network.network, self.image, self.blocks).mean().backward()
        wait()

    def step(self, waiting: bool = True) -> None:
        self.optimizer.zero_grad()
        self.loss(self.network(self.image), **self.ids).backward()
        self.optimizer.step()
        if waiting:
            wait()

    def full(self) -> None:
        """Forward and backward of the whole network, all of it trained."""
        self.network.network.requires_grad_(True).train()
        self.network.network(self.image).mean().backward()
        wait()

    def nothing(self) -> None:
        """What the process takes anyway."""


def step_over_bare(setup: Setup, turns: int = 25) -> tuple[float, float]:
    """Median ratio over turns, and the median seconds of the bare network."""
    clock = time.perf_counter if CUDA else time.process_time

    def seconds(call: Callable[[], None]) -> float:
        start = clock()
        call()
        return clock() - start

    setup.bare()
    setup.step()
    bare, step = zip(*((seconds(setup.bare), seconds(setup.step)) for _ in range(turns)))
    return statistics.median(s / b for s, b in zip(step, bare)), statistics.median(bare)


def peak_mebibytes(blocks: int, alternative: str) -> float:
    """Peak memory of a fresh process that runs one alternative three times."""
    run = f"for _ in range(3): s.{alternative}()"
    code = f"from benchmarks.partition_losses import Setup, peak\ns = Setup({blocks})\n{run}\nprint(peak())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def peak() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    # first, while this process is small: another one's peak begins with the memory of the one that started it
    idle, step, full = (peak_mebibytes(3, name) for name in ("nothing", "step", "full"))
    share = (step - idle) / (full - idle)
    print(f"peak memory of stage 2: {share:.2f} of training the whole network (at most 0.8; {full - idle:.0f} MiB)")
    print("losses, forward and backward, 1 thread")
    loss = PartitionContrastiveLoss("GD", TEMPERATURE)
    compare("G^D, N 96, D 128", loop_over_slices, loss, (96, 128), 12)
    regions = RegionContrastiveLoss("LD", TEMPERATURE, matched_negatives=True)
    compare("L^D with matched negatives, 24 maps, 13 regions", loop_over_regions, regions, (24, 13, 128), 3)
    print("whole step over the bare network's forward and backward (at most 1.10)")
    for blocks in (0, 3):
        setup = Setup(blocks)
        ratio, seconds = step_over_bare(setup)
        print(f"  {blocks} decoder blocks: {ratio:.3f} x {seconds:.3f} s, {len(setup.image)} images")
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")
            setup.step(waiting=False)
            torch.cuda.set_sync_debug_mode("default")
            print("  no step waits for the device")
    volume, slices = torch.rand(1, 256, 256, 20), RandPartitionSlices(4)
    start = time.process_time()
    for _ in range(50):
        slices(volume)
    print(f"four slices of 256 x 256 x 20: {1e3 * (time.process_time() - start) / 50:.2f} ms (at most 1)")


if __name__ == "__main__":
    main()
