"""Alignment with backprop over training, with the checks whether it means anything.

    python examples/alignment.py [lenet|residual] [rule] [picture.png]

``lenet`` learns scikit-learn's handwritten digits. ``residual`` is a pre-norm residual MLP that ends in a LayerNorm,
with labels that are half noise and a large learning rate: under a direct rule its activations blow up, and are flagged.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import rewire


class Block(nn.Module):
    """Adds to the stream; reads it normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(F.gelu(self.a(self.norm(h))))


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def residual() -> nn.Module:
    blocks = [Block(64) for _ in range(3)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 10))


def main(network: str = "lenet", rule: str = "fa", picture: str = "", steps: int = 500) -> rewire.Alignment:
    """Train, and print the last measurement; returns it."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.as_tensor(digits.images / 16).float().unsqueeze(1)
    y = torch.as_tensor(digits.target)
    noise, lr = (0.5, 2e-2) if network == "residual" else (0.0, 2e-3)

    model = rewire.convert({"lenet": lenet, "residual": residual}[network](), rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    recorder = rewire.Recorder(model, lambda out: F.cross_entropy(out, y[:256]), every=25, inputs=x[:256])

    for _ in range(steps):
        recorder.step()  # the one line
        batch = torch.randint(len(x), (32,))
        labels = torch.where(torch.rand(32) < noise, torch.randint(10, (32,)), y[batch])
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels).backward()
        optimizer.step()

    last = recorder.measure()
    print(last)
    if picture:
        recorder.plot(picture)
        print(f"curves: {picture}")
    return last


if __name__ == "__main__":
    main(*sys.argv[1:4])
