"""The tests of the rules must fail when a rule is wrong. Here every rule is broken, in several ways.

Two public places to break one: a Rule of one's own with a wrong formula, and a hook that tampers with
what a correctly converted layer hands to its input. Both go through the very checks the rules' tests use.
"""

from __future__ import annotations

import pytest
import torch

import rewire
from rewire import edges, exchange, handback, local_weights, passes
from rewire.rules.direct import DFA
from rewire.rules.local import USF

from ..reference.networks import RULES
from .checks import NETS, Problem, check_pass, check_rule


def local(formula, **attributes):
    """A LocalRule with B = formula(W, R, s)."""

    def backward_weight(self, weight, random, scale):
        return formula(weight, random, scale)

    return type("Local", (rewire.LocalRule,), {"backward_weight": backward_weight, **attributes})()


def direct(formula, **attributes):
    """A DirectRule with signal formula(e, y*)."""

    def signal(self, error, targets, axis):
        return formula(error, targets)

    return type("Direct", (rewire.DirectRule,), {"signal": signal, **attributes})()


def hot(e, y):
    return torch.nn.functional.one_hot(y, e.shape[1]).to(e.dtype)


def sign(t):
    return torch.sign(t)


# The right formulas, written once more: the checks must let these pass, or failing proves nothing.
RIGHT = {
    "bp": local(lambda W, R, s: W, random=False),
    "fa": local(lambda W, R, s: R),
    "usf": local(lambda W, R, s: s * sign(W), random=False),
    "frsf": local(lambda W, R, s: R.abs() * sign(W)),
    "brsf": local(lambda W, R, s: R.abs() * sign(W), redraw=True),
    "dfa": direct(lambda e, y: e),
    "sdfa": direct(lambda e, y: sign(e)),
    "drtp": direct(lambda e, y: hot(e, y), needs_targets=True),
    "shallow": direct(lambda e, y: 0 * e),
}

WRONG = {
    "bp": {
        "a random B": local(lambda W, R, s: R),
        "the sign of W": local(lambda W, R, s: s * sign(W)),
        "transposed": local(lambda W, R, s: W.flip(0)),
        "negated": local(lambda W, R, s: -W),
    },
    "fa": {
        "W in place of B": local(lambda W, R, s: W),
        "redrawn": local(lambda W, R, s: R, redraw=True),
        "the sign of W": local(lambda W, R, s: R * sign(W)),
        "abs": local(lambda W, R, s: R.abs()),
        "transposed": local(lambda W, R, s: R.flatten().flip(0).reshape(R.shape)),
        "scaled twice": local(lambda W, R, s: s * R),
    },
    "usf": {
        "W in place of B": local(lambda W, R, s: W),
        "no sign": local(lambda W, R, s: s * W),
        "no scale": local(lambda W, R, s: sign(W)),
        "abs": local(lambda W, R, s: s * sign(W).abs()),
        "random magnitudes": local(lambda W, R, s: R.abs() * sign(W)),
        "negated": local(lambda W, R, s: -s * sign(W)),
    },
    "frsf": {
        "W in place of B": local(lambda W, R, s: W),
        "no abs": local(lambda W, R, s: R * sign(W)),
        "no sign": local(lambda W, R, s: R.abs()),
        "redrawn": local(lambda W, R, s: R.abs() * sign(W), redraw=True),
        "no random magnitudes": local(lambda W, R, s: s * sign(W)),
        "W for its sign": local(lambda W, R, s: R.abs() * W),
    },
    "brsf": {
        "W in place of B": local(lambda W, R, s: W),
        "no abs": local(lambda W, R, s: R * sign(W), redraw=True),
        "no sign": local(lambda W, R, s: R.abs(), redraw=True),
        "not redrawn": local(lambda W, R, s: R.abs() * sign(W)),
        "no random magnitudes": local(lambda W, R, s: s * sign(W)),
        "scaled twice": local(lambda W, R, s: s * R.abs() * sign(W), redraw=True),
    },
    "dfa": {
        "the sign of e": direct(lambda e, y: sign(e)),
        "negated": direct(lambda e, y: -e),
        "transposed": direct(lambda e, y: e.flip(1)),
        "samples mixed": direct(lambda e, y: e.roll(1, 0)),
        "no 1/N": direct(lambda e, y: e * len(e)),
        "mean over the batch": direct(lambda e, y: e.mean(0, keepdim=True).expand_as(e).contiguous()),
        "nothing": direct(lambda e, y: 0 * e),
    },
    "sdfa": {
        "no sign": direct(lambda e, y: e),
        "negated": direct(lambda e, y: -sign(e)),
        "one sign": direct(lambda e, y: (e > 0).to(e.dtype)),
        "with 1/N": direct(lambda e, y: sign(e) / len(e)),
    },
    "drtp": {
        "e in place of y*": direct(lambda e, y: e),
        "the sign of e": direct(lambda e, y: sign(e)),
        "negated": direct(lambda e, y: -hot(e, y), needs_targets=True),
        "the next class": direct(lambda e, y: hot(e, y).roll(1, 1), needs_targets=True),
        "with 1/N": direct(lambda e, y: hot(e, y) / len(e), needs_targets=True),
    },
    "shallow": {
        "e handed back": direct(lambda e, y: e),
        "a little of e handed back": direct(lambda e, y: 1e-6 * e),
    },
}
CASES = [(rule, how) for rule, ways in WRONG.items() for how in ways]

