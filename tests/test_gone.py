"""A model that is deleted, restored or converted anew gives its feedback back at once, not to a garbage collector."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .every_rule import EVERY
from .leftovers import counts, left_by, no_gc


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(),
        nn.Linear(8, 4),
    )  # fmt: skip


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 4))


class Tied(nn.Module):
    """Uses a child's weight itself, and the other way round as well."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.last = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(F.linear(torch.tanh(self.first(x)), self.tied.weight, self.tied.bias))
        return self.last(h @ self.tied.weight)


NETS = {"cnn": (cnn, (5, 2, 6, 6)), "transformer": (transformer, (5, 3, 5)), "tied": (Tied, (5, 5))}
LABELS = torch.tensor([0, 3, 1, 2, 0])


def trained(net, rule, **options):
    make, shape = NETS[net]
    model = rewire.convert(make(), rule, **options)
    x = torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), LABELS).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", EVERY.values())
def test_deleted(rule, net):
    assert not left_by(lambda: trained(net, rule) and None)


@pytest.mark.parametrize("rule", EVERY.values())
def test_the_last_one(rule):
    """Nothing that is shared by models keeps the one that used it last."""
    with no_gc():
        before = counts()
        trained("cnn", rule)
        assert {kind for kind, n in counts().items() if n > before.get(kind, 0)} <= {"Tensor"}


@pytest.mark.parametrize("feedback", ["channel", "sparse", "lowrank", "shared", "seeded"])
def test_deleted_with_other_feedback(feedback):
    assert not left_by(lambda: trained("transformer", "dfa", feedback=feedback) and None)


def bent(a):
    return torch.where(a > 0, 1.0, 0.1)


@pytest.mark.parametrize("rule", ["dfa", "fa"])
@pytest.mark.parametrize(
    "options",
    [{"derivative": {nn.ReLU: bent}}, {"on_nonfinite": "skip"}, {"layers": {"0": "bp"}}, {"output": "7"}],
    ids=lambda options: next(iter(options)),
)
def test_deleted_with_other_options(options, rule):
    assert not left_by(lambda: trained("cnn", rule, **options) and None)


@pytest.mark.parametrize("net", NETS)
def test_deleted_after_streamed_passes(net):
    def once():
        model = trained(net, "dfa", skip="cut")
        for _ in range(2):
            rewire.backward_streamed(model, torch.randn(NETS[net][1]), lambda y: F.cross_entropy(y, LABELS))

    assert not left_by(once)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", ["dfa", "fa", "frsf", "kp"])
@pytest.mark.parametrize("how", ["restored", "converted anew", "copied"])
def test_not_only_deleted(rule, how, net):
    model = trained(net, "dfa")

    def once():
        rewire.convert(model, rule)
        x = torch.randn(NETS[net][1])
        for _ in range(2):
            model.zero_grad()
            F.cross_entropy(model(x), LABELS).backward()
        if how == "restored":
            rewire.restore(model)
        elif how == "copied":
            copy.deepcopy(model)
        for p in model.parameters():
            p.grad = None

    assert not left_by(once)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", EVERY.values())
def test_a_loss_outlives_its_model(rule, net):
    """What its backward needs lives as long as it does."""
    torch.manual_seed(0)
    model = trained(net, rule)
    other = copy.deepcopy(model)
    x = torch.randn(NETS[net][1])
    F.cross_entropy(model(x), LABELS).backward()
    parameters, loss = list(other.parameters()), F.cross_entropy(other(x), LABELS)
    del other
    loss.backward()
    for ours, theirs in zip(parameters, model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("rule", ["fa", "kp", "bp"])
def test_a_part_outlives_its_model(rule):
    model = trained("cnn", rule)
    other = copy.deepcopy(model)
    part = other[:5]
    del other
    x = torch.randn(NETS["cnn"][1])
    for net in (model[:5], part):
        for _ in range(2):
            net(x).square().sum().backward()
    for ours, theirs in zip(part.parameters(), model[:5].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_failed_conversion_gives_nothing_back():
    model = trained("cnn", "dfa")
    kept = rewire.feedback(model)
    with pytest.raises(rewire.ConversionError):
        rewire.convert(model, "fa", layers={"no such layer": "bp"})
    again = rewire.feedback(model)
    assert all(again[name] is B for name, B in kept.items())
