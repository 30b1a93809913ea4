# SPDX-License-Identifier: Apache-2.0
"""A whole VoCo training step against the bare encoder's forward and backward over the same crops: time and peak memory.

    python -m benchmarks.voco_step

Nine base and four random crops of 32^3 and a SegResNet encoder of 4.4 million parameters, batch of one volume. The
step is network, loss, backward, optimiser and momentum update. On CUDA the default bundle's network and crops are used,
and one loop checks that a step waits for the device nowhere.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from monai.networks.nets import SegResNet, SwinUNETR

from benchmarks.timing import interleaved
from monai_ssl.losses import VoCoLoss
from monai_ssl.networks import SegResNetEncoder, SwinUNETREncoder, VoCoNet
from monai_ssl.transforms import overlap_fractions

CUDA = torch.cuda.is_available()
GRID, SAMPLES, BATCH = (3, 3, 1), 4, 1 if not CUDA else 2
ROI = 64 if CUDA else 32


class Setup:
    """Encoder, pretext network, crops and the two alternatives."""

    def __init__(self, teacher: str = "projector") -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if CUDA else "cpu")
        if CUDA:
            encoder: torch.nn.Module = SwinUNETREncoder(SwinUNETR(1, 2, feature_size=48, use_v2=True))
            embed_dim, hidden = 1152, 1024
        else:
            encoder = SegResNetEncoder(SegResNet(init_filters=16, blocks_down=(1, 2, 2, 4), norm="instance"))
            embed_dim, hidden = 240, 512
        self.network = VoCoNet(encoder, embed_dim, hidden_dim=hidden, out_dim=hidden, teacher=teacher).to(self.device)
        self.loss = VoCoLoss()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, amsgrad=True)
        starts = torch.tensor([[0, 0, 0], [7, 9, 0], [30, 5, 0], [64, 64, 0]]) * ROI // 64
        self.label = overlap_fractions(starts, (ROI,) * 3, GRID).expand(BATCH, -1, -1).to(self.device)
        self.image = torch.rand(BATCH, SAMPLES, 1, ROI, ROI, ROI, device=self.device)
        self.base = torch.rand(BATCH, 9, 1, ROI, ROI, ROI, device=self.device)

    def wait(self) -> None:
        if CUDA:
            torch.cuda.synchronize()

    def bare(self) -> None:
        """Forward and backward of the encoder over all crops, with the cheapest loss that reaches every map."""
        self.optimizer.zero_grad()
        x = torch.cat([self.image, self.base], 1).flatten(0, 1)
        sum(feature.mean() for feature in self.network.encoder(x)).backward()
        self.wait()

    def step(self, wait: bool = True) -> None:
        self.optimizer.zero_grad()
        self.network.update_teacher(0.9)
        self.loss(self.network(self.image, self.base), self.label).backward()
        self.optimizer.step()
        if wait:
            self.wait()


def peak_mebibytes(alternative: str) -> float:
    """Peak memory of a fresh process that runs one alternative three times."""
    run = f"for _ in range(3): s.{alternative}()"
    code = f"from benchmarks.voco_step import Setup, peak\ns = Setup()\n{run}\nprint(peak())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def peak() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    setup, full = Setup(), Setup("full")
    seconds = interleaved({"bare": setup.bare, "step": setup.step, "full": full.step}, repeats=15)
    print(f"bare encoder, forward and backward   {seconds['bare']:.3f} s")
    print(f"whole step, projector teacher        {seconds['step'] / seconds['bare']:.3f} x  (at most 1.10)")
    print(f"whole step, full teacher             {seconds['full'] / seconds['bare']:.3f} x  (at most 1.45)")
    bare, step = peak_mebibytes("bare"), peak_mebibytes("step")
    print(f"peak memory of the step              {step / bare:.3f} x  (at most 1.10; bare {bare:.0f} MiB)")
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            setup.step(wait=False)
        torch.cuda.set_sync_debug_mode("default")
        print("no step waits for the device")


if __name__ == "__main__":
    main()
