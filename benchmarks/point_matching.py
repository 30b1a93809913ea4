# SPDX-License-Identifier: Apache-2.0
"""Matching points with embeddings, and embedding a scan: milliseconds per point, and ratios.

    python -m benchmarks.point_matching

Maps of a trunk at 2 mm, 100 x 96 x 80 cells of 128 channels and 50 x 12 x 10 of as many. Matching is compared with the
one product of P vectors of 256 channels with all cells that it would be if the coarse map were up-sampled, which twice
the memory would allow. Embedding is compared with the encoder alone, with 64 base channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import interleaved
from monai_ssl.apps import PointMatcher, map_norms, match_points
from monai_ssl.networks import AnatomicalEmbeddingNet, AnisotropicResNet

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FINE, COARSE, WIDTH = (100, 96, 80), (50, 12, 10), 128
IMAGE, SLAB = (128, 96, 96), 64
AIM = 2


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def matching(points: int, repeats: int) -> None:
    """Print the time of a number of points against the product."""
    maps = [F.normalize(torch.randn(WIDTH, *size, device=DEVICE), dim=0) for size in (FINE, COARSE)]
    norms = map_norms(maps)
    index = torch.rand(points, 3) * torch.tensor(FINE)
    whole = torch.randn(2 * WIDTH, maps[0][0].numel(), device=DEVICE)
    queries = torch.randn(points, 2 * WIDTH, device=DEVICE)

    def match() -> None:
        match_points(maps, maps, index, key_norms=norms)
        wait()

    def product() -> None:
        queries @ whole
        wait()

    seconds = interleaved({"match_points": match, "product": product}, repeats)
    ratio = seconds["match_points"] / seconds["product"]
    for name, value in seconds.items():
        print(f"  {name:14s} {1e3 * value / points:8.2f} ms per point, {points} at a time")
    print(f"  match_points / product: {ratio:.2f} (aim: at most {AIM})")


def embedding(repeats: int) -> None:
    """Print the time of embedding a scan against that of the encoder, and what of it the heads explain."""
    encoder = AnisotropicResNet().to(DEVICE).eval()
    matcher = PointMatcher(AnatomicalEmbeddingNet(encoder, encoder.channels).eval(), Compose([]), device=DEVICE)
    slabs = PointMatcher(matcher.network, Compose([]), device=DEVICE, slab_size=SLAB)
    image = MetaTensor(torch.randn(1, *IMAGE), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    megavoxels = image.numel() / 1e6

    def embed(matcher: PointMatcher) -> None:
        matcher._recent.clear()
        matcher.embed(image)
        wait()

    @torch.no_grad()
    def bare() -> None:
        encoder(image.as_tensor()[None].to(DEVICE))
        wait()

    @torch.no_grad()
    def network() -> None:
        matcher.network(image.as_tensor()[None].to(DEVICE))
        wait()

    counts = []
    for call in (bare, network):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    print(f"  the network with its heads has {counts[1] / counts[0]:.2f} of the encoder's operations")
    alternatives = {
        "encoder": bare,
        "network": network,
        "embed": lambda: embed(matcher),
        "embed in slabs": lambda: embed(slabs),
    }
    seconds = interleaved(alternatives, repeats)
    for name, value in seconds.items():
        print(
            f"  {name:14s} {value / megavoxels:8.2f} s per megavoxel, {value / seconds['encoder']:.2f} of the encoder's"
        )


def main() -> None:
    """Print everything."""
    torch.manual_seed(0)
    print(f"matching: {FINE} cells, {torch.get_num_threads()} thread(s), {DEVICE}")
    for points in (1, 64):
        matching(points, repeats=5)
    print(f"embedding: {IMAGE} voxels, slabs of {SLAB} with 28 more at each cut")
    embedding(repeats=3)


if __name__ == "__main__":
    main()
