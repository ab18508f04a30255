"""Rules that change by the number of the pass, against plain loops; counts that are saved; text."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import rewire
from rewire.rules import resolve
from rewire.rules.schedule import Anchored, Switch
from rewire.swap import states_of
from tests.rules.checks import used_feedback

from .test_direct import LR, NumpyMLP, batches, check_weights, drawn, mlp, torch_step


def rules_now(model):
    return [repr(state.rule) for module in model.modules() for state in states_of(module)]


@pytest.mark.parametrize("first, then", [("bp", "dfa"), ("dfa", "bp"), ("fa", "dfa"), ("dfa", "fa")])
def test_switch_against_numpy(first, then):
    model = mlp()
    ours = NumpyMLP(model)
    x0 = next(batches(1))[0]
    direct = drawn(mlp(), x0, scale=0.3)
    twin = mlp()
    rewire.convert(twin, "fa", scale=0.3)
    local = used_feedback(twin)
    rewire.convert(model, Switch(first=first, then=then, at=3), scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for passes, (x, labels) in enumerate(batches(6)):
        xs, y = ours.forward(x.numpy())
        e = ours.error(y, labels.numpy())
        torch_step(model, optimizer, x, labels)
        rule = first if passes < 3 else then
        if rule == "fa":  # backprop through other weights
            delta, W = e, {1: local["2"], 2: local["4"]}
            grads = {}
            for at in (2, 1, 0):
                grads[at] = delta.T @ xs[at], delta.sum(0)
                if at:
                    delta = (delta @ W[at]) * (1 - xs[at] ** 2)
            for at, (gW, gb) in grads.items():
                ours.W[at], ours.b[at] = ours.W[at] - LR * gW, ours.b[at] - LR * gb
        else:
            ours.step(xs, e, None if rule == "bp" else {1: direct["2"], 2: direct["4"]})
        check_weights(model, ours)


def test_anchored_against_numpy():
    model = mlp()
    ours = NumpyMLP(model)
    x0 = next(batches(1))[0]
    used = drawn(mlp(), x0, scale=0.3)
    rewire.convert(model, "anchored(rule='dfa', every=3)", scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for passes, (x, labels) in enumerate(batches(8)):
        xs, y = ours.forward(x.numpy())
        torch_step(model, optimizer, x, labels)
        ours.step(xs, ours.error(y, labels.numpy()), None if passes % 3 == 0 else {1: used["2"], 2: used["4"]})
        check_weights(model, ours)


def test_a_scale_is_measured_when_the_turn_comes():
    model = mlp()
    rewire.convert(model, "switch(first=bp, then=dfa, at=2)")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for passes, (x, labels) in enumerate(batches(4)):
        torch_step(model, optimizer, x, labels)
        assert bool(rewire.scales(model)) == (passes >= 2)


def test_a_layer_of_its_own_schedule():
    model = mlp()
    rewire.convert(model, "dfa", layers={"2": "switch(first=fa, then=dfa, at=2)"}, scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen = []
    for x, labels in batches(4):
        torch_step(model, optimizer, x, labels)
        rewire.scales(model)  # what the pass has shown is taken in
        seen.append(rules_now(model))
    assert seen == [["dfa", "fa", "dfa"], *[["dfa", "dfa", "dfa"]] * 3]


def test_learned_feedback_takes_its_turn():
    """fitted, fixed afterwards by dfa (with feedback of its own), and again from a checkpoint."""
    model = mlp()
    rewire.convert(model, "switch(first=dfa, then=dkp, at=2)", scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen = []
    for x, labels in batches(6):
        torch_step(model, optimizer, x, labels)
        seen.append(used_feedback(model)["4"])
    np.testing.assert_array_equal(seen[0], seen[1])  # fixed; passes are taken in when one asks, the switch with them
    assert all(np.abs(a - b).max() > 1e-6 for a, b in itertools.pairwise(seen[2:]))
    assert any(name.endswith("rewire_B") for name in model.state_dict())
    with rewire.use_rule(model, "dfa"):
        x, labels = next(batches(1))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        np.testing.assert_array_equal(used_feedback(model)["4"], seen[0])
    np.testing.assert_array_equal(used_feedback(model)["4"], seen[-1])


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_the_count_goes_on(how):
    model = mlp()
    rule = "switch(first=bp, then=dfa, at=5)"
    rewire.convert(model, rule, scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    data = list(batches(8))
    for x, labels in data[:3]:
        torch_step(model, optimizer, x, labels)
    if how == "state_dict":
        again = mlp(seed=4)
        rewire.convert(again, rule, scale=0.3)
        again.load_state_dict(model.state_dict())
    else:
        again = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    others = torch.optim.SGD(again.parameters(), lr=LR)
    for x, labels in data[3:]:
        torch_step(model, optimizer, x, labels)
        torch_step(again, others, x, labels)
        for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        rewire.scales(model), rewire.scales(again)
        assert rules_now(model) == rules_now(again)
    assert rules_now(again) == ["dfa"] * 3


def test_loading_past_the_switch():
    model = mlp()
    rewire.convert(model, "switch(first=bp, then=dfa, at=2)", scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x, labels in batches(4):
        torch_step(model, optimizer, x, labels)
    again = rewire.convert(mlp(), "switch(first=bp, then=dfa, at=2)", scale=0.3)
    again.load_state_dict(model.state_dict())
    assert rules_now(again) == ["dfa"] * 3
    again.load_state_dict(mlp().state_dict())  # a plain checkpoint has no count, and changes none
    assert rules_now(again) == ["dfa"] * 3
    rewire.restore(again)
    assert again.state_dict().keys() == mlp().state_dict().keys()


def test_passes_under_another_rule_do_not_count():
    model = rewire.convert(mlp(), "switch(first=bp, then=dfa, at=2)", scale=0.3)
    for x, labels in batches(5):
        with rewire.use_rule(model, "fa"):
            nn.functional.cross_entropy(model(x), labels).backward()
    with torch.no_grad():
        model(x)
    assert rules_now(model) == ["bp"] * 3
    with rewire.use_rule(model, "anchored(rule=fa, every=2)"):
        assert rules_now(model) == ["bp"] * 3
        nn.functional.cross_entropy(model(x), labels).backward()
        rewire.scales(model)
        assert rules_now(model) == ["fa"] * 3


def test_verify_looks_at_one_rule():
    model = rewire.convert(mlp(), "anchored(rule=dfa, every=2)", scale=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x, labels in batches(3):
        torch_step(model, optimizer, x, labels)
    found = rewire.verify(model, x, lambda out: nn.functional.cross_entropy(out, labels))
    assert found.ok, str(found)


def test_a_model_at_rest_counts_no_passes():
    """What is looked up once for all layers is looked up again."""
    model = rewire.convert(mlp(), "switch(first=bp, then=dfa, at=2)", scale=0.3)
    wiring = states_of(model[0])[0].wiring
    assert wiring.counts
    wiring.rest()
    assert not wiring.counts


def test_as_text():
    for text in (
        "switch(first='bp', then='dfa', at=100)",
        "switch(first='bp', then='fitted(every=50)', at=3)",
        "anchored(rule='dfa(feedback=LowRank(rank=8))', every=7)",
        "anchored(rule='sdfa', by='fa')",
    ):
        assert repr(resolve(text)) == text
    assert repr(resolve("switch(first=bp, then=fitted(every=50), at=3)")) == (
        "switch(first='bp', then='fitted(every=50)', at=3)"
    )
    assert repr(Anchored(rule=resolve("dfa"), every=7)) == "anchored(rule='dfa', every=7)"


@pytest.mark.parametrize(
    "text, says",
    [
        ("switch(first=bp, then=dfaa, at=3)", "dfaa"),
        ("switch(first='bp', then='dfaa', at=3)", "did you mean 'dfa'"),
        ("switch(first=bp, then=dfa)", "needs at"),
        ("switch(first=bp, then=dfa, at=0)", "at is a whole number"),
        ("switch(first=bp, then=dfa, at=2.5)", "at is a whole number"),
        ("anchored(rule=dfa, every=0)", "every is a whole number"),
        ("anchored(rule='anchored(rule=dfa)')", "not between schedules"),
        ("anchored(rule=dfa, evry=2)", "did you mean 'every'"),
    ],
)
def test_schedules_that_are_refused(text, says):
    model = mlp()
    with pytest.raises(rewire.ConversionError, match=says):
        rewire.convert(model, text)
    assert type(model[0]) is nn.Linear


def test_a_block_takes_no_local_rule_on_a_schedule():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    with pytest.raises(rewire.ConversionError, match="one block"):
        rewire.convert(model, "switch(first=dfa, then=fa, at=2)", blocks=["1"])
