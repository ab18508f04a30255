"""Activation checkpointing hides an index from the forward, and may be asked for it only once in the backward."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rewire
from rewire import kept
from rewire.picks import Later
from rewire.swap import states_of

from .checks import build, labels, one_pass, randn
from .test_flow import TOKENS, AsManyRows, Experts, SortedByExpert, token_loss
from .test_pours import SHUFFLED, Edges, Graphs

X = randn(4, 3, 5)
INDEX = torch.tensor([0, 2, 4])


class Bias(nn.Module):
    """Attention's positions, looked up in a table by index; or in what a layer has made of that."""

    def __init__(self):
        super().__init__()
        self.q, self.o, self.p = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, h):
        return self.o(torch.tanh(self.q(h) + self.rows()))

    def rows(self):
        return self.table[INDEX]


class MadeBias(Bias):
    def rows(self):
        return self.p(self.table)[INDEX]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h):
        rows = h.flatten(0, 1)
        mine = (rows[:, 0] > 0).nonzero()[:, 0]
        out = torch.zeros_like(rows).index_add(0, mine, self.o(torch.tanh(self.q(rows[mine]))))
        return h + out.view_as(h)


class Pooled(nn.Module):
    """Rows that are added up by index inside of the block: nothing of it is a pick."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h):
        to = torch.tensor([2, 0, 3, 1])
        return torch.zeros_like(h).index_add(0, to, self.o(torch.tanh(self.q(h))))


class Fewer(nn.Module):
    """Leaves some samples out: all that follows has rows that were picked here."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.first = True

    def forward(self, h):
        if self.first:
            h = h[torch.tensor([2, 0, 3])]
        return torch.tanh(self.q(h)) + h


BLOCKS = [Bias, MadeBias, Expert, Pooled, Fewer]
RULES = ["bp", "fa", "usf", "kp", "dfa", "fitted(every=1)"]


class Net(nn.Module):
    def __init__(self, block, blocks=2):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        for later in self.blocks[1:]:
            later.first = False
        self.head = nn.Linear(6, 2)
        self.checkpointed = True
        self.runs = 0

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        for block in self.blocks:
            h = checkpoint(self.run, block, h, use_reentrant=False) if self.checkpointed else self.run(block, h)
        return self.head(h.mean(1))

    def run(self, block, h):
        self.runs += 1
        return block(h)


def square(y):
    return y.square().sum()


def passes(make, inputs, loss, rule, checkpointed, count=3):
    """Gradients of each pass, and what was warned of."""
    model = rewire.convert(build(make), rule)
    gradients = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(count):
            checkpointed(model, number)
            gradients.append(one_pass(model, inputs, loss))
    return gradients, {str(w.message) for w in caught}, model


def same(one, other):
    for ours, plain in zip(one, other, strict=True):
        for name, gradient in plain.items():
            torch.testing.assert_close(ours[name], gradient)


def never(model, number):
    model.checkpointed = False


def always(model, number):
    model.checkpointed = True


def later(model, number):
    model.checkpointed = number > 1


