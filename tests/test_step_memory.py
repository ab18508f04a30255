"""What a training step holds at its peak: no more under a direct rule than under backprop, but for the feedback."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire import steady
from rewire.handback import _HELD
from tests.peaks import peak

DEPTH = 24


def _chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=False)


def _peaks(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(Backprop's, the direct rule's, of one layer's input), in bytes, the feedback left out."""
    base, x = _chain(), torch.randn(shape)
    model = rewire.convert(copy.deepcopy(base), "dfa")
    for _ in range(3):
        _step(base, x)
        _step(model, x)
    feedback = sum(B.nbytes for B in rewire.feedback(model).values())
    backprop, direct = (peak(lambda m=m: _step(m, x)) for m in (base, model))
    return backprop, direct - feedback, x.nbytes


@pytest.mark.parametrize("shape", [(8192, 64), (64, 128, 64)])
def test_no_more_than_backprop(shape: tuple[int, ...]) -> None:
    """Where a port makes e B, for each sample or for each of its tokens."""
    backprop, direct, one_layer = _peaks(shape)
    assert direct <= backprop + one_layer  # e B lives beside the tensor it is made for
    assert direct <= 1.01 * backprop


@pytest.mark.parametrize("width", [128, 512])
def test_an_ordinary_step_of_a_small_network(width: int) -> None:
    """Feedback that is made at once is gone before the gradients are all there: the peak is theirs."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    base = nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
    model, x = rewire.convert(copy.deepcopy(base), "dfa"), torch.randn(128, 784)
    for _ in range(3):
        model(x).square().mean().backward()
    peaks = {}
    for m in (base, model):
        m.zero_grad()
        peaks[m] = peak(lambda m=m: m(x).square().mean().backward())
    assert peaks[model] <= peaks[base] + rewire.summary(model).feedback_bytes


def test_small_feedback_is_made_at_once() -> None:
    backprop, direct, one_layer = _peaks((64, 64))
    assert direct <= backprop + (DEPTH + 1) * one_layer
    backprop, direct, _ = _peaks((256, 64))  # as much as is held at most, and a little more
    assert direct <= backprop + 4 * _HELD


class _Tokens(nn.Module):
    """(N, T, 5) to (N, 3), with ``between`` before the second of three layers."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.lower, self.between = nn.Linear(5, 6), between
        self.middle, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.between(self.lower(x))
        return self.head(self.middle(self.seen).mean(1))


@pytest.mark.parametrize(
    ("between", "repeats"), [(nn.GELU(), True), (nn.ReLU(inplace=True), True), (nn.LayerNorm(6), False)]
)
def test_what_is_the_same_for_all_tokens_is_not_written_out(
    monkeypatch: pytest.MonkeyPatch, between: nn.Module, repeats: bool
) -> None:
    """Where an activation reads it; a norm or a product would be slow on it. The numbers are those of e B."""
    monkeypatch.setattr(steady, "_VIEWED", 0)  # as outputs of any size but the smallest
    torch.manual_seed(0)
    model, x = rewire.convert(_Tokens(between).double(), "dfa", scale=0.3), torch.randn(4, 8, 5).double()
    for _ in range(2):
        out = model(x)
        arrived: list[Tensor] = []
        model.seen.register_hook(arrived.append)
        out.square().sum().backward()
    (gradient,) = arrived
    eB = (2 * out.detach().numpy()) @ rewire.feedback(model)["middle"].numpy()
    np.testing.assert_allclose(gradient.numpy(), np.repeat(eB[:, None], 8, 1), atol=1e-12)
    assert (gradient.stride(1) == 0) is repeats
    assert repeats or gradient.is_contiguous()
