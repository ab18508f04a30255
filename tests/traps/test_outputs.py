"""Which layer is the output, what happens if it is named wrongly, and how the errors of several combine."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, labels, one_pass, randn

N = 6
X, Y = randn(N, 5), labels(N)


class Heads(nn.Module):
    """One body; a head of its own for each of two tasks, one of them deeper. The loss sees ``near`` as well."""

    def __init__(self):
        super().__init__()
        self.two = nn.Linear(6, 3)  # registered before the layers below it
        self.first, self.body = nn.Linear(5, 6), nn.Linear(6, 6)
        self.one = nn.Linear(6, 4)
        self.neck = nn.Linear(6, 6)

    def forward(self, x):
        h = torch.tanh(self.body(torch.tanh(self.first(x))))
        return self.one(h), self.two(torch.tanh(self.neck(h)))


def loss(out):
    return F.cross_entropy(out[0], Y) + 0.5 * F.cross_entropy(out[1], Y % 3)


def by_hand(model, B):
    """Gradients under dfa: each layer hands back the sum of B e over the outputs it feeds."""
    p = {name: t.detach().clone() for name, t in model.named_parameters()}

    def linear(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    h1 = torch.tanh(linear("first", X))
    h2 = torch.tanh(linear("body", h1))
    h3 = torch.tanh(linear("neck", h2))
    e1 = (F.softmax(linear("one", h2), 1) - F.one_hot(Y, 4)) / N
    e2 = 0.5 * (F.softmax(linear("two", h3), 1) - F.one_hot(Y % 3, 3)) / N
    # what comes to h2: both layers that take it, `one` and `neck`, hand back their feedback
    d3 = (e2 @ B["two@two"]) * (1 - h3**2)
    d2 = (e1 @ B["one@one"] + e2 @ B["neck@two"]) * (1 - h2**2)
    d1 = (e1 @ B["body@one"] + e2 @ B["body@two"]) * (1 - h1**2)
    deltas = {"first": (d1, X), "body": (d2, h1), "neck": (d3, h2), "one": (e1, h2), "two": (e2, h3)}
    grads = {f"{name}.weight": d.T @ h for name, (d, h) in deltas.items()}
    return grads | {f"{name}.bias": d.sum(0) for name, (d, _) in deltas.items()}


@pytest.mark.parametrize("asked", [None, ["one", "two"], ["two", "one"]])
def test_feedback_of_several_outputs_adds_up(asked):
    model = rewire.convert(build(Heads), "dfa", scale=0.3, output=asked)
    for _ in range(3):
        got = one_pass(model, X, loss)
        B = {}
        for name, tensor in rewire.feedback(model).items():
            # a layer that feeds one output alone has one feedback, named after the layer
            B[name if "@" in name else f"{name}@{'one' if name == 'one' else 'two'}"] = tensor
        for name, wanted in by_hand(model, B).items():
            assert torch.allclose(got[name], wanted, rtol=0, atol=1e-12), name
    assert not torch.equal(B["body@one"][:3], B["body@two"])  # each output has a feedback of its own
    assert set(rewire.output_error(model)) == {"one", "two"}


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_one_loss_of_two(rule):
    model = rewire.convert(build(Heads), rule, scale=0.3)
    for _ in range(2):
        one_pass(model, X, loss)
    got = one_pass(model, X, lambda out: F.cross_entropy(out[0], Y))
    assert got["neck.weight"] is None and got["two.weight"] is None
    both = one_pass(model, X, loss)
    other = one_pass(model, X, lambda out: 0.5 * F.cross_entropy(out[1], Y % 3))
    for name, gradient in both.items():  # all is linear in the errors
        parts = [g[name] for g in (got, other) if g[name] is not None]
        assert torch.allclose(gradient, sum(parts), atol=1e-12), name


# -- named wrongly --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["body", "neck", "one", ["one", "neck"]])
def test_a_wrong_output_is_refused_with_what_to_write(asked):
    model = rewire.convert(build(Heads), "dfa", output=asked)
    with pytest.raises(rewire.PassError) as caught:
        one_pass(model, X, loss)
    message = str(caught.value)
    assert "the loss sees the output of layer" in message and "output=" in message
    # What is proposed is right at once.
    assert "Write output=['two', 'one'], every layer" in message
    model = rewire.convert(build(Heads), "dfa", output=["one", "two"])
    for _ in range(2):
        one_pass(model, X, loss)
    assert rewire.verify(model, X, loss).ok


def test_a_name_that_no_layer_has_is_refused_at_once():
    with pytest.raises(rewire.ConversionError, match="did you mean 'body'"):
        rewire.convert(build(Heads), "dfa", output="bodi")


def test_an_output_kept_on_backprop():
    model = rewire.convert(build(Heads), "dfa", layers={"one": "bp", "two": "bp"})
    for _ in range(2):
        one_pass(model, X, loss)
    roles = {row.name: row.role for row in rewire.summary(model).rows}
    assert {name for name, role in roles.items() if role == "output"} == {"one", "two"}
    result = rewire.verify(model, X, loss)
    assert result.ok, str(result)


def test_verify_of_a_side_loss_that_came_first():
    """The first pass has a loss on a hidden layer alone; later passes show it to be hidden."""

    class Side(Heads):
        def forward(self, x):
            h = self.body(torch.tanh(self.first(x)))
            return h, self.one(torch.tanh(h))

    model = rewire.convert(build(Side), "dfa")
    one_pass(model, X, lambda out: out[0].square().mean())
    for _ in range(3):
        one_pass(model, X, lambda out: F.cross_entropy(out[1], Y))
    result = rewire.verify(model, X, lambda out: F.cross_entropy(out[1], Y))
    assert result.ok, str(result)
    both = copy.deepcopy(model)
    result = rewire.verify(both, X, lambda out: F.cross_entropy(out[1], Y) + out[0].square().mean())
    assert result.ok, str(result)


class Pair(nn.Module):
    """Several outputs of one unit: as wide as each other or not, in a dict, or not made of what came in."""

    def __init__(self, widths=(4, 4), detached=False):
        super().__init__()
        self.one, self.two = (nn.Linear(6, width) for width in widths)
        self.detached = detached

    def forward(self, h):
        two = self.two(h)
        return {"one": self.one(h), "two": two.detach() if self.detached else two, "mean": h.detach().mean(0)}


class Unit(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 6), Pair(**options)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("widths", [(4, 4), (4, 1), (1, 4)])
def test_errors_of_several_outputs_of_one_unit_add_up(widths):
    found = {}
    for weights in ((1, 0), (0, 1), (1, 1)):
        model = rewire.convert(build(Unit, widths=widths), "dfa", blocks=["head"], scale=0.3, seed=3)

        def total(out, weights=weights):
            return weights[0] * out["one"].square().sum() + weights[1] * out["two"].square().mean()

        for _ in range(2):
            grads = one_pass(model, X, total)
        found[weights] = grads["first.weight"]
        assert rewire.verify(model, X, total).ok
    assert found[1, 0].any() and found[0, 1].any()
    torch.testing.assert_close(found[1, 1], found[1, 0] + found[0, 1])


def test_outputs_of_a_unit_that_need_no_gradient_go_on_needing_none():
    """A loss on what is detached says nothing to anybody below."""
    found = []
    for weight in (0, 1):
        model = rewire.convert(build(Unit, detached=True), "dfa", blocks=["head"], scale=0.3)
        scale = torch.ones(4, dtype=X.dtype, requires_grad=True)
        for _ in range(3):
            model.zero_grad()
            out = model(X)
            assert not out["two"].requires_grad and not out["mean"].requires_grad
            (out["one"].square().sum() + weight * (scale * out["two"]).square().sum()).backward()
        found.append(model.first.weight.grad)
    assert torch.equal(*found) and found[0].any()
