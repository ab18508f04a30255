"""The output error that people see: that of the newest pass, at the output layer, whatever way its calls took."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewire

RULES = ["fa", "usf", "brsf", "dfa", "sdfa"]


def made(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    rewire.convert(model, rule, scale=0.1)
    one_pass(model)
    one_pass(model)
    return model


def one_pass(model, again=False):
    y = model(torch.randn(4, 5, dtype=torch.float64))
    y.retain_grad()
    y.square().sum().backward(retain_graph=again)
    return y


@pytest.mark.parametrize("rule", RULES)
def test_of_the_newest_pass(rule):
    model = made(rule)
    for _ in range(3):
        y = one_pass(model)
        torch.testing.assert_close(rewire.output_error(model), y.grad, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_forwards_without_a_backward_between(rule):
    model = made(rule)
    for forwards in (1, 2, 0, 1):
        for _ in range(forwards):
            model(torch.randn(2, 5, dtype=torch.float64))
        y = one_pass(model)
        torch.testing.assert_close(rewire.output_error(model), y.grad, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_backward_twice(rule):
    model = made(rule)
    y = one_pass(model, again=True)
    (3 * y.sum()).backward()
    torch.testing.assert_close(rewire.output_error(model), torch.full_like(y, 3), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_an_output_changed_in_place(rule):
    model = made(rule)
    y = model(torch.randn(4, 5, dtype=torch.float64))
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(rewire.output_error(model), torch.full_like(y, 2), rtol=0, atol=0)


class Twice(nn.Module):
    """Its output layer is fed its own output."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.last(self.below(x))))


@pytest.mark.parametrize("rule", RULES)
def test_an_output_layer_that_feeds_itself(rule):
    """The loss sees its second call alone: what arrives at the first one is no output error."""
    torch.manual_seed(0)
    model = Twice().double()
    rewire.convert(model, rule, scale=0.1)
    for _ in range(4):
        y = model(torch.randn(4, 3, dtype=torch.float64))
        y.retain_grad()
        y.square().sum().backward()
        torch.testing.assert_close(rewire.output_error(model), y.grad, rtol=0, atol=0)
