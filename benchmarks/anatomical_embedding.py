# SPDX-License-Identifier: Apache-2.0
"""SAM's loss at its published sizes, forward and backward: time and peak memory, as ratios.

    python -m benchmarks.anatomical_embedding

Against the form of the loss that writes differences of coordinates (3, rows, V) and whole matrices of similarities
down, and against a forward and backward pass of the network with 64 base channels. Views of 32 x 96 x 96 voxels, local
maps of V = 36864 cells. On the CPU two volumes, and one for the comparison with the network, which takes seconds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved
from monai_ssl.losses import AnatomicalEmbeddingLoss, info_nce
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet
from monai_ssl.transforms import feature_affine, transform_points, voxel_index

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROI, FINE, COARSE, WIDTH, VOLUMES = (32, 96, 96), (16, 48, 48), (8, 6, 6), 128, 2
TEMPERATURE = 0.5


def matrices(volumes: int) -> Tensor:
    """Pairs of views of 2 mm voxels that share about a third."""
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)).repeat(volumes, 2, 1, 1)
    affine[:, 1, :3, 3] = torch.tensor([6.0, 60.0, -50.0], dtype=torch.float64)
    return affine.to(DEVICE)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Of all points (P, 3) and (Q, 3) by their differences, (3, P, Q)."""
    return (a.T[:, :, None] - b.T[:, None, :]).square().sum(0).sqrt()


