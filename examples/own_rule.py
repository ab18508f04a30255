"""A rule of one's own, used by name like any other: DFA whose error keeps only its largest entry per sample.

python examples/own_rule.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rewire
from rewire.ablation import Cell, Result, run_cell


@rewire.register_rule("loudest")
class Loudest(rewire.DirectRule):
    """``B e'``, e' being e with everything but its largest entries (by magnitude) set to zero."""

    def __init__(self, *, keep: int = 1, layout: str | None = None, feedback: str | None = None) -> None:
        super().__init__(layout=layout, feedback=feedback)
        self.keep = keep

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        least = error.abs().topk(self.keep, axis).values.amin(axis, keepdim=True)
        return error * (error.abs() >= least)


def one_pass() -> nn.Module:
    """Convert by name, with an option; run one pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    rewire.convert(model, "loudest(keep=2)", scale=0.1)
    x, y = torch.randn(5, 8), torch.randint(4, (5,))
    nn.functional.cross_entropy(model(x), y).backward()
    return model


def ablation(epochs: int = 3) -> list[Result]:
    """Train digits under it, beside dfa. ``rewire.cli.main(["ablate", "--rules", "dfa loudest"])`` prints the table."""
    rules = ("dfa", "loudest", "loudest(keep=3)")
    return [run_cell(Cell(model="mlp", rule=rule, seed=0, epochs=epochs)) for rule in rules]


def main() -> None:
    """Its summary, and how it trains."""
    print(rewire.summary(one_pass()))
    for result in ablation():
        print(f"{result.cell.rule:<16} {100 * result.accuracy:.1f} % of the test digits after 3 epochs")


if __name__ == "__main__":
    main()
