"""Arguments that nothing reads, and a context that nobody enters, are said."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire
from rewire.rules import DFA

X, Y = torch.randn(6, 8), torch.arange(6)


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10))


def test_arguments_of_direct_rules_where_there_are_none():
    for more, said in (
        ({"feedback": "lowrank"}, "feedback=LowRank()"),
        ({"skip": "cut"}, "skip='cut'"),
        ({"skip": "cut", "feedback": "sparse"}, "feedback=Sparse() and skip='cut'"),
    ):
        with pytest.warns(rewire.RewireWarning) as caught:
            rewire.convert(net(), "fa", layers={"4": "bp"}, **more)
        (warning,) = caught
        assert said in str(warning.message) and "(fa, bp)" in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "fa"},
        {"rule": "fa", "feedback": "dense"},
        {"rule": "fa", "feedback": rewire.structures.Dense()},
        {"rule": "fa", "layers": {"2": "dfa"}, "feedback": "lowrank", "skip": "cut"},
        {"rule": "switch(first=fa, then=dfa, at=3)", "feedback": "lowrank", "skip": "cut"},
        {"rule": "shallow", "skip": "cut"},
        {"rule": DFA(feedback="sparse"), "feedback": "lowrank"},
    ],
    ids=str,
)
def test_nothing_is_said_where_a_layer_may_be_under_one(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewire.convert(net(), **options)


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = rewire.convert(net(), "dfa", seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(rewire.RewireWarning):
            rewire.convert(model, "fa", skip="cut")
    assert rewire.config(model)["seed"] == 3


def test_another_rule_that_was_not_entered():
    model = rewire.convert(net(), "dfa", scale=0.1)
    with pytest.warns(rewire.RewireWarning, match="with rewire.use_rule\\(model, 'bp'\\)") as caught:
        rewire.use_rule(model, "bp")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rewire.use_rule(model, "bp") as entered:
            assert entered is model and "bp" in repr(rewire.summary(model).rows[0].rule)
            with rewire.use_rule(model, "fa"):
                F.cross_entropy(model(X), Y).backward()

        @rewire.use_rule(model, "bp")
        def plain(times):
            found = [row.rule for row in rewire.summary(model).rows]
            return found if times == 0 else plain(times - 1)

        assert plain(0) == plain(2) == ["bp"] * 3
    assert [row.rule for row in rewire.summary(model).rows] == ["dfa"] * 3
    with pytest.raises(ZeroDivisionError), rewire.use_rule(model, "fa"):
        1 / 0  # noqa: B018
    assert [row.rule for row in rewire.summary(model).rows] == ["dfa"] * 3