def direction(
    own: Tensor, other: Tensor, pool: Tensor, both: Tensor, points: tuple[Tensor, Tensor], numbers: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Positive and negative similarities of one view's anchors; maps (C, V), `both` the maps for mining (D, 2V)."""
    rows, radius, anchors, excluded, candidates, drawn = numbers
    cells = torch.randperm(own.shape[1], device=DEVICE)[:rows]
    apart, positive = distances(points[0][cells], points[1]).min(1)
    chosen = (apart < radius).nonzero()[:, 0][:anchors]
    cells, positive = cells[chosen], positive[chosen]
    near = torch.cat([distances(points[0][cells], p) for p in points], 1) < excluded
    with torch.no_grad():
        score = (both[:, : own.shape[1]][:, cells].T @ both).masked_fill(near, float("-inf"))
        best = score.topk(min(candidates, score.shape[1])).indices
        negatives = best.gather(1, torch.rand(best.shape, device=DEVICE).argsort(1)[:, :drawn])
    similarity = own[:, cells].T @ pool
    return (own[:, cells] * other[:, positive]).sum(0), similarity.gather(1, negatives)


def materialised(maps: list[Tensor], affine: Tensor) -> Tensor:
    """The loss in the straightforward form, with the samplers' numbers."""
    fine, coarse = maps
    volumes = len(affine)
    large = F.normalize(F.interpolate(coarse.detach(), size=FINE, mode="trilinear", align_corners=False), dim=1)
    total = fine.new_zeros(())
    for b in range(volumes):
        for embedding, size, numbers in (
            (fine, FINE, (2000, 2.0, 100, 20.0, 2000, 500)),
            (coarse, COARSE, (10**6, 25.0, 10**6, 5.0, 250, 200)),
        ):
            index = voxel_index(size, DEVICE)
            points = [transform_points(a, index).float() for a in feature_affine(affine[b], ROI, size)]
            views = [embedding[row].flatten(1) for row in (b, volumes + b)]
            mined = [
                torch.cat([v, large[row].flatten(1)]) if embedding is fine else v
                for v, row in zip(views, (b, volumes + b))
            ]
            losses = []
            for v in (0, 1):
                order = (v, 1 - v)
                pool, both = (torch.cat([x[i] for i in order], 1) for x in (views, [m.detach() for m in mined]))
                positive, negatives = direction(
                    views[v], views[1 - v], pool, both, tuple(points[i] for i in order), numbers
                )
                if embedding is coarse and volumes > 1:
                    rest = coarse[[row for row in range(2 * volumes) if row % volumes != b]].transpose(0, 1).flatten(1)
                    more = rest[:, torch.randperm(rest.shape[1], device=DEVICE)[:1000]]
                    negatives = torch.cat([negatives, views[v].T[: len(positive)] @ more], 1)
                losses.append(info_nce(positive, negatives, TEMPERATURE))
            total = total + torch.cat(losses).mean() / volumes
    return total


class Setup:
    """Maps of unit vectors and the alternatives."""

    def __init__(self, volumes: int = VOLUMES, chunk_size: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda size: F.normalize(torch.randn(2 * volumes, WIDTH, *size, generator=generator), dim=1).to(DEVICE)
        self.maps = [draw(FINE).requires_grad_(), draw(COARSE).requires_grad_()]
        self.affine = matrices(volumes)
        self.loss = AnatomicalEmbeddingLoss(ROI, chunk_size=chunk_size)
        self.network: AnatomicalEmbeddingNet | None = None

    def wait(self) -> None:
        if CUDA:
            torch.cuda.synchronize()

    def clear(self) -> None:
        for m in self.maps:
            m.grad = None

    def ours(self) -> None:
        self.clear()
        self.loss(self.maps, self.affine).backward()
        self.wait()

    def straightforward(self) -> None:
        self.clear()
        materialised(self.maps, self.affine).backward()
        self.wait()

    def bare(self) -> None:
        """Forward and backward of the network, with the cheapest loss that reaches all of it."""
        if self.network is None:
            encoder = AnisotropicResNet()
            self.network = AnatomicalEmbeddingNet(encoder, encoder.channels).to(DEVICE)
            self.image = torch.rand(len(self.maps[0]), 1, *ROI, device=DEVICE)
        self.network.zero_grad()
        sum(m[:, 0].mean() for m in self.network(self.image)).backward()
        self.wait()


def peak() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    # getrusage counts what the parent of the process held, too
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 2**10 if found else float("nan")


def extra_mebibytes(alternative: str, volumes: int = VOLUMES, chunk_size: int = 128) -> float:
    """Peak memory of a fresh process beyond that of the maps; the backward pass' gradients of them are part of it."""
    code = (
        "import torch\nfrom benchmarks.anatomical_embedding import Setup, peak\n"
        f"torch.set_num_threads(1)\ns = Setup({volumes}, {chunk_size})\nbefore = peak()\n"
        f"s.{alternative}()\nprint(peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def bound_mebibytes(volumes: int, chunk_size: int) -> float:
    """Four numbers for each cell of both views and anchor of a block, and twice the vectors of all negatives."""
    cells, anchors, negatives = 16 * 48 * 48, 100, 500
    return (chunk_size * 2 * cells * 4 * 4 + 2 * volumes * 2 * anchors * negatives * WIDTH * 4) / 2**20


def main() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        setup = Setup()
        seconds = interleaved({"ours": setup.ours, "straightforward": setup.straightforward}, repeats=5)
        ratio = seconds["straightforward"] / seconds["ours"]
        print(
            f"{VOLUMES} volumes, {threads} thread(s): AnatomicalEmbeddingLoss {seconds['ours']:.2f} s, written down "
            f"{seconds['straightforward']:.2f} s: {ratio:.1f} x as fast  (at least 5)"
        )
    ours, straightforward = extra_mebibytes("ours"), extra_mebibytes("straightforward")
    print(
        f"extra peak memory {ours:.0f} MiB to {straightforward:.0f} MiB: {ours / straightforward:.2f}  (at most 0.33)"
    )
    for volumes, chunk_size in ((1, 7), (2, 7), (2, 1000)):
        print(
            f"{volumes} volume(s), chunk_size {chunk_size}: {extra_mebibytes('ours', volumes, chunk_size):.0f} MiB  "
            f"(at most {bound_mebibytes(volumes, min(chunk_size, 200)):.0f})"
        )
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    alone = Setup(1)
    seconds = interleaved({"loss": alone.ours, "network": alone.bare}, repeats=3)
    ratio = seconds["loss"] / seconds["network"]
    print(f"1 volume: loss {ratio:.3f} x the network's {seconds['network']:.1f} s, forward and backward  (at most 0.3)")
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
        alone.clear()
        alone.loss(alone.maps, alone.affine).backward()
        torch.cuda.set_sync_debug_mode("default")
        print("the loss does not wait for the device")


if __name__ == "__main__":
    main()
