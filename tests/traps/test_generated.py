"""Modules whose forward was generated: ``torch.fx`` traces, and torchvision's feature extractors made of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire import hosts
from tests.plain import gradients, randn, seeded

X, LABELS = randn(6, 5), torch.tensor([0, 3, 1, 2, 0, 1])


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def loss_of(y):
    return F.cross_entropy(y, LABELS)


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_a_traced_model_has_the_gradients_of_the_model(rule):
    plain = seeded(mlp)
    models = [rewire.convert(m, rule) for m in (copy.deepcopy(plain), torch.fx.symbolic_trace(plain))]
    for _ in range(3):
        for model in models:
            model.zero_grad()
            loss_of(model(X)).backward()
    for one, other in zip(*(gradients(model).values() for model in models), strict=True):
        torch.testing.assert_close(one, other)
    assert rewire.verify(models[1], X, loss_of).ok


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    model = seeded(mlp)

    def failing(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(hosts, "plan", failing)
    with pytest.raises(ZeroDivisionError):
        rewire.convert(model, "dfa")
    assert {type(layer) for layer in model} == {nn.Linear, nn.Tanh}
    monkeypatch.undo()
    rewire.convert(model, "fa")
    monkeypatch.setattr(hosts, "plan", failing)
    with pytest.raises(ZeroDivisionError):
        rewire.convert(model, "dfa")
    assert {row.rule for row in rewire.summary(model).rows} == {"fa"}
