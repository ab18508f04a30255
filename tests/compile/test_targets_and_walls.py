"""What a graph does not show when it is made: targets given in the forward, and walls at what is fed back."""

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import rewire
from rewire.errors import PassError
from rewire.rules.direct import DRTP

from .nets import Mixed, chain, chain_by_hand, images, one_graph, pair, same, step, vectors

# -- drtp -------------------------------------------------------------------------------------------------


def targets_step(model, n, given=None, loss=F.cross_entropy):
    x, y = vectors(n)
    model.zero_grad()
    with contextlib.nullcontext() if given is None else rewire.targets(given):
        out = model(x)
    loss(out, y).backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_targets_are_those_of_each_call(backend):
    model, _ = pair(lambda: chain(3), vectors, "drtp")
    fast = one_graph(model, backend=backend)
    y, z = vectors(6)[1], vectors(4)[1]
    others, none = (y + 1) % 3, torch.full((4,), -100)
    soft = torch.randn(6, 3).softmax(1)
    for n, given, hot in (
        (6, None, F.one_hot(y, 3).float()),
        (6, others, F.one_hot(others, 3).float()),
        (4, None, F.one_hot(z, 3).float()),
        (6, soft, soft),
        (4, none, torch.zeros(4, 3)),
        (6, None, F.one_hot(y, 3).float()),
    ):
        targets_step(fast, n, given)
        chain_by_hand(model, vectors(n)[0], hot)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_what_does_not_fit_is_said_when_the_graph_runs():
    model, _ = pair(lambda: chain(3), vectors, "drtp")
    fast = one_graph(model)
    targets_step(fast, 6)
    with pytest.raises(PassError, match=r"drtp: targets of shape \(5,\)"):
        targets_step(fast, 6, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(PassError, match="target 3 is out of range for 3 outputs"):
        targets_step(fast, 6, torch.full((6,), 3))
    with pytest.raises(PassError, match="this loss does not show them"):
        targets_step(fast, 6, loss=lambda out, y: out.square().sum())


class Twice(DRTP):
    def signal(self, error, targets, axis):
        return 2 * super().signal(error, targets, axis)


def test_a_rule_derived_from_it_has_its_own_signal():
    model, _ = pair(lambda: chain(3), vectors, Twice())
    with pytest.warns(rewire.RewireWarning, match="cannot be part of a compiled graph"):
        targets_step(torch.compile(model, backend="aot_eager"), 6)
    chain_by_hand(model, vectors(6)[0], 2 * F.one_hot(vectors(6)[1], 3).float())


# -- skip="cut" -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x + torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return self.head(x)


class Below(nn.Module):
    """A part that is not compiled, below one that is."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), Residual()

    def forward(self, x):
        return self.body(torch.tanh(self.stem(x)))


class Queries(nn.Module):
    """A residual network whose input is a parameter."""

    def __init__(self):
        super().__init__()
        self.queries, self.body = nn.Parameter(torch.randn(6, 4)), Residual()

    def forward(self, x):
        return self.body(self.queries) + 0 * x.sum()


@pytest.mark.parametrize("net, data", [(Mixed, images), (Residual, vectors)])
def test_walls(net, data):
    model, twin = pair(net, data, "dfa", skip="cut")
    kept, _ = pair(net, data, "dfa")
    fast = one_graph(model)
    for n in (6, 4, 3):
        step(fast, data(n)), step(twin, data(n))
        same(twin, model)
    step(kept, data(3))
    with pytest.raises(AssertionError):
        same(kept, model)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


@pytest.mark.parametrize("net, part", [(Below, "body"), (Queries, "")])
def test_at_the_input_of_a_graph_walls_are_where_they_are_in_eager_mode(net, part):
    layers = {"stem": "bp"} if net is Below else {}
    model, twin = pair(net, vectors, "dfa", skip="cut", layers=layers)
    model.get_submodule(part).compile(fullgraph=True, backend="aot_eager")
    step(model, vectors(6)), step(twin, vectors(6))
    same(twin, model)
