"""Modules that use a child's weight themselves: its forward never runs."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewire

from .checks import RULES, build, check, labels, one_pass, randn

N, T, D = 3, 5, 8
TOKENS = randn(N, T, D)
CLASSES = labels(N)


def loss(out):
    return F.cross_entropy(out, CLASSES)


class Attention(nn.Module):
    """By hand; how the projections are made is what differs."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.proj = nn.Linear(D, D)

    def project(self, x):
        return self.qkv(x)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.project(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(n, t, d))


class EvaAttention(Attention):
    def project(self, x):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias=bias)


class SlicedAttention(Attention):
    def project(self, x):
        w = self.qkv.weight
        return torch.cat([F.linear(x, w[:D], self.q_bias), F.linear(x, w[D : 2 * D]), F.linear(x, w[2 * D :])], -1)


class ChunkedAttention(Attention):
    def project(self, x):
        return torch.cat([F.linear(x, w) for w in self.qkv.weight.chunk(3)], -1)


class Encoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.attention, self.norm = attention(), nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, 12), nn.Linear(12, D)
        self.head = nn.Linear(D, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", [Attention, EvaAttention])
def test_attention(attention, rule):
    zero = ("attention.q_bias", "attention.v_bias") if attention is Attention else ()
    check(lambda: Encoder(attention), TOKENS, loss, rule, outputs=["head"], zero=zero)


def said_or_handled(make, rule, name="used", **options):
    """Either live, or warned about by name and dead for verify; never counted as converted without a word."""
    model = rewire.convert(build(make), rule, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            one_pass(model, *INPUTS)
    said = [str(w.message) for w in caught if issubclass(w.category, rewire.RewireWarning)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rewire.verify(model, *INPUTS)
    status = {layer.name: layer.status for layer in result.layers}[name]
    row = next(row for row in rewire.summary(model).rows if row.name == name)
    if status == "live":
        assert not said and result.ok and "not run" not in row.note and "NOT" not in row.note
    else:
        assert status in ("dead", "wrong"), str(result)
        assert not result.ok
        assert sum(repr(name) in message for message in said) == 1, said
        assert "NOT under its rule" in row.note
    return status


INPUTS = (randn(6, 5), lambda out: F.cross_entropy(out, labels(6)))


class Kernel(torch.autograd.Function):
    """x (N, i), W (o, i) -> y (N, o), as an extension would compute it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.t() @ x


USES = {
    "kernel": lambda x, layer: Kernel.apply(x, layer.weight),
    "x @ w.t()": lambda x, layer: x @ layer.weight.t(),
    "x @ w.T": lambda x, layer: x @ layer.weight.T,
    "einsum": lambda x, layer: torch.einsum("bi,oi->bo", x, layer.weight),
    "addmm": lambda x, layer: torch.addmm(layer.bias, x, layer.weight.t()),
    "matmul": lambda x, layer: torch.matmul(x, layer.weight.t()),
    "slices": lambda x, layer: torch.cat([F.linear(x, w) for w in layer.weight.chunk(2)], 1),
    "scaled": lambda x, layer: F.linear(x, layer.weight * 0.5, layer.bias),
    "cast": lambda x, layer: F.linear(x, layer.weight.to(x.dtype), layer.bias),
    "bilinear": lambda x, layer: (x.unsqueeze(1) * layer.weight).sum(-1),
}


def using(use):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(torch.tanh(use(torch.tanh(self.first(x)), self.used)))

    return Net


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use", USES)
def test_a_linear_weight(use, rule):
    said_or_handled(using(USES[use]), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", [SlicedAttention, ChunkedAttention])
def test_slices_of_a_packed_projection(attention, rule, monkeypatch):
    monkeypatch.setitem(globals(), "INPUTS", (TOKENS, loss))
    said_or_handled(lambda: Encoder(attention), rule, "attention.qkv")


class Mamba(nn.Module):
    """A depthwise convolution whose weight is taken out of its module, in the form a fused kernel wants."""

    def __init__(self, how):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.conv1d = nn.Conv1d(D, D, 3, groups=D, padding=2)
        self.last = nn.Linear(D, 4)
        self.how = how

    def forward(self, x):
        h = self.first(x).transpose(1, 2)
        if self.how == "F.conv1d":
            h = F.conv1d(h, self.conv1d.weight, self.conv1d.bias, padding=2, groups=D)
        else:
            weight = self.conv1d.weight.squeeze(1)  # "d 1 w -> d w"
            padded = F.pad(h, (2, 0))
            if self.how == "own":
                h = sum(padded[..., i : i + h.shape[-1]] * weight[:, i, None] for i in range(3))
            else:
                h = F.conv1d(padded, weight.unsqueeze(1), self.conv1d.bias, groups=D)
        return self.last(F.silu(h[..., : x.shape[1]]).transpose(1, 2).mean(1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["F.conv1d", "rearranged", "own"])
def test_a_convolutions_weight(how, rule, monkeypatch):
    monkeypatch.setitem(globals(), "INPUTS", (TOKENS, loss))
    status = said_or_handled(lambda: Mamba(how), rule, "conv1d")
    assert status == "live" or how != "F.conv1d"


PARTIAL = {use: USES[use] for use in ("x @ w.t()", "einsum", "matmul", "bilinear", "kernel")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use", PARTIAL)
def test_partial_use(use, rule):
    """The layer runs, and its weight is used elsewhere as well."""
    said_or_handled(using(lambda x, layer: layer(x) + PARTIAL[use](x, layer)), rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_tied_decoder(rule, monkeypatch):
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.used(torch.tanh(self.first(x)))), self.used.weight.t())

    x = randn(6, 5)
    monkeypatch.setitem(globals(), "INPUTS", (x, lambda out: (out - x).square().mean()))
    said_or_handled(Auto, rule)


@pytest.mark.parametrize("rule", RULES)
def test_an_output_made_with_a_weight_directly(rule):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.used = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return torch.tanh(self.mid(torch.tanh(self.first(x)))) @ self.used.weight.t()

    said_or_handled(Net, rule)


def joined(how, x, a, b):
    """Two layers' weights behind one another, and one product."""
    if how == "linear":
        return F.linear(x, torch.cat([a.weight, b.weight]), torch.cat([a.bias, b.bias]))
    if how == "linear by features":
        return F.linear(x, torch.cat([a.weight, b.weight], dim=1), a.bias)
    if how == "matmul by features":  # the second used the other way round
        return x.matmul(torch.cat([a.weight.t(), b.weight], dim=0))
    if how == "matmul of a view":
        return x @ torch.concat((a.weight, b.weight)).t()
    return (torch.cat([a.weight, b.weight]) @ x.t()).t()


# shapes of a's and b's weights, and whether their results are added
JOINED = {
    "linear": ((7, 6), (3, 6), False),
    "linear by features": ((5, 4), (5, 2), True),
    "matmul by features": ((5, 4), (2, 5), True),
    "matmul of a view": ((7, 6), (3, 6), False),
    "turned": ((7, 6), (3, 6), False),
}


class Joined(nn.Module):
    def __init__(self, how, lose=lambda weight: weight):
        super().__init__()
        (rows, columns), (more_rows, more_columns), added = JOINED[how]
        self.how, self.lose = how, lose
        self.first = nn.Linear(5, 6)
        self.a, self.b = nn.Linear(columns, rows), nn.Linear(more_columns, more_rows)
        self.last = nn.Linear(rows if added else rows + more_rows, 4)

    def forward(self, x):
        self.h = torch.tanh(self.first(x))
        self.y = joined(self.how, self.h, self.a, self.b)
        return self.last(torch.tanh(self.y))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", JOINED)
def test_weights_of_two_layers_as_one(how, rule):
    x, loss_fn = INPUTS
    plain, model = build(Joined, how), rewire.convert(build(Joined, how), rule, scale=1.0)
    for _ in range(3):
        one_pass(plain, *INPUTS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients = one_pass(model, *INPUTS)
        assert torch.equal(model.y, plain.y) and torch.equal(
            model.last(torch.tanh(model.y)), plain.last(plain.y.tanh())
        )
    result = rewire.verify(model, *INPUTS)
    assert result.ok and {layer.name: layer.status for layer in result.layers}["b"] == "live", str(result)

    # By hand.
    out = model(x).detach().requires_grad_()
    loss_fn(out).backward()
    e, B, h, y = out.grad, rewire.feedback(model), model.h.detach(), model.y.detach()
    delta = (e @ B["last"]) * (1 - torch.tanh(y) ** 2)
    (rows, columns), _, added = JOINED[how]
    turned = how == "matmul by features"
    if rule == "dfa":
        handed = torch.cat([e @ B["a"], e @ B["b#1" if turned else "b"]], 1) if added else e @ B["a"] + e @ B["b"]
    elif added:
        handed = torch.cat([delta @ B["a"], delta @ (B["b"].t() if turned else B["b"])], 1)
    else:
        handed = delta[:, :rows] @ B["a"] + delta[:, rows:] @ B["b"]
    torch.testing.assert_close(gradients["first.weight"], (handed * (1 - h**2)).t() @ x)
    if added:
        wanted = {"a": delta.t() @ h[:, :columns], "b": delta.t() @ h[:, columns:]}
        wanted["b"] = wanted["b"].t() if turned else wanted["b"]
    else:
        wanted = {"a": delta[:, :rows].t() @ h, "b": delta[:, rows:].t() @ h}
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[f"{name}.weight"], gradient)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["used", "other"])
def test_weights_of_two_layers_as_one_lost_from_sight(name, rule):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)
            self.used, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            both = torch.cat([self.used.weight, self.other.weight])
            return self.last(torch.tanh(torch.tanh(self.first(x)) @ (both * 0.5).t()))

    assert said_or_handled(Net, rule, name) == "dead"


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_without_numbers(rule):
    """A width that is what another leaves of a third may come to nothing."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.empty = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(4, 0)
            self.last = nn.Linear(6, 4)

        def forward(self, x):
            h = torch.tanh(self.mid(torch.tanh(self.first(x))))
            return h @ torch.cat([self.last.weight.t(), self.empty.weight])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about the initialisation
        model = rewire.convert(build(Net), rule)
    for _ in range(2):
        one_pass(model, *INPUTS)
    result = rewire.verify(model, *INPUTS)
    assert result.ok and {layer.name: layer.status for layer in result.layers}["mid"] == "live", str(result)
