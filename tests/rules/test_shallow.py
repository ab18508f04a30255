"""`shallow` is silent: zeros from the first pass on, and nothing made, measured or kept for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import rewire
from rewire.stacked import feedback_of
from rewire.swap import states_of

from ..plain import mlp, randn

X, Y = randn(12, 5, seed=1), torch.arange(12) % 4


@pytest.mark.parametrize("output", [None, "4"])
def test_zeros_from_the_first_pass_on(output):
    """No pass is handed back exactly to measure a scale that nothing needs."""
    model = rewire.convert(mlp(), "shallow", output=output)
    for step in range(2):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        for name in ("0", "2"):
            weight = model.get_submodule(name).weight
            assert weight.grad is None or not weight.grad.any(), (step, name)
        assert model[4].weight.grad.any()


@pytest.mark.parametrize("head", ["shallow", "dfa"])
def test_below_it_direct_rules_are_told_why_there_is_nothing_to_measure(head):
    """And where there is none of it, nothing is said of it."""
    model = mlp()
    if head == "dfa":
        torch.nn.init.zeros_(model[4].weight)
    rewire.convert(model, "dfa", layers={"4": head})
    with pytest.warns(rewire.RewireWarning, match="nothing but zeros came down") as said:
        for _ in range(2):
            F.cross_entropy(model(X), Y).backward()
    (text,) = (str(each.message) for each in said if "nothing but zeros" in str(each.message))
    assert ("below layers under shallow, which hand back zeros ('4')" in text) == (head == "shallow")


def test_no_feedback_is_made_or_measured():
    model = rewire.convert(mlp(), "shallow")
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
    assert rewire.feedback(model) == {} and rewire.scales(model) == {}
    for module in model.modules():
        for state in states_of(module):
            assert not state.made and not state.shapes and state.sums is None
    assert feedback_of(model) == {}
    rows = {row.name: row for row in rewire.summary(model).rows}
    for name in ("2", "4"):
        assert "hands back zeros" in rows[name].note and rows[name].feedback_bytes == 0
        assert rows[name].feedback_shape is None
    assert rewire.summary(rewire.convert(mlp(), "shallow"), X).feedback_bytes == 0
