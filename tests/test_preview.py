"""What feedback costs is known before any of it is made."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 4 * 4, 5)

    def forward(self, image, scale=1.0):
        h = self.drop(F.relu(self.conv2(F.relu(self.norm(self.conv(image))))))
        return self.fc(h.flatten(1)) * scale


X = torch.randn(3, 1, 11, 11)


def shapes(summary):
    return {row.name: row.feedback_shape for row in summary.rows if row.converted}


def test_shapes_and_bytes_are_those_of_the_first_pass():
    for structure in ("dense", "channel"):
        model = rewire.convert(Net(), "dfa", feedback=structure)
        before = rewire.summary(model, X)
        assert shapes(rewire.summary(model))["conv2"] is None
        model(X).square().sum().backward()
        after = rewire.summary(model)
        assert shapes(before) == shapes(after)
        assert (
            before.feedback_bytes == after.feedback_bytes == sum(B.numel() * 4 for B in rewire.feedback(model).values())
        )
    assert shapes(before) == {"conv": None, "conv2": (5, 4), "fc": (5, 96)}


def test_inputs_may_be_a_tuple_or_a_dict():
    model = rewire.convert(Net(), "dfa")
    one, two, three = (rewire.summary(model, inputs) for inputs in (X, (X, 2.0), {"image": X, "scale": 2.0}))
    assert shapes(one) == shapes(two) == shapes(three)


def test_a_preview_leaves_no_trace():
    model = rewire.convert(Net(), "dfa")
    model.drop.eval()
    twin = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    rewire.summary(model, X)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert rewire.output_error(model) is None
    for each in (model, twin):
        for _ in range(2):
            each(X).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_failing_forward_leaves_no_trace_either():
    model = rewire.convert(Net(), "dfa")
    try:
        rewire.summary(model, torch.randn(3, 2, 11, 11))
    except RuntimeError:
        pass
    else:
        raise AssertionError("two channels do not fit")
    assert model.training
    assert [row.rule for row in rewire.summary(model).rows if row.converted] == ["dfa"] * 3


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf", "kp", "dfa"])
def test_after_passes_too(rule):
    """Layers are on their short ways then."""
    model = rewire.convert(Net(), rule)
    for _ in range(3):
        model(X).square().sum().backward()
    twin = copy.deepcopy(model)
    assert str(rewire.summary(model, X)) == str(rewire.summary(twin))
    model.zero_grad(), twin.zero_grad()
    for each in (model, twin):
        torch.manual_seed(1)
        each(X).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_layers_that_run_in_training_only():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.side, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            h = F.relu(self.stem(x))
            return (self.head(h), self.side(h)) if self.training else self.head(h)

    model = rewire.convert(Side(), "dfa")
    notes = {row.name: row.note for row in rewire.summary(model, torch.randn(2, 4)).rows}
    assert "nothing to hand back to" in notes["stem"]
    assert "does not run in eval mode" in notes["side"]
    head, side = model(torch.randn(2, 4))
    (head.sum() + side.square().sum()).backward()
    model(torch.randn(2, 4))
    notes = {row.name: row.note for row in rewire.summary(model, torch.randn(2, 4)).rows}
    assert "eval mode" not in notes["side"]


RULES = ["fitted", "fitted(context=4)", "fitted(sketch=3)", "fitted(by='jvp')", "dkp", "dkp(normalise=False)", "grape"]


@pytest.mark.parametrize("structure", ["dense", "channel", "lowrank"])
@pytest.mark.parametrize("rule", RULES)
def test_what_learning_keeps_is_counted(rule, structure):
    """Before it is made as after: all buffers of layers but counts, and what structures have in common."""
    model = rewire.convert(Net(), rule, feedback=structure)
    before = rewire.summary(model, X)
    for _ in range(7):
        model.zero_grad()
        model(X).square().sum().backward()
    model(X)
    after = rewire.summary(model)
    kept = {name: t for name, t in model.state_dict().items() if "rewire_" in name}
    counts = ("rewire_passes", "rewire_origin")
    size = sum(t.numel() * t.element_size() for name, t in kept.items() if not name.endswith(counts))
    assert before.feedback_bytes == after.feedback_bytes == size + after.common_bytes
    assert shapes(before) == shapes(after)


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf"])
def test_the_first_layer_under_a_local_rule_has_no_feedback(rule):
    model = rewire.convert(Net(), rule)
    assert "nothing to hand back" not in str(rewire.summary(model))
    before = rewire.summary(model, X)
    for _ in range(2):
        model(X).square().sum().backward()
    for found in (before, rewire.summary(model), rewire.summary(copy.deepcopy(model)), rewire.summary(model, X)):
        notes = {row.name: row.note for row in found.rows}
        assert "nothing to hand back to" in notes["conv"] and "nothing" not in notes["conv2"] + notes["fc"]
        assert shapes(found) == {"conv": None, "conv2": (6, 4, 3, 3), "fc": (5, 96)}
        assert found.feedback_bytes == (4 * (6 * 36 + 5 * 96) if rule == "fa" else 0)
    wanted = X.clone().requires_grad_()
    model(wanted).square().sum().backward()
    assert shapes(rewire.summary(model))["conv"] == (4, 1, 3, 3)
