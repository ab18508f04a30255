"""A layer whose weight another module uses directly is under its rule all the same."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire


class Functional(nn.Module):
    """Uses one child's weight as ``F.linear``, another's as ``F.conv1d``, and calls a third."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.used = nn.Linear(6, 6)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(F.linear(h, self.used.weight, bias=self.used.bias * 2))
        h = F.conv1d(h.unsqueeze(1), self.conv.weight, self.conv.bias, padding=1)
        return self.last(torch.tanh(h).flatten(1))


X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 3])


def make(**options):
    torch.manual_seed(0)
    return rewire.convert(Functional().double(), **options)


def one_pass(model):
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def by_hand(model, rule):
    """The same network, with what each layer hands back written out."""
    B = rewire.feedback(model)
    m = copy.deepcopy(dict(model.named_parameters()))
    m = {name: p.detach().requires_grad_() for name, p in m.items()}
    a1 = X @ m["first.weight"].T + m["first.bias"]
    h1 = torch.tanh(a1.detach()).requires_grad_()
    a2 = F.linear(h1.detach(), m["used.weight"], m["used.bias"] * 2)
    h2 = torch.tanh(a2.detach()).unsqueeze(1)
    a3 = F.conv1d(h2, m["conv.weight"], m["conv.bias"], padding=1)
    h3 = torch.tanh(a3.detach()).flatten(1)
    y = F.linear(h3, m["last.weight"], m["last.bias"])
    leaf = y.detach().requires_grad_()
    (e,) = torch.autograd.grad(F.cross_entropy(leaf, Y), leaf)
    if rule == "dfa":
        fed = [e @ B[name].flatten(1) for name in ("used", "conv", "last")]
        d3 = fed[2].reshape(a3.shape) * (1 - torch.tanh(a3.detach()) ** 2)
        d2 = fed[1].reshape(a2.shape) * (1 - torch.tanh(a2.detach()) ** 2)
        d1 = fed[0] * (1 - h1.detach() ** 2)
    else:
        d3 = (e @ B["last"]).reshape(a3.shape) * (1 - torch.tanh(a3.detach()) ** 2)
        back = F.conv_transpose1d(d3, B["conv"], padding=1).squeeze(1)
        d2 = back * (1 - torch.tanh(a2.detach()) ** 2)
        d1 = (d2 @ B["used"]) * (1 - h1.detach() ** 2)
    for out, delta in ((y, e), (a3, d3), (a2, d2), (a1, d1)):
        out.backward(delta)
    return {name: p.grad for name, p in m.items()}


@pytest.mark.parametrize("rule", ["dfa", "fa", "usf", "frsf"])
def test_values(rule):
    model = make(rule=rule, scale=0.3)
    for _ in range(3):  # the first pass too
        got = one_pass(model)
        for name, wanted in by_hand(model, rule).items():
            assert torch.allclose(got[name], wanted, rtol=0, atol=1e-12), name


def test_auto_scale_measures_them_too():
    model = make(rule="dfa")
    plain = {name: p.grad for name, p in _backprop(model).named_parameters()}
    first = one_pass(model)
    assert all(torch.allclose(first[name], plain[name], atol=1e-12) for name in plain)
    assert set(rewire.scales(model)) == {"used", "conv", "last"}
    got = one_pass(model)
    for name, wanted in by_hand(model, "dfa").items():
        assert torch.allclose(got[name], wanted, rtol=0, atol=1e-12), name


def _backprop(model):
    plain = rewire.restore(copy.deepcopy(model))
    one_pass(plain)
    return plain


def test_no_warning_and_a_summary_without_complaint(recwarn):
    model = make(rule="dfa")
    for _ in range(3):
        one_pass(model)
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]
    assert not any("has not run" in row.note for row in rewire.summary(model).rows)


@pytest.mark.parametrize("rule", ["dfa", "fa"])
def test_verify_says_live(rule):
    result = rewire.verify(make(rule=rule), X, lambda out: F.cross_entropy(out, Y))
    assert result.ok, str(result)
    status = {layer.name: layer.status for layer in result.layers}
    assert status == {"first": "first layer", "used": "live", "conv": "live", "last": "live"}
    assert all(layer.formula == pytest.approx(1) for layer in result.layers if layer.status == "live")


def test_only_hosts_in_use_keep_their_hooks():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)))

    model = rewire.convert(Outer().double(), "dfa")
    assert len(model._forward_hooks) == len(model.inner._forward_hooks) == 1
    for _ in range(2):
        one_pass(model)
    assert len(model._forward_hooks) == 0
    assert len(model.inner._forward_hooks) == 1
    rewire.restore(model)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_hooks_always_called
        assert not any("rewire" in name for name in module.__dict__)