# What a layer hands back, given what it should: applied to layer "2", whose input is a tanh's output.
TAMPER = {
    "a millionth too much": lambda g: g * (1 + 1e-6),
    "negated": lambda g: -g,
    "features turned round": lambda g: g.flip(1),
    "samples mixed": lambda g: g.roll(1, 0),
    "nothing": torch.zeros_like,
    "averaged over the batch": lambda g: g.mean(0, keepdim=True).expand_as(g),
}
# Nothing, turned round, is still nothing.
ALIVE = [rule for rule in RULES if rule != "shallow"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_the_right_formula_passes(rule, net):
    check_rule(Problem(net), rule, RIGHT[rule])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("rule", "how"), CASES, ids=[": ".join(case) for case in CASES])
def test_a_wrong_formula_is_found(rule, how, net):
    with pytest.raises(AssertionError):
        check_rule(Problem(net), rule, WRONG[rule][how])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("how", TAMPER)
@pytest.mark.parametrize("rule", ALIVE)
def test_a_wrong_edge_is_found(rule, how, net):
    problem = Problem(net)

    def tamper(module, args):
        if args[0].requires_grad:
            args[0].register_hook(TAMPER[how])

    problem.model[2].register_forward_pre_hook(tamper)
    with pytest.raises(AssertionError, match="gradient of 0"):
        check_rule(problem, rule)


@pytest.mark.parametrize("net", NETS)
def test_anything_handed_back_under_shallow_is_found(net):
    problem = Problem(net)

    def tamper(module, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda g: g + 1e-6)

    problem.model[2].register_forward_pre_hook(tamper)
    with pytest.raises(AssertionError, match="gradient of 0"):
        check_rule(problem, "shallow")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", [r for r in RULES if r != "bp"])
def test_a_layer_left_on_backprop_is_found(rule, net):
    last = Problem(net).network.layers[-1]
    # under shallow the last layer hands nothing to layer "2", so there is nothing left to pass on
    for layer in (last,) if rule == "shallow" else ("2", last):
        with pytest.raises(AssertionError):
            check_rule(Problem(net), rule, layers={layer: "bp"})


def test_every_rule_is_broken_here():
    assert set(WRONG) == set(RIGHT) == set(RULES)


def test_breaking_the_rules_own_class_is_found(monkeypatch):
    check_rule(Problem("mlp"), "usf")
    check_rule(Problem("mlp"), "dfa")
    monkeypatch.setattr(USF, "backward_weight", lambda self, weight, random, scale: weight * scale)
    monkeypatch.setattr(DFA, "signal", lambda self, error, targets, axis: torch.sign(error))
    for rule in ("usf", "dfa"):
        with pytest.raises(AssertionError):
            check_rule(Problem("mlp"), rule)


def other_feedback(self, name, value):
    """For ``Call.mirrored``: (x, its shape, rule, B) with another B."""
    if name == "mirrored" and value is not None:
        value = (*value[:-1], 2 * value[-1])
    object.__setattr__(self, name, value)


feed = edges._feed
# The short ways that nearly every call takes: exchanged weights (local rules); ports, or e B made by the join itself
# where it is small (direct rules).
MECHANISM = {
    "W is kept as it is": ("frsf", exchange.Exchange, "pack", lambda self, kept: kept),
    "W comes back as it is": (
        "frsf",
        exchange.Exchange,
        "unpack",
        lambda self, packed: packed[0].t() if self.turned else packed[0],
    ),
    "B is turned round": ("fa", local_weights.LocalWeight, "combine", lambda self, W, R: R.flip(0)),
    "the port hands back twice e B": ("dfa", edges, "_feed", lambda ctx: 2 * feed(ctx)),
    "the port hands back nothing": ("dfa", edges, "_feed", lambda ctx: None),
    "the join hands back another B": ("dfa", passes.Call, "__setattr__", other_feedback),
    "the join hands back e as it is": ("sdfa", passes.OutputError, "signal", lambda self, rule: self.error),
    "the port hands back e as it is": ("sdfa", passes.OutputError, "signal", lambda self, rule: self.error),
}


@pytest.mark.parametrize("how", MECHANISM)
def test_breaking_the_mechanism_is_found(monkeypatch, how):
    rule, owner, name, wrong = MECHANISM[how]
    if "the port" in how:
        monkeypatch.setattr(handback, "_HELD", 0)
    check_rule(Problem("mlp"), rule)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_rule(Problem("mlp"), rule)


@pytest.mark.parametrize("rule", [rule for rule in ALIVE if rule in RULES])
@pytest.mark.parametrize("held", [0, 2**19], ids=["ports", "held"])
def test_both_short_ways_are_right(monkeypatch, held, rule):
    monkeypatch.setattr(handback, "_HELD", held)
    check_rule(Problem("mlp"), rule)


@pytest.mark.parametrize("rule", ["dfa", "sdfa"])
def test_the_short_way_is_taken_again_after_another_rule(rule):
    problem = Problem("mlp")
    rewire.convert(problem.model, rule, scale=0.3)
    state = problem.model[2]._rewire
    check_pass(problem, rule), check_pass(problem, rule)
    assert state.mirror is not None
    with rewire.use_rule(problem.model, "bp"):
        assert state.mirror is None
        check_pass(problem, "bp")
    check_pass(problem, rule)
    assert state.mirror is not None
    check_pass(problem, rule)
