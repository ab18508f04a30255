"""Mistakes in rules and structures of one's own: one message each, which names rule, layer and both shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.rules import LearnedDirect
from rewire.swap import state_of

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))


def images():
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 10))


def train(model, passes=2, x=X):
    for _ in range(passes):
        model.zero_grad()
        F.cross_entropy(model(x), Y).backward()


def message(model, x=X):
    with pytest.raises(rewire.PassError) as caught:
        train(model, x=x)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def local(make, **more):
    def backward_weight(self, weight, random, scale):
        return make(weight, random)

    return type("Mine", (rewire.LocalRule,), {"backward_weight": backward_weight, **more})()


def direct(make, base=rewire.DirectRule, **more):
    return type("Mine", (base,), {"signal": lambda self, error, targets, axis: make(error, targets), **more})()


WRONG_WEIGHTS = {
    "transposed": (lambda w, r: r.t(), ["shape (12, 10)", "has (10, 12)"]),
    "a number": (lambda w, r: torch.tensor(1.0), ["shape ()", "(10, 12)"]),
    "wide": (lambda w, r: r.double(), ["torch.float64", "torch.float32", "(10, 12)"]),
    "none": (lambda w, r: None, ["returned None", "(10, 12)"]),
    "an array": (lambda w, r: r.numpy(), ["returned a ndarray", "(10, 12)"]),
    "in place": (lambda w, r: w.mul_(2), ["in place"]),
    "R in place": (lambda w, r: r.mul_(2), ["in place"]),
}


@pytest.mark.parametrize("redraw", [False, True])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_a_wrong_backward_weight(what, reads, redraw):
    make, words = WRONG_WEIGHTS[what]
    if what == "in place" and not reads:
        pytest.skip("there is no weight")
    model = rewire.convert(net(), local(make, uses_weight=reads, redraw=redraw))
    before = [p.detach().clone() for p in model.parameters()]
    said = message(model)
    # What is made of R alone is made in the first forward, and the first layer has nothing to hand back to.
    forward = not (reads or redraw)
    words = [
        word.replace("(12, 10)", "(16, 12)").replace("(10, 12)", "(12, 16)") if forward else word for word in words
    ]
    for word in ("layer '2'" if forward else "layer '4'", "Mine.backward_weight", *words):
        assert word in said, said
    if what != "in place":
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_wrong_backward_weight_of_a_convolution():
    rule = local(lambda w, r: r.transpose(0, 1))
    said = message(rewire.convert(images(), rule, layers={"4": "bp"}), torch.randn(6, 2, 2, 2))
    assert "layer '2'" in said and "(2, 4, 1, 1)" in said and "(4, 2, 1, 1)" in said


WRONG_SIGNALS = {
    "none": (lambda e, t: None, ["returned None", "(6, 10)"]),
    "fewer rows": (lambda e, t: e[:3], ["(3, 10)", "(6, 10)"]),
    "a sum": (lambda e, t: e.sum(), ["()", "(6, 10)"]),
    "a dimension more": (lambda e, t: e[None], ["(1, 6, 10)", "(6, 10)"]),
    "wide": (lambda e, t: e.double(), ["torch.float64", "torch.float32"]),
    "in place": (lambda e, t: e.mul_(2), ["in place"]),
}


@pytest.mark.parametrize("scale", ["auto", 0.1])
@pytest.mark.parametrize("what", WRONG_SIGNALS)
def test_a_wrong_signal(what, scale):
    make, words = WRONG_SIGNALS[what]
    said = message(rewire.convert(net(), direct(make), scale=scale))
    for word in ("output layer '4'", "Mine.signal", *words):
        assert word in said, said


def test_another_number_of_features_is_none():
    model = rewire.convert(net(), direct(lambda e, t: e[:, :3]), scale=0.1)
    train(model)
    assert rewire.feedback(model)["2"].shape == (3, 16)
    assert rewire.verify(model, X, lambda out: F.cross_entropy(out, Y)).ok


@pytest.mark.parametrize("make", [lambda e, t: t, lambda e, t: F.one_hot(t, 10).to(e)], ids=["none", "an error"])
def test_a_rule_that_needs_targets_without_any(make):
    said = message(rewire.convert(net(), direct(make, needs_targets=True)))
    for word in ("output layer '4'", "Mine.signal", "needs targets", "rewire.targets(y)"):
        assert word in said, said


def test_a_rule_under_use_rule():
    """Layers know their roles by then."""
    model = rewire.convert(net(), "dfa")
    train(model)
    with rewire.use_rule(model, direct(lambda e, t: e[:3])):
        assert "Mine.signal" in message(model)
    with rewire.use_rule(model, local(lambda w, r: r.t())):
        assert "Mine.backward_weight" in message(model)


def test_what_raises_by_itself_is_left_alone():
    with pytest.raises(ZeroDivisionError):
        train(rewire.convert(net(), direct(lambda e, t: 1 / 0)))
    with pytest.raises(NotImplementedError, match=r"R has no backward_weight\(self"):
        train(rewire.convert(net(), type("R", (rewire.LocalRule,), {})()))
    with pytest.raises(NotImplementedError, match=r"R has no signal\(self"):
        train(rewire.convert(net(), type("R", (rewire.DirectRule,), {})()))


def test_it_is_looked_at_once():
    """Later uses cost nothing: what a rule makes then is PyTorch's to refuse."""
    calls = []

    def make(error, targets):
        calls.append(error)
        return error if len(calls) < 3 else error.double()

    model = rewire.convert(net(), direct(make), scale=0.1)
    train(model, 2)
    with pytest.raises(RuntimeError, match="dtype"):
        train(model, 1)
    weights = []

    def weight(w, r):
        weights.append(w)
        return w if len(weights) < 5 else w.double()

    model = rewire.convert(net(), local(weight))
    train(model, 2)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        train(model, 1)
    assert not isinstance(caught.value, rewire.RewireError)


@dataclass(frozen=True, repr=False)
class Turned(rewire.structures.Structure):
    per: str = "channel"
    dtype: torch.dtype | None = None
    nothing: bool = False

    def make(self, place):
        return None if self.nothing else torch.rand(place.shape[::-1])

    def size(self, shape, itemsize):
        return math.prod(shape) * itemsize

    @property
    def fixed(self):
        return ""


@pytest.mark.parametrize("scale", ["auto", 0.1])
@pytest.mark.parametrize("rule", ["dfa", direct(lambda e, t: e, LearnedDirect)], ids=["fixed", "learns"])
def test_a_structure_that_makes_another_shape(rule, scale):
    method = "draw" if rule != "dfa" else "make"
    said = message(rewire.convert(net(), rule, feedback=Turned(), scale=scale))
    for word in ("layer '4'", f"Turned.{method}", "(12, 10)", "(10, 12)"):
        assert word in said, said
    said = message(rewire.convert(net(), rule, feedback=Turned(nothing=True), scale=scale))
    assert f"Turned.{method} returned None" in said and "(10, 12)" in said


def test_what_was_looked_at_does_not_pile_up():
    """Each block has a rule object of its own."""
    model, x = rewire.convert(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "dfa"), torch.randn(2, 4)
    for _ in range(20):
        with rewire.use_rule(model, "sdfa"):
            model(x).sum().backward()
    assert len(state_of(model[2]).looked) <= 2
