"""What verify holds at its peak, beside a training step: users run it on models that just fit."""

import pytest
import torch
from torch import nn

import rewire
from tests.leftovers import left_by
from tests.peaks import peak


def chain(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def step(model: nn.Module, x: torch.Tensor) -> None:
    loss(model(x)).backward()
    model.zero_grad()


@pytest.mark.parametrize(
    ("rule", "width", "rows", "most"),
    [
        # A step holds what each layer is given and returns. Beside it: what was handed back, and deltas.
        ("fa", 32, 4096, 2.6),
        ("dfa", 32, 4096, 2.6),
        # A step holds one set of gradients. Here: a copy of the model, three sets, and R under a local rule.
        ("fa", 512, 4, 5.5),
        ("dfa", 512, 4, 4.5),
    ],
)
def test_times_a_training_step(rule: str, width: int, rows: int, most: float) -> None:
    model, x = rewire.convert(chain(width, 12), rule), torch.randn(rows, width)
    for _ in range(2):
        step(model, x)
    one = peak(lambda: step(model, x))
    result = None

    def run() -> None:
        nonlocal result
        result = rewire.verify(model, x, loss)

    times = peak(run) / one
    assert result is not None and result.ok
    assert times < most, times


class Two(nn.Linear):
    """Returns y, and something made of it that no loss sees."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, torch.tanh(y)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.two, self.last = nn.Linear(5, 6), Two(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.tanh(self.first(x)))[0]
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", ["fa", "brsf", "dfa"])
def test_nothing_is_left(rule: str) -> None:
    """Not the copy of the model either, though some of the graph it made is never run."""
    model, x = rewire.convert(Half(), rule), torch.randn(6, 5)
    for _ in range(3):
        step(model, x)
    assert not left_by(lambda: rewire.verify(model, x, loss), collect=True)