def test_copies_and_pickles():
    model = make(rule="dfa", scale=0.3)
    one_pass(model)
    wanted = one_pass(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, gradient in one_pass(other).items():
            assert torch.equal(gradient, wanted[name])


def test_forward_is_the_same_and_an_exception_leaves_nothing_behind():
    plain = make(rule="bp")
    rewire.restore(plain)
    model = make(rule="fa")
    assert torch.equal(model(X), plain(X))
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    assert (
        torch.overrides._len_torch_function_stack() == 0 if hasattr(torch.overrides, "_len_torch_function_stack") else 1
    )
    got = one_pass(model)
    for name, wanted in by_hand(model, "fa").items():
        assert torch.allclose(got[name], wanted, rtol=0, atol=1e-12), name


def test_a_layer_that_never_runs_at_all_is_warned_about_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.never, self.b = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b((h.unsqueeze(1) * self.never.weight).sum(-1))  # no known operation

    model = rewire.convert(Net().double(), "fa")
    with pytest.warns(rewire.RewireWarning, match="'never'"):
        for _ in range(2):
            one_pass(model)
    result = rewire.verify(model, X, lambda out: F.cross_entropy(out, Y))
    assert not result.ok
    assert {layer.name: layer.status for layer in result.layers}["never"] == "dead"


class Spare(Functional):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(5, 5)


@pytest.mark.parametrize("way", ["replaced", "replaced, kept", "deleted"])
@pytest.mark.parametrize("passes", [0, 3])
def test_a_layer_that_was_taken_out_has_no_part_in_it(passes, way):
    """What stands in its place keeps backprop, also under ``use_rule``. Before the first pass, or where its module is
    gone, that is said once."""
    torch.manual_seed(0)
    model = rewire.convert(Spare().double(), "fa")
    for _ in range(passes):
        one_pass(model)
    kept = model.last if way == "replaced, kept" else None
    if way == "deleted":
        del model.spare
    else:
        model.last = nn.Linear(12, 4).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            one_pass(model)
    wanted = "'spare'" if way == "deleted" else "'last'"
    assert [wanted in str(w.message) for w in said] == [True] * (kept is None or not passes)
    rules = {row.name: row.rule for row in rewire.summary(model).rows}
    assert ("spare" in rules) == (way != "deleted") and rules["last"] == ("fa" if way == "deleted" else "bp")
    with rewire.use_rule(model, "bp"):
        got = one_pass(model)
    for name, wanted in one_pass(rewire.restore(copy.deepcopy(model))).items():
        assert got[name] is wanted is None or torch.allclose(got[name], wanted, rtol=0, atol=1e-12), name


def test_an_output_layer_that_was_replaced_is_named_in_the_error():
    model = make(rule="dfa")
    for _ in range(2):
        one_pass(model)
    model.last = nn.Linear(12, 4).double()
    with (
        pytest.warns(rewire.RewireWarning, match="'last'"),
        pytest.raises(rewire.PassError, match=r"'last'\. That was taken out of the model.*convert again"),
    ):
        one_pass(model)


def test_a_layer_is_still_missed_after_a_conversion_that_failed():
    model = make(rule="fa")
    with pytest.raises(rewire.ConversionError, match="nothing"):
        rewire.convert(model, "fa", layers={"nothing": "bp"})
    model.last = nn.Linear(12, 4).double()
    with pytest.warns(rewire.RewireWarning, match="taken out.*'last'"):
        one_pass(model)


def test_nothing_is_said_of_a_layer_on_backprop(recwarn):
    model = make(rule="fa", layers={"last": "bp"})
    del model.last
    model.last = nn.Linear(12, 4).double()
    for _ in range(2):
        one_pass(model)
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]


def test_converting_again_or_in_part_takes_nothing_out(recwarn):
    model = make(rule="fa")
    one_pass(model)
    rewire.convert(model.last, "usf")
    one_pass(model)
    rewire.convert(model, "dfa")
    for _ in range(2):
        one_pass(model)
    del model
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.a, self.b, self.head = (nn.Linear(5, 5) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x):
        for layer in (self.inward, self.a, self.b):
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_layer_that_runs_is_no_use_of_another_that_shares_its_weight(rule):
    model = rewire.convert(Tied(), rule)
    x = torch.randn(6, 5)
    for _ in range(3):
        model(x).square().mean().backward()
    roles = {row.name: row.role for row in rewire.summary(model).rows}
    assert roles == {"inward": "hidden", "a": "hidden", "b": "hidden", "head": "output"}
    assert rewire.verify(model, x, lambda y: y.square().mean()).ok
    assert set(rewire.feedback(model)) == ({"a", "b", "head"} if rule == "dfa" else {"inward", "a", "b", "head"})


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_all_of_a_weight_turned_has_no_number(rule):
    """``x @ w.t()`` uses all of the weight, square or not: its feedback is the layer's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.wide, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)

        def forward(self, x):
            self.h = torch.tanh(self.a(x))
            self.h.retain_grad()
            return self.head(torch.tanh(self.h @ self.wide.weight.t()))

    torch.manual_seed(0)
    model = rewire.convert(Net().double(), rule, scale=0.3)
    for _ in range(2):
        one_pass(model)
    B = rewire.feedback(model)
    assert B.keys() - {"a"} == {"wide", "head"}
    e, t = rewire.output_error(model), torch.tanh(model.h.detach() @ model.wide.weight.detach().t())
    handed = e @ B["wide"] if rule == "dfa" else ((e @ B["head"]) * (1 - t**2)) @ B["wide"]
    torch.testing.assert_close(model.h.grad, handed)


@pytest.mark.parametrize("width", [5, 6])
def test_a_weight_used_both_ways_has_a_feedback_for_each(width):
    """A tied decoder, square too: W one way and its transpose the other."""

    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used = nn.Linear(5, 6), nn.Linear(6, width)

        def forward(self, x):
            self.h = torch.tanh(self.first(x))
            self.t = torch.tanh(self.used(self.h))
            self.h.retain_grad(), self.t.retain_grad()
            return F.linear(self.t, self.used.weight.t())

    torch.manual_seed(0)
    model = rewire.convert(Auto().double(), "dfa", scale=0.3)
    for _ in range(2):
        model.zero_grad()
        y = model(X)
        y.square().sum().backward()
    B, e = rewire.feedback(model), 2 * y.detach()
    assert B["used"].shape == (6, 6) and B["used#1"].shape == (6, width)
    torch.testing.assert_close(model.h.grad, e @ B["used"])
    torch.testing.assert_close(model.t.grad, e @ B["used#1"])
    assert rewire.verify(model, X, lambda out: out.square().sum()).ok
