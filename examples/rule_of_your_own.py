"""A rule of one's own, used by name: DFA whose error keeps only its largest entry per sample.

python examples/rule_of_your_own.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rewire


@rewire.register_rule("loudest")
class Loudest(rewire.DirectRule):
    """``B e'``, e' being e with everything but its largest entry (by magnitude) set to zero."""

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error * (error.abs() == error.abs().amax(axis, keepdim=True))


def main() -> None:
    """One pass, and what was handed to the last hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    rewire.convert(model, "loudest", scale=0.1)
    x, y = torch.randn(5, 8), torch.randint(4, (5,))
    nn.functional.cross_entropy(model(x), y).backward()
    print(rewire.summary(model))
    print("output error:\n", rewire.output_error(model))


if __name__ == "__main__":
    main()