@pytest.mark.parametrize("when", [always, later])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", BLOCKS)
def test_an_index_inside_a_block(block, rule, when):
    plain, said, unchecked = passes(lambda: Net(block), X, square, rule, never, 4)
    ours, warned, model = passes(lambda: Net(block), X, square, rule, when, 4)
    same(ours, plain)
    assert warned == said
    assert model.runs == (16 if when is always else 12)  # each block once forward and once in the backward
    assert states_of(model.head)[0].wiring.passes == states_of(unchecked.head)[0].wiring.passes
    assert rewire.verify(model, X, square).ok


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_blocks_within_blocks(rule):
    class Outer(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    plain, *_ = passes(lambda: Net(Expert), X, square, rule, never)
    ours, *_ = passes(lambda: Outer(Expert), X, square, rule, always)
    same(ours, plain)


class Whole(nn.Module):
    """All of a model as one block."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.checkpointed = True

    def forward(self, *args):
        return checkpoint(self.model, *args, use_reentrant=False) if self.checkpointed else self.model(*args)


CASES = {
    "experts": (Experts, TOKENS, token_loss),
    "experts, pooled": (lambda: Experts("select", pooled=True), TOKENS, token_loss),
    "as many rows": (AsManyRows, TOKENS, token_loss),
    "sorted": (SortedByExpert, TOKENS, token_loss),
    "graphs": (lambda: Graphs(graph=SHUFFLED), randn(8, 5), lambda out: F.cross_entropy(out, labels(4))),
    "edges": (Edges, randn(8, 5), lambda out: F.cross_entropy(out, labels(8))),
}


@pytest.mark.parametrize("when", [always, later])
@pytest.mark.parametrize("rule", ["fa", "dfa", "fitted(every=1)"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_as_one_block(case, rule, when):
    make, inputs, loss = CASES[case]
    plain, said, _ = passes(lambda: Whole(make()), inputs, loss, rule, never, 4)
    ours, warned, _ = passes(lambda: Whole(make()), inputs, loss, rule, when, 4)
    same(ours, plain)
    assert warned == said


def test_many_blocks_on_rows_that_the_first_has_picked():
    """What each layer waits for is asked from the lowest up: asking one another would be too deep for Python."""
    plain, *_ = passes(lambda: Net(Fewer, 300), X, square, "dfa", never, 1)
    ours, _, model = passes(lambda: Net(Fewer, 300), X, square, "dfa", always, 1)
    same(ours, plain)
    assert model.runs == 600


def test_a_backward_through_the_graph_twice():
    model = rewire.convert(build(lambda: Net(Expert)), "dfa", scale=0.3)
    for _ in range(2):
        model.zero_grad()
        y = square(model(X))
        y.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        y.backward()
        for p, gradient in zip(model.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, 2 * gradient)


@pytest.mark.parametrize("block", [Expert, Pooled])
def test_a_version_of_pytorch_that_keeps_it_in_another_way(block, monkeypatch):
    """The index cannot be seen: that is said by name, and under other rules nobody asks for it."""
    monkeypatch.setattr(kept, "_HANDLES", "elsewhere")
    plain, *_ = passes(lambda: Net(block), X, square, "fa", never)
    ours, warned, _ = passes(lambda: Net(block), X, square, "fa", always)
    same(ours, plain)
    assert not warned
    warned = passes(lambda: Net(block), X, square, "dfa", always)[1]
    assert all("hides under activation checkpointing" in text for text in warned)
    assert {name for name in ("0.q", "0.o", "1.q", "1.o") if any(name in text for text in warned)} >= {"0.q", "1.o"}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("hooks", [torch.autograd.graph.save_on_cpu, None], ids=["save_on_cpu", "hooks"])
def test_other_hooks_on_saved_tensors(hooks, block):
    def kept_as_it_is():
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)

    class Hooked(Net):
        def forward(self, x):
            with (hooks or kept_as_it_is)():
                return super().forward(x)

    plain, said, _ = passes(lambda: Net(block), X, square, "dfa", never)
    ours, warned, _ = passes(lambda: Hooked(block), X, square, "dfa", never)
    same(ours, plain)
    assert warned == said


class BiasMade(Bias):
    def rows(self):
        return self.p(self.table[INDEX])


@pytest.mark.parametrize("block", [MadeBias, BiasMade])
def test_no_other_layers_look_for_picks_than_without(block):
    """They would in every call from then on."""

    def picks(checkpointed):
        def put(model, number):
            model.checkpointed = checkpointed

        model = passes(lambda: Net(block), X, square, "dfa", put)[2]
        return [state.name for module in model.modules() for state in states_of(module) if state.picks]

    assert picks(True) == picks(False)


def test_a_deep_chain_of_picks_is_found_without_recursion():
    later = Later(lambda: None)
    for _ in range(3 * sys.getrecursionlimit()):
        later = Later(later.found, [later])
    assert later.found() is None
