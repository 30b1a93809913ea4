# SPDX-License-Identifier: Apache-2.0
"""What alignment, loss, teacher and update cost in a PGL training step, and its peak memory.

    python -m benchmarks.pgl_step

One pair of views of 64^3 (on CUDA the default bundle's four of 96^3), a SegResNet encoder of 4.4 million parameters and
heads of 1024 channels. The student's part is encoder, projector and predictor, forward and backward. On CUDA one loop
checks that a step waits for the device nowhere.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from monai.networks.nets.segresnet_ds import SegResEncoder

from benchmarks.timing import interleaved
from monai_ssl.losses import LocalConsistencyLoss
from monai_ssl.networks import PGLNet, align_overlap, overlap_theta
from monai_ssl.transforms import RandPairedViews

CUDA = torch.cuda.is_available()
ROI, BATCH = (96, 4) if CUDA else (64, 1)


class Setup:
    """Network, pairs of views, and the parts of a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if CUDA else "cpu")
        encoder = SegResEncoder(3, init_filters=16, norm="instance", blocks_down=(1, 2, 2, 4))
        self.network = PGLNet(encoder, 128).to(self.device)
        self.loss = LocalConsistencyLoss()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        draw = RandPairedViews((ROI,) * 3).set_random_state(0)
        pairs = [draw(torch.rand(1, *(int(1.5 * ROI),) * 3)) for _ in range(BATCH)]
        image, image_2, affine = (torch.stack(part).as_subclass(torch.Tensor).to(self.device) for part in zip(*pairs))
        self.views, self.pair, self.affine = torch.cat([image, image_2]), (image, image_2), affine
        self.maps = torch.rand(2, 2 * BATCH, 256, *(ROI // 8,) * 3, device=self.device)

    def wait(self) -> None:
        if CUDA:
            torch.cuda.synchronize()

    def bare(self) -> None:
        """Encoder alone, forward and backward over all views."""
        self.optimizer.zero_grad()
        self.network.encoder(self.views)[-1].mean().backward()
        self.wait()

    def student(self) -> None:
        """Forward and backward without alignment, with the cheapest loss."""
        self.optimizer.zero_grad()
        net = self.network
        net.predictor(net.projector(net.encoder(self.views)[-1])).mean().backward()
        self.wait()

    def teacher(self) -> None:
        net = self.network
        net.teacher_projector(net.teacher_encoder(self.views)[-1])
        self.wait()

    def align(self) -> None:
        """Alignment of both outputs and loss, forward and backward."""
        prediction, target = self.maps[0].requires_grad_(), self.maps[1]
        theta = overlap_theta(self.affine, (ROI,) * 3, prediction.shape[2:]).transpose(0, 1).flatten(0, 1)
        prediction, valid = align_overlap(prediction, theta)
        target, _ = align_overlap(target, theta)
        self.loss(prediction, target, valid & valid.roll(BATCH, 0)).backward()
        self.wait()

    def update(self) -> None:
        self.network.update_teacher(0.99)
        self.wait()

    def step(self, wait: bool = True) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.network(*self.pair, self.affine)).backward()
        self.optimizer.step()
        self.network.update_teacher(0.99)
        if wait:
            self.wait()


def peak_mebibytes(part: str) -> float:
    """Peak memory of a fresh process that runs one part three times."""
    run = f"for _ in range(3): s.{part}()"
    code = f"from benchmarks.pgl_step import Setup, peak\ns = Setup()\n{run}\nprint(peak())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def peak() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    setup = Setup()
    parts = ("bare", "student", "teacher", "align", "update", "step")
    seconds = interleaved({name: getattr(setup, name) for name in parts}, repeats=9)
    step, student, bare = (seconds[name] for name in ("step", "student", "bare"))
    print(f"{BATCH} pair(s) of views of {ROI}^3: whole step {step:.3f} s, bare encoder {bare:.3f} s")
    print(f"alignment and loss       {seconds['align'] / step:.4f} of the step  (at most 0.03)")
    print(f"update of the teacher    {seconds['update'] / step:.4f} of the step  (at most 0.01)")
    print(f"teacher without gradient {seconds['teacher'] / student:.3f} x the student's both passes  (at most 0.4)")
    print(f"whole step               {step / bare:.3f} x the bare encoder's forward and backward")
    memory = {part: peak_mebibytes(part) for part in ("bare", "step")}
    print(f"peak memory of the step  {memory['step'] / memory['bare']:.3f} x  (bare {memory['bare']:.0f} MiB)")
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            setup.step(wait=False)
        torch.cuda.set_sync_debug_mode("default")
        print("no step waits for the device")


if __name__ == "__main__":
    main()
