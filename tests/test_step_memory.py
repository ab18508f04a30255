"""What a training step holds at its peak: no more under a direct rule than under backprop, but for the feedback."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rewire
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
    """Where e B is a product of PyTorch's own, and where a port makes it."""
    backprop, direct, one_layer = _peaks(shape)
    assert direct <= backprop + one_layer  # e B lives beside the tensor it is made for
    assert direct <= 1.01 * backprop


def test_small_feedback_is_made_at_once() -> None:
    backprop, direct, one_layer = _peaks((64, 64))
    assert direct <= backprop + (DEPTH + 1) * one_layer
    backprop, direct, _ = _peaks((256, 64))  # as much as is held at most, and a little more
    assert direct <= backprop + 4 * _HELD
