"""Networks, data and steps for what is compiled."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import rewire


class Mixed(nn.Module):
    """Convolutions (strided, grouped), batch norm, a skip connection, an in-place activation, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.wide = nn.Linear(24, 12)
        self.twice = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        h = F.relu(self.grouped(h), inplace=True)
        h = torch.tanh(self.wide(h.flatten(1)))
        h = h + torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.head(h)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, t):
        h = self.embed(t)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head(h)


def chain(outputs=20):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs))


class Two(nn.Module):
    """Two outputs, one of them below a layer that the other is above."""

    def __init__(self, outputs=(3, 3)):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.c, self.aux = nn.Linear(8, outputs[0]), nn.Linear(8, outputs[1])

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h))) + 0, self.aux(h)


def two_losses(model, n=6):
    model.zero_grad()
    y, z = model(vectors(n)[0])
    (y.square().sum() + z.sigmoid().sum()).backward()


def images(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 8, 8, generator=g), torch.randint(0, 3, (n,), generator=g)


def tokens(n):
    g = torch.Generator().manual_seed(n)
    return torch.randint(0, 11, (n, 5), generator=g), torch.randint(0, 11, (n, 5), generator=g)


def vectors(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)


def step(model, data, zero=True):
    x, y = data
    if zero:
        model.zero_grad()
    out = model(x)
    F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    return out


def pair(net, data, rule, **options):
    """A converted model that has seen an ordinary pass, and its twin."""
    torch.manual_seed(0)
    model = rewire.convert(net(), rule, **options)
    step(model, data(6))
    return model, copy.deepcopy(model)


def same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def one_graph(model, **options):
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


def error(model, data):
    """e of mean cross-entropy."""
    x, y = data
    with torch.no_grad():
        out = model(x)
    return (out.softmax(-1) - F.one_hot(y, out.shape[-1])) / len(y)


def chain_by_hand(model, x, signal):
    """The gradients of all layers of a :func:`chain` but the last, from the rule's equation with a dense B."""
    B = rewire.feedback(model)
    with torch.no_grad():
        h = [x, model[:2](x), model[:4](x)]
    for i, name in enumerate(["2", "4"]):
        delta = signal @ B[name] * (1 - h[i + 1] ** 2)
        torch.testing.assert_close(model[2 * i].weight.grad, delta.T @ h[i], rtol=1e-4, atol=1e-6)
