"""Fixed feedback that somebody changes in place is what is used from then on: in copies, other dtypes and tools too."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .plain import randn

X, LABELS = randn(6, 8), torch.tensor([0, 3, 9, 2, 0, 5])


def loss_of(y):
    return F.cross_entropy(y, LABELS)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def step(model):
    """The norm of the first layer's gradient: zero if zeros are handed back."""
    model.zero_grad()
    loss_of(model(X.to(model[0].weight.dtype))).backward()
    return float(model[0].weight.grad.norm())


def zero(model):
    for B in rewire.feedback(model).values():
        B.zero_()
    return model


def converted(rule, scale="auto"):
    model = rewire.convert(mlp(), rule, scale=scale)
    assert step(model) > 0
    return model


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


RULES = pytest.mark.parametrize("rule", ["dfa", "fa", "sdfa"])
WAYS = {
    "as it is": lambda model: model,
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "saved whole": saved,
    "copy of a file": lambda model: copy.deepcopy(saved(model)),
    "file of a copy": lambda model: saved(copy.deepcopy(model)),
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "float": lambda model: model.float(),
    "float and back": lambda model: step(model.float()) or model.double(),
    "copy as float": lambda model: copy.deepcopy(model).float(),
}


@RULES
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("scale", ["auto", 0.1])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_was_set_is_used(rule, passes, scale, way):
    model = converted(rule, scale)
    for _ in range(passes - 1):
        step(model)
    model = way(zero(model))
    for _ in range(3):
        assert step(model) == 0


@RULES
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: rewire.load_config(mlp(), rewire.config(m))])
def test_set_in_a_copy(rule, way):
    model = converted(rule)
    twin = zero(way(model))
    assert step(twin) == 0
    assert step(model) > 0


def test_other_rules_for_a_while():
    model = zero(converted("fa"))
    for rule in ("frsf", "dfa", "usf"):
        with rewire.use_rule(model, rule):
            assert step(model) > 0
        assert step(model) == 0


def test_another_seed_is_other_feedback():
    model = rewire.convert(zero(converted("dfa")), "dfa", seed=3)
    step(model)
    assert step(model) > 0


def test_no_seed_gives_it_again():
    model = zero(converted("dfa"))
    for each in (model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        with pytest.raises(rewire.ConversionError, match="changed in place"):
            rewire.config(each)


@RULES
def test_tools_look_at_what_was_set(rule):
    model = converted(rule)
    for B in rewire.feedback(model).values():
        B.copy_(randn(*B.shape, seed=7))
    norm = step(model)
    assert rewire.verify(model, X, loss_of).ok
    found = rewire.alignment(model, X, loss_of)
    assert found.layers[0].norm == pytest.approx(norm)
    if rule == "fa":
        ratio = rewire.feedback(model)["2"].norm() / model[2].weight.norm()
        assert found.layers[1].feedback_ratio == pytest.approx(float(ratio))
    assert step(model) == norm


@RULES
def test_verify_says_that_zeros_are_handed_back(rule):
    layer = rewire.verify(zero(converted(rule)), X, loss_of).layers[1]
    assert "nothing was handed back" in layer.note or "zeros" in layer.note


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_alignment_of_what_was_set_is_that_of_what_was_drawn(rule):
    """To the bit; but what it would be by chance is drawn from the seed."""
    drawn = mlp()
    other = copy.deepcopy(drawn)
    rewire.convert(drawn, rule, scale=0.1, seed=3)
    rewire.convert(other, rule, scale=0.1)
    for model in (drawn, other):
        for _ in range(2):
            step(model)
    for name, B in rewire.feedback(drawn).items():
        rewire.feedback(other)[name].copy_(B)
    assert step(other) == step(drawn)
    one, two = (rewire.alignment(model, X, loss_of, null=2).record() for model in (drawn, other))
    for record in (one, two):
        for layer in record["layers"].values():
            del layer["null_angle"], layer["null_spread"]
    assert one == two


def linear():
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 10)).double()


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_the_weights_themselves_give_backprop(rule):
    plain = linear()
    loss_of(plain(X)).backward()
    model = rewire.convert(copy.deepcopy(plain), rule)
    step(model)
    W = [layer.weight.detach() for layer in model]
    wanted = {"dfa": {"1": W[2] @ W[1], "2": W[2]}, "fa": {"1": W[1], "2": W[2]}}[rule]
    B = rewire.feedback(model)
    for name, value in wanted.items():
        B[name].copy_(value)
    for each in (model, copy.deepcopy(model)):
        step(each)
        for ours, parameter in zip(each.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, parameter.grad)
    found = rewire.verify(model, X, loss_of)
    assert found.ok
    assert any("comes to the same" in layer.note for layer in found.layers)
    assert rewire.alignment(model, X, loss_of).gamma == pytest.approx(1)
