"""Networks of sign and step units on handwritten digits, trained by backprop and DFA with three kinds of derivative.

python examples/sign_network.py

A sign has derivative zero almost everywhere, so gradients stop at it; under any rule only what lies above the last one
learns. ``derivative=`` puts another function in its place in the backward pass, and nothing else changes: forward, the
network still computes signs.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewire
from rewire.ablation.data import load


class Sign(nn.Module):
    """1 or -1."""

    def forward(self, a: Tensor) -> Tensor:
        return torch.where(a >= 0, 1.0, -1.0) + 0 * a


class Step(nn.Module):
    """1 or 0."""

    def forward(self, a: Tensor) -> Tensor:
        return torch.where(a >= 0, 1.0, 0.0) + 0 * a


def straight_through(a: Tensor) -> Tensor:
    """1 where the unit is near its threshold, 0 elsewhere."""
    return (a.abs() <= 1).to(a.dtype)


def fast_sigmoid(a: Tensor) -> Tensor:
    """A smooth bump: the surrogate derivative usual for spiking networks."""
    return 1 / (1 + a.abs()) ** 2


DERIVATIVES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "its own (zero)": None,
    "straight-through": straight_through,
    "fast sigmoid": fast_sigmoid,
}
RULES = ("bp", "dfa", "fitted")


def train(
    unit: type[nn.Module], rule: str, derivative: Callable[[Tensor], Tensor] | None, seed: int, epochs: int
) -> float:
    """Test error of a network with two hidden layers of 256 ``unit``."""
    digits = load("digits")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), unit(), nn.Linear(256, 256), unit(), nn.Linear(256, 10))
    rewire.convert(model, rule, seed=seed, derivative=None if derivative is None else {unit: derivative})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(digits.x_train)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.x_train[part]), digits.y_train[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(digits.x_test).argmax(1) != digits.y_test).double().mean())


def results(epochs: int = 6, seeds: int = 2) -> dict[tuple[str, str, str], float]:
    """Mean test error by (unit, derivative, rule)."""
    return {
        (unit.__name__, name, rule): mean(train(unit, rule, derivative, seed, epochs) for seed in range(seeds))
        for unit in (Sign, Step)
        for name, derivative in DERIVATIVES.items()
        for rule in RULES
    }


def main() -> None:
    torch.set_num_threads(1)
    found = results()
    table = Table(title="digits, two hidden layers of 256, 6 epochs: test error %, mean of 2 seeds")
    for column in ("unit", "derivative", *RULES):
        table.add_column(column, justify="right" if column in RULES else "left")
    for unit in ("Sign", "Step"):
        for name in DERIVATIVES:
            table.add_row(unit, name, *(f"{100 * found[unit, name, rule]:.1f}" for rule in RULES))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
