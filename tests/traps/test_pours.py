"""Graph networks: rows that are added up by index, nodes into graphs and edges into nodes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, check, handed_back, labels, one_pass, randn

GRAPH = torch.tensor([0, 0, 1, 2, 2, 2, 2, 3])  # 8 nodes of 4 graphs: shapes alone would say two nodes each
SHUFFLED = torch.tensor([3, 0, 2, 1, 0, 2, 2, 0])
SOURCE = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 0])
TARGET = torch.tensor([1, 0, 2, 4, 5, 6, 3, 7, 5, 3, 1])
X = randn(8, 5)
Y = labels(4)


def loss(out):
    return F.cross_entropy(out, Y)


def index_add(h, graph):
    return h.new_zeros(4, h.shape[1]).index_add(0, graph, h)


def index_add_in_place(h, graph):
    return h.new_zeros(4, h.shape[1]).index_add_(0, graph, h)


def counted_from_the_back(h, graph):
    return h.new_zeros(4, h.shape[1]).index_put((graph - 4,), h, accumulate=True)


def scatter_add(h, graph):
    return h.new_zeros(4, h.shape[1]).scatter_add(-2, graph[:, None].expand_as(h), h)


def mean(h, graph):
    return h.new_zeros(4, h.shape[1]).scatter_reduce(0, graph[:, None].expand_as(h), h, "mean", include_self=False)


POOLS = [index_add, index_add_in_place, counted_from_the_back, scatter_add, mean]


class Graphs(nn.Module):
    """Messages along edges, a pool, and a layer on whole graphs."""

    def __init__(self, pool=index_add, graph=GRAPH):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.pool, self.graph = pool, graph

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = torch.tanh(self.b(h + torch.zeros_like(h).index_add(0, TARGET, h[SOURCE])))
        h = self.pool(torch.tanh(self.c(h)), self.graph)
        return self.head(torch.tanh(self.mid(h)))


class Edges(nn.Module):
    """An MLP on the edges of one graph; errors at its nodes."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.edge = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 6))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        messages = self.edge(torch.cat([h[SOURCE], h[TARGET]], 1))
        return self.head(torch.tanh(h + torch.zeros_like(h).index_add(0, TARGET, messages)))


@pytest.mark.parametrize("graph", [GRAPH, SHUFFLED], ids=["in order", "shuffled"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rule", ["fa", "dfa", "sdfa", "fitted(context=3)"])
def test_verified(rule, pool, graph):
    check(lambda: Graphs(pool, graph), X, loss, rule, outputs=["head"])


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_edges(rule):
    check(Edges, X, lambda out: F.cross_entropy(out, labels(8)), rule, outputs=["head"])


@pytest.mark.parametrize("options", [{}, {"output": "head"}], ids=["found", "asked"])
@pytest.mark.parametrize("pool", POOLS)
def test_values(pool, options):
    """From the first pass on, every node gets its own graph's error."""
    model = rewire.convert(build(lambda: Graphs(pool, SHUFFLED)), "dfa", scale=0.3, **options)
    for _ in range(3):
        seen = handed_back(model, X, loss, "c", "mid")
        e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(seen["mid"][0], e @ B["mid"])
        torch.testing.assert_close(seen["c"][0], torch.stack([e[graph] @ B["c"] for graph in SHUFFLED.tolist()]))


def test_another_batch_has_another_index():
    model = rewire.convert(build(Graphs), "dfa", scale=0.3)
    one_pass(model, X, loss)
    for nodes in (8, 11, 5):
        graph = torch.arange(nodes).flip(0) % 4
        h = randn(nodes, 7, seed=nodes).requires_grad_()
        loss(model.head(torch.tanh(model.mid(model.pool(model.c(h), graph))))).backward()
        e, B = rewire.output_error(model), rewire.feedback(model)
        torch.testing.assert_close(h.grad, e[graph] @ B["c"])


def test_the_scale_is_measured_with_the_right_rows():
    """With ``scale="auto"`` feedback of unit scale is compared with backprop's gradient, row by row."""
    model = build(lambda: Graphs(graph=SHUFFLED))
    exact = handed_back(model, X, loss, "c")["c"][0]
    rewire.convert(model, "dfa")
    one_pass(model, X, loss)
    fed = handed_back(model, X, loss, "c")["c"][0]
    torch.testing.assert_close(fed.square().mean(), exact.square().mean(), rtol=1e-6, atol=0)


def test_feedback_that_learns():
    """``fitted`` fits B to pairs of a node's exact gradient and its graph's error."""
    check(lambda: Graphs(graph=SHUFFLED), X, loss, "fitted(every=1)", outputs=["head"])


def test_no_warning_where_edges_are_followed(recwarn):
    model = rewire.convert(build(Edges), "dfa")
    for _ in range(3):
        one_pass(model, X, lambda out: F.cross_entropy(out, labels(8)))
    assert not [w for w in recwarn if issubclass(w.category, rewire.RewireWarning)]


def test_refused_where_the_index_is_not_followed():
    model = rewire.convert(build(Graphs), "dfa", skip="cut")
    one_pass(model, X, loss)
    with pytest.raises(rewire.PassError, match="added up by one"):
        rewire.backward_streamed(model, X, loss)


class Shuffled(nn.Module):
    """As many rows below as above, and every row goes to another one."""

    def __init__(self, put):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.put = put

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(torch.tanh(self.put(torch.zeros_like(h), torch.tensor([2, 2, 0, 1, 7, 3, 5, 4]), h)))


PUTS = {
    "index_add": lambda z, to, h: z.index_add(0, to, h),
    "index_put": lambda z, to, h: z.index_put((to,), h, accumulate=True),
    "scatter_add": lambda z, to, h: z.scatter_add(0, to[:, None].expand_as(h), h),
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS.keys())
def test_as_many_rows_as_before(put):
    eight = labels(8)
    check(lambda: Shuffled(put), X, lambda out: F.cross_entropy(out, eight), "dfa", outputs=["head"])
