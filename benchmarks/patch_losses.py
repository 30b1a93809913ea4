# SPDX-License-Identifier: Apache-2.0
"""NTXentLoss and CPCLoss against MONAI's ContrastiveLoss, and whole patch-pretext steps against the bare encoder.

    python -m benchmarks.patch_losses

Both losses make their scores with one matrix product; ContrastiveLoss builds a (2N, 2N, D) tensor. A step is network,
loss, backward and optimiser; the bare encoder runs forward and backward over the same patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.losses import ContrastiveLoss
from monai.networks.nets import FullyConnectedNet
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn

from benchmarks.timing import interleaved
from monai_ssl.losses import CPCLoss, NTXentLoss
from monai_ssl.networks import CPCNet, PatchClassifier, ProjectionHead

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
N, D, TEMPERATURE = 256, 128, 0.5
VOLUMES = 4 if CUDA else 1
# patches of an item and voxels per axis: the default grids in a crop of 96^3, the crop itself, two views of 64^3
PATCHES = {"CPC": (64, 18), "RPL": (27, 24), "Jigsaw": (27, 24), "Rotation": (1, 96), "Exemplar": (2, 64)}


def forward_and_backward(loss: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Value of the loss, after its backward pass into fresh leaves."""
    leaves = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = loss(*leaves)
    value.backward()
    wait()
    return value.detach()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def cpc_by_cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """InfoNCE of rows (N, D) the way ContrastiveLoss makes its scores."""
    scores = F.cosine_similarity(prediction[:, None], target[None], dim=2) / TEMPERATURE
    return -(scores.diagonal().exp() / scores.exp().sum(1)).log().mean()


def time_losses(repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, N, D, generator=generator).to(DEVICE)
    cpc = CPCLoss(temperature=TEMPERATURE)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ContrastiveLoss": ContrastiveLoss(TEMPERATURE),
        "NTXentLoss": NTXentLoss(TEMPERATURE),
        "CPCLoss": lambda x, t: cpc(x.view(1, N, 1, D), t.view(1, N, 1, D)),
        "InfoNCE by cosine_similarity": cpc_by_cosine_similarity,
    }
    calls = {name: lambda f=loss: forward_and_backward(f, first, second) for name, loss in losses.items()}
    values = {name: float(call()) for name, call in calls.items()}
    seconds = interleaved(calls, repeats)
    print(f"N {N}, D {D}, forward and backward, {torch.get_num_threads()} thread(s)")
    for name, value in seconds.items():
        ratio = seconds["ContrastiveLoss"] / value
        print(
            f"  {name:29s} {1e3 * value:8.2f} ms, {ratio:6.1f} x as fast as ContrastiveLoss, value {values[name]:.6f}"
        )
    nt_xent = abs(values["NTXentLoss"] - values["ContrastiveLoss"])
    infonce = abs(values["CPCLoss"] - values["InfoNCE by cosine_similarity"])
    print(f"  NTXentLoss differs from ContrastiveLoss by {nt_xent:.1e}  (at most 1e-5)")
    print(f"  CPCLoss differs from the cosine_similarity form by {infonce:.1e}  (at most 1e-5)")


class Setup:
    """The default encoder, a pretext network around it, patches, and the two alternatives."""

    def __init__(self, pretext: str) -> None:
        torch.manual_seed(0)
        encoder = SegResEncoder(3, init_filters=16, norm="instance", blocks_down=(1, 2, 2, 4))
        num, size = PATCHES[pretext]
        volumes = max(VOLUMES, 2) if pretext == "Exemplar" else VOLUMES  # one has no negatives
        self.network: nn.Module
        self.loss: Callable[..., Tensor]
        if pretext == "CPC":
            self.network, cpc = CPCNet(encoder, 128), CPCLoss()
            self.loss = lambda pair: cpc(*pair)
        elif pretext == "Exemplar":
            self.network = PatchClassifier(encoder, ProjectionHead((128, 128, 128), norm="batch"), "each")
            contrast = NTXentLoss()
            self.loss = lambda z: contrast(z[:, 0], z[:, 1])
        else:
            shape = {"RPL": (256, 512, 26), "Jigsaw": (27 * 128, 1024, 100), "Rotation": (8 * 128, 256, 10)}
            inputs, hidden, outputs = shape[pretext]
            head = FullyConnectedNet(inputs, outputs, [hidden], act="relu", adn_ordering="A")
            combine, pool = "pairs" if pretext == "RPL" else "concat", 2 if pretext == "Rotation" else "avg"
            self.network = PatchClassifier(encoder, head, combine, pool=pool)
            label = torch.arange(26, device=DEVICE).expand(volumes, -1)
            label = label if pretext == "RPL" else label[:, 0]
            self.loss = lambda logits: F.cross_entropy(logits, label)
        self.network.to(DEVICE)
        self.volumes = volumes
        self.image = torch.rand(volumes, num, 1, size, size, size, device=DEVICE)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-5)

    def bare(self) -> None:
        """Forward and backward of the encoder over all patches, with the cheapest loss."""
        self.optimizer.zero_grad()
        self.network.encoder(self.image.flatten(0, 1))[-1].mean().backward()
        wait()

    def step(self, waiting: bool = True) -> None:
        self.optimizer.zero_grad()
        self.loss(self.network(self.image)).backward()
        self.optimizer.step()
        if waiting:
            wait()

    def encoded(self) -> list[int]:
        """Patches in each call of the encoder during one step."""
        batches: list[int] = []
        handle = self.network.encoder.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
        self.step()
        handle.remove()
        return batches


def time_steps(repeats: int) -> None:
    print("whole step over the bare encoder's forward and backward (at most 1.10)")
    for name in PATCHES:
        setup = Setup(name)
        seconds = interleaved({"bare": setup.bare, "step": setup.step}, repeats)
        ratio = seconds["step"] / seconds["bare"]
        calls = ", ".join(f"{n / setup.volumes:.0f}" for n in setup.encoded())
        print(f"  {name:8s} {ratio:.3f} x {seconds['bare']:.3f} s, {setup.volumes} volume(s); encoded of each: {calls}")
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")
            setup.step(waiting=False)
            torch.cuda.set_sync_debug_mode("default")


def main(repeats: int = 9) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        time_losses(repeats)
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    time_steps(repeats)


if __name__ == "__main__":
    main()
