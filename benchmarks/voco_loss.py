# SPDX-License-Identifier: Apache-2.0
"""Time of VoCoLoss, forward and backward, against a loop over pairs, as ratios: `python benchmarks/voco_loss.py`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F

from monai_ssl.losses import VoCoLoss

try:
    from benchmarks.timing import interleaved
except ModuleNotFoundError:  # run as a script, whose folder is on the path
    from timing import interleaved

B, R, K, D = 2, 4, 16, 2048
EPS = 1e-6


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Clipped cosine of two vectors."""
    return torch.relu(F.cosine_similarity(a, b, dim=0, eps=1e-8)).clamp(max=1)


def prediction(crops: torch.Tensor, bases: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Prediction term of one volume, "overlap" and "log", one pair at a time."""
    pos, neg, weights, empty = 0.0, 0.0, 0.0, 0
    for r in range(R):
        for k in range(K):
            logit, y = cosine(crops[r], bases[k]), target[r, k]
            pos = pos - y * torch.log(1 - (y - logit).abs() + EPS)
            weights = weights + y
            if y == 0:
                neg = neg - torch.log(1 - logit + EPS)
                empty += 1
    return pos / (weights + EPS) + neg / (empty + EPS)


def loop_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of variant "v2" with a Python loop over pairs."""
    total = torch.zeros(())
    for i in range(B):
        j = (i + 1) % B
        x_s, q_s, x_t, q_t = student[i, :R], student[i, R:], teacher[i, :R], teacher[i, R:]
        total = total + prediction(x_s, q_t, target[i])
        with torch.no_grad():
            agreed = torch.stack([torch.stack([cosine(x, q) for q in teacher[j, R:]]) for x in x_t])
        total = total + prediction(x_s, student[j, R:], agreed)
        pairs = list(combinations(range(K), 2))
        total = total + sum(cosine(q_s[a], q_s[b].detach()).square() for a, b in pairs) / len(pairs)
    return total / B


def forward_and_backward(loss: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    """Value of the loss, after its backward pass into a fresh leaf."""
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach()


def main(repeats: int = 9) -> None:
    """Print medians and the ratio for one and two threads."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, B, R + K, D, generator=generator).relu()
    target = torch.rand(B, R, K, generator=generator) * (torch.rand(B, R, K, generator=generator) < 0.25)
    target = target / target.sum(-1, keepdim=True).clamp_min(EPS)
    loss = VoCoLoss("v2")
    timed = {
        "loop over pairs": lambda: forward_and_backward(lambda x: loop_loss(x, teacher, target), student),
        "VoCoLoss": lambda: forward_and_backward(lambda x: loss((x, teacher), target), student),
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        values = {name: float(call()) for name, call in timed.items()}
        seconds = interleaved(timed, repeats)
        print(f"B {B}, R {R}, K {K}, D {D}, forward and backward, {threads} thread(s)")
        for name, value in seconds.items():
            print(f"  {name:16s} {1e3 * value:8.2f} ms, value {values[name]:.6f}")
        print(f"  loop over pairs / VoCoLoss: {seconds['loop over pairs'] / seconds['VoCoLoss']:.1f}")


if __name__ == "__main__":
    main()
