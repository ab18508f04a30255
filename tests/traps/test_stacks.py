"""Siamese networks: two batches in one, one behind the other, and taken apart again further up."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import build, check, labels, one_pass, randn

N = 4
X = (randn(N, 5), randn(N, 5, seed=1))
Y = labels(N)


def chunked(z):
    return z.chunk(2)


def sliced(z):
    return z[:N], z[N:]


def split(z):
    return z.split([N, N])


def selected(z):
    z = z.view(2, N, *z.shape[1:])
    return z[0], z[1]


def unbound(z):
    return z.unflatten(0, (2, N)).unbind()


WAYS = [chunked, sliced, split, selected, unbound]


class Siamese(nn.Module):
    def __init__(self, apart=chunked):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.apart = apart

    def forward(self, a, b):
        h = torch.tanh(self.b(torch.tanh(self.a(torch.cat([a, b])))))
        one, two = self.apart(torch.tanh(self.c(h)))
        return self.head(torch.tanh(self.mid(one * two + one)))


class Images(nn.Module):
    """The same of images, with a branch that sees the first batch only, as optical flow has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
        self.context = nn.Conv2d(3, 6, 5, stride=2)
        self.mix, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, a, b):
        one, two = torch.tanh(self.b(torch.tanh(self.a(torch.cat([a, b]))))).chunk(2)
        h = one * two + torch.tanh(self.context(a))
        for _ in range(2):
            h = torch.tanh(self.mix(h))
        return self.head(h)


def loss(out):
    return F.cross_entropy(out, Y)


@pytest.mark.parametrize("apart", WAYS)
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_verified(rule, apart):
    check(lambda: Siamese(apart), X, loss, rule, outputs=["head"])


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_images_with_a_branch_of_one(rule):
    images = (randn(N, 3, 9, 9), randn(N, 3, 9, 9, seed=1))
    check(Images, images, lambda out: (out**3).mean(), rule, outputs=["head"])


@pytest.mark.parametrize("options", [{}, {"output": "head"}], ids=["found", "asked"])
@pytest.mark.parametrize("apart", WAYS)
def test_values(apart, options):
    """From the first pass on: both rows of a pair get their pair's error."""
    model = rewire.convert(build(lambda: Siamese(apart)), "dfa", scale=0.3, **options)
    for _ in range(2):
        seen = {}

        def note(module, args, seen=seen):
            args[0].register_hook(lambda g: seen.update({module: g}))

        handles = [layer.register_forward_pre_hook(note) for layer in (model.b, model.c)]
        one_pass(model, X, loss)
        e, B = rewire.output_error(model), rewire.feedback(model)
        for name in ("b", "c"):
            torch.testing.assert_close(seen[getattr(model, name)], torch.cat([e @ B[name]] * 2))
        for handle in handles:
            handle.remove()


def test_not_all_parts_are_no_stack():
    """Two parts of each sample lie side by side; that the first N of 2N rows are used somewhere says nothing."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
            self.gate, self.head = nn.Linear(6, 1), nn.Linear(6, 4)

        def forward(self, x):  # (N, 2, 5)
            h = torch.tanh(self.b(torch.tanh(self.a(x.flatten(0, 1)))))
            first = self.gate(h[:N]).mean()
            return self.head(torch.tanh(h.unflatten(0, (N, 2)).sum(1)) * first.sigmoid())

    check(Halves, randn(N, 2, 5), loss, "dfa", outputs=["head"])
