"""Layers with one weight, some of which never run; and weights that embeddings have too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from tests.traps.test_functional_weights import Kernel

LOCAL = ("fa", "usf", "brsf", "frsf")


class Inner(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.head = nn.Linear(8, 8, bias=bias)

    def forward(self, x):
        return self.head(x)


class TwoStages(nn.Module):
    """As a detector whose decoder has the heads: the model has them too, and may use none, or one's weight itself.

    Args:
        uses: its own forward uses the weight that both have.
        first: its own head is registered first.
    """

    def __init__(self, tied=True, bias=True, uses=False, first=False):
        super().__init__()
        self.body = nn.Linear(6, 8)
        if first:
            self.head = nn.Linear(8, 8, bias=bias)
        self.inner = Inner(bias)
        if not first:
            self.head = nn.Linear(8, 8, bias=bias)
        self.out = nn.Linear(8, 3)
        self.uses = uses
        if tied:
            self.head.weight = self.inner.head.weight

    def forward(self, x):
        self.a = torch.tanh(self.body(x))
        self.b = h = torch.tanh(self.inner(self.a))
        if self.uses:
            h = torch.tanh((Kernel.apply if self.uses == "kernel" else F.linear)(h, self.head.weight))
        self.c = h
        return self.out(h)


def gradients(model, x, passes=4):
    """Of each of some passes, with weights and inputs that stay the same."""
    found = []
    for _ in range(passes):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def build(rule, **options):
    torch.manual_seed(0)
    return rewire.convert(TwoStages(**options).double(), rule, scale=0.3)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (5, 1, 6)])
@pytest.mark.parametrize("rule", [*(rule for rule in LOCAL if rule != "brsf"), "dfa"])
def test_a_layer_that_never_runs_changes_nothing_for_its_twin(rule, shape, bias, recwarn):
    x = randn(*shape)
    tied, apart = (build(rule, tied=tied, bias=bias) for tied in (True, False))
    wanted = gradients(apart, x)
    recwarn.clear()
    for got, plain in zip(gradients(tied, x), wanted, strict=True):
        assert got.keys() == plain.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, plain[name])
    assert not [str(w.message) for w in recwarn if issubclass(w.category, rewire.RewireWarning)]
    assert {row.name: row.role for row in rewire.summary(tied).rows if row.role == "output"} == {"out": "output"}
    assert not tied._forward_hooks  # nothing left to watch for
    result = rewire.verify(tied, x, lambda y: y.square().sum())
    assert result.ok and {layer.name: layer.status for layer in result.layers}["head"] == "not run", str(result)


@pytest.mark.parametrize("called", ["part", "whole"])
def test_a_twin_that_ran_before_the_module_around_it_did(called):
    """The first pass may be one of a part, in which nothing above it is watched."""
    model, x = build("fa"), randn(5, 6)
    if called == "part":
        model.inner(randn(5, 8)).sum().backward()
    first, *others = gradients(model, x)
    for got in others:
        torch.testing.assert_close(got, first)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_twin_runs_and_its_weight_is_used_as_well(rule, first):
    model, x = build(rule, uses=True, first=first), randn(5, 6)
    for got in gradients(model, x):
        a, b, c = model.a.detach(), model.b.detach(), model.c.detach()
        e, B = rewire.output_error(model), rewire.feedback(model)
        used = "head" if first else "inner.head"  # whose use it counts as
        if rule == "dfa":
            deltas = [e @ B["out"], e @ B[used], e @ B["inner.head"]]
        else:
            deltas = [e @ B["out"]]
            deltas.append((deltas[0] * (1 - c**2)) @ B[used])
            deltas.append((deltas[1] * (1 - b**2)) @ B["inner.head"])
        torch.testing.assert_close(got["body.weight"], (deltas[2] * (1 - a**2)).T @ x)
    assert rewire.verify(model, x, lambda y: y.square().sum()).ok


def test_a_twin_runs_and_its_weight_is_used_by_a_kernel_as_well():
    model, x = build("fa", uses="kernel"), randn(5, 6)
    with pytest.warns(rewire.RewireWarning, match="'inner.head'"):  # not the one that never runs
        gradients(model, x)
    result = rewire.verify(model, x, lambda y: y.square().sum())
    assert {layer.name: layer.status for layer in result.layers}["inner.head"] == "dead", str(result)


def test_layers_tied_after_conversion():
    model, x = build("fa", tied=False), randn(5, 6)
    model.head.weight = model.inner.head.weight
    first, *others = gradients(model, x)
    for got in others:
        torch.testing.assert_close(got, first)


class Language(nn.Module):
    """A head tied to the embedding: called, left out for a reward, or its weight used in another way."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.lm_head, self.reward = nn.Linear(6, 7, bias=False), nn.Linear(6, 1)
        self.after = nn.Linear(7, 2)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids, how="reward"):
        h = torch.tanh(self.body(self.embed(ids)))
        if how == "reward":
            return self.reward(h)
        if how == "call":
            return self.lm_head(h)
        return self.after(torch.tanh(F.linear(h, self.embed.weight) if how == "linear" else kernel(h, self.embed)))


def kernel(h, embed):
    return Kernel.apply(h.flatten(0, -2), embed.weight).unflatten(0, h.shape[:-1])


IDS = torch.tensor([[0, 3, 1], [6, 2, 2]])


def language(how, passes=2, rule="fa", model=None):
    torch.manual_seed(0)
    model = rewire.convert(Language(), rule) if model is None else model
    for _ in range(passes):
        model.zero_grad()
        model(IDS, how).square().mean().backward()
    result = rewire.verify(model, (IDS, how), lambda y: y.square().mean())
    return model, result, {layer.name: layer.status for layer in result.layers}["lm_head"]


def note_of(model, name):
    return next(row.note for row in rewire.summary(model).rows if row.name == name)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_head_tied_to_an_embedding_that_is_not_used(rule, recwarn):
    model, result, status = language("reward", rule=rule)
    assert result.ok and status == "not run", str(result)
    assert not [str(w.message) for w in recwarn if "lm_head" in str(w.message)]
    assert "NOT" not in note_of(model, "lm_head")


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_the_embeddings_weight_as_a_head_is_a_use_of_the_tied_layer(rule, recwarn):
    _, result, status = language("linear", rule=rule)
    assert result.ok and status == "live", str(result)
    assert not [str(w.message) for w in recwarn if "lm_head" in str(w.message)]


def test_the_embeddings_weight_in_a_kernel_is_not_silent():
    with pytest.warns(rewire.RewireWarning, match="'lm_head'"):
        model, result, status = language("kernel")
    assert not result.ok and status == "dead", str(result)
    assert "NOT under its rule" in note_of(model, "lm_head")


def test_a_layer_whose_weight_was_lost_from_sight_runs_after_all():
    """A penalty in the first pass looks like a use that nobody saw."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.later = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 6)

        def forward(self, x, both=False):
            h = torch.tanh(self.a(x))
            return self.b(torch.tanh(self.later(h)) if both else h)

    torch.manual_seed(0)
    model, x = rewire.convert(Net(), "fa"), torch.randn(5, 6)
    with pytest.warns(rewire.RewireWarning, match="'later'"):
        (model(x).square().mean() + model.later.weight.square().sum()).backward()
    assert "NOT" in note_of(model, "later")
    for _ in range(2):
        model.zero_grad()
        model(x, both=True).square().mean().backward()
    result = rewire.verify(model, (x, True), lambda y: y.square().mean())
    assert result.ok, str(result)
    assert "NOT" not in note_of(model, "later")
