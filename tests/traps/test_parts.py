"""Rows of the error that were made one after the other: loops over samples, groups of crops, steps, two heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, check, handed_back, labels, randn


class Bags(nn.Module):
    """Multiple-instance learning: bags of different sizes, pooled one by one."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.attention = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def pooled(self, bag):
        h = torch.tanh(self.inner(torch.tanh(self.first(bag))))
        return (self.attention(h).softmax(0) * h).sum(0)

    def forward(self, bags):
        return self.head(torch.tanh(self.middle(torch.stack([self.pooled(bag) for bag in bags]))))


class Trees(nn.Module):
    """A recursive network: every call has one node of one sample, without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.leaf, self.inner, self.head = nn.Linear(5, 6), nn.Linear(12, 6), nn.Linear(6, 4)

    def node(self, tree):
        if isinstance(tree, torch.Tensor):
            return torch.tanh(self.leaf(tree))
        return torch.tanh(self.inner(torch.cat([self.node(part) for part in tree])))

    def forward(self, trees):
        return self.head(torch.stack([self.node(tree) for tree in trees]))


class Crops(nn.Module):
    """Groups of different sizes, each run on its own, and one head for all."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, groups):
        encoded = [torch.tanh(self.inner(torch.tanh(self.first(group)))) for group in groups]
        return self.head(torch.cat(encoded))


class Branches(nn.Module):
    """Both halves of the rows come from one trunk."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = torch.tanh(self.inner(torch.tanh(self.first(x))))
        return self.head(torch.cat([torch.tanh(self.left(h)), torch.tanh(self.right(h))]))


class Averaged(Crops):
    """Put behind one another, but for a mean over what was: nobody's rows alone."""

    def forward(self, groups):
        encoded = [torch.tanh(self.inner(torch.tanh(self.first(group)))) for group in groups]
        return self.head(torch.stack(encoded).mean(0))


class Some(nn.Module):
    """A layer that only the first rows go through."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.cat([torch.tanh(self.inner(h[:3])), h[3:]]))


BAGS = [randn(3, 5), randn(5, 5, seed=1), randn(4, 5, seed=2), randn(1, 5, seed=3)]
LEAVES = randn(7, 5)
TREES = [(LEAVES[0], LEAVES[1]), (LEAVES[2], (LEAVES[3], LEAVES[4])), (LEAVES[5], LEAVES[6])]
GROUPS = [randn(2, 5), randn(4, 5, seed=1)]
CASES = {
    "bags": (Bags, (BAGS,), 4),
    "trees": (Trees, (TREES,), 3),
    "crops": (Crops, (GROUPS,), 6),
    "branches": (Branches, (randn(3, 5),), 6),
    "some": (Some, (randn(7, 5),), 7),
    "averaged": (Averaged, ([randn(2, 5), randn(2, 5, seed=1)],), 2),
}


def loss_for(count):
    return lambda out: F.cross_entropy(out, labels(count))


@pytest.mark.parametrize("rule", ["fa", "dfa", "sdfa", "fitted(context=3)"])
@pytest.mark.parametrize("case", CASES)
def test_verified(case, rule):
    make, inputs, count = CASES[case]
    check(make, inputs, loss_for(count), rule, outputs=["head"])


def handed_back_inner(model, inputs, loss):
    """What each call of ``inner`` hands back, in the order of the calls."""
    calls = handed_back(model, inputs, loss, "inner")["inner"]
    return calls, rewire.output_error(model), rewire.feedback(model)["inner"]


@pytest.mark.parametrize("options", [{}, {"output": "head"}], ids=["found", "asked"])
@pytest.mark.parametrize("case", CASES)
def test_values(case, options):
    """From the first pass on."""
    make, inputs, count = CASES[case]
    wanted = {
        "bags": lambda e, B: [torch.stack([e[i] @ B] * len(BAGS[i])) for i in range(4)],
        "trees": lambda e, B: [e[i] @ B for i in (0, 1, 1, 2)],
        "crops": lambda e, B: [e[:2] @ B, e[2:] @ B],
        "branches": lambda e, B: [(e[:3] + e[3:]) / 2 @ B],
        "some": lambda e, B: [e[:3] @ B],
        "averaged": lambda e, B: [e @ B, e @ B],
    }[case]
    model = rewire.convert(build(make), "dfa", scale=0.3, **options)
    for _ in range(3):
        got, e, B = handed_back_inner(model, inputs, loss_for(count))
        if case == "trees":  # parents before their parts, as backward goes: compare whatever their order
            got, expected = (sorted(row.sum().item() for row in rows) for rows in (got, wanted(e, B)))
            assert got == pytest.approx(expected, rel=1e-12)
        else:
            torch.testing.assert_close(got, wanted(e, B))


def test_steps_of_a_sequence():
    """(T, N, F) put together from steps: each has the mean error of the steps that it feeds, here its own."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.stack([torch.tanh(self.inner(torch.tanh(self.first(step)))) for step in x]))

    model = rewire.convert(build(Steps), "dfa", scale=0.3)
    x = randn(5, 3, 5)
    loss = lambda out: F.cross_entropy(out.flatten(0, 1), labels(15))  # noqa: E731
    for _ in range(3):
        got, e, B = handed_back_inner(model, x, loss)
        torch.testing.assert_close(got, [e[t] @ B for t in range(5)])
    check(Steps, x, loss, "dfa", outputs=["head"])


def test_other_sizes_in_each_pass():
    model = rewire.convert(build(Bags), "dfa", scale=0.3)
    for sizes in ([3, 5, 4, 1], [2, 2], [1, 6, 2]):
        bags = [randn(size, 5, seed=size) for size in sizes]
        got, e, B = handed_back_inner(model, (bags,), loss_for(len(bags)))
        torch.testing.assert_close(got, [torch.stack([e[i] @ B] * size) for i, size in enumerate(sizes)])
