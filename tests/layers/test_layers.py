"""Every kind of layer: forward untouched, exact weight gradients, and the input's gradient the rule's own.

The reference for a local rule is the same operation with B in place of W, differentiated by PyTorch.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import rewire

from ..plain import randn as draw
from ..plain import same as close
from ..plain import seeded

LOCAL = ("fa", "usf", "brsf", "frsf")
RULES = ("bp", *LOCAL, "dfa", "sdfa", "shallow")


@pytest.fixture(autouse=True)
def silence_is_checked():
    """A warning of the library fails the test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewire.RewireWarning)
        yield


class Above(nn.Module):
    """``layer`` on x = 1 x', so that x is inside the graph, and a converted output layer on top."""

    def __init__(self, layer, n_out=3, call=None):
        super().__init__()
        self.layer = layer
        self.head = nn.LazyLinear(n_out)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x):
        self.x = x * 1.0
        if self.x.requires_grad:
            self.x.retain_grad()
        y = self.y = self.call(self.layer, self.x)
        if y.requires_grad:
            y.retain_grad()
        return self.head(torch.tanh(y).flatten(1) if y.dim() > 1 else torch.tanh(y))


def above(make, x, **kwargs):
    model = seeded(lambda: Above(make(), **kwargs))
    with torch.no_grad():
        model(x)  # the lazy head takes its shape
    model.double()
    return model


# -- the layers PyTorch has ----------------------------------------------------------------------------
# name: (layer, input's shape, how it is called)

PLAIN = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear on images": (lambda: nn.Linear(4, 3), (2, 3, 2, 4)),
    "linear, one vector": (lambda: nn.Linear(4, 3), (4,)),
    "linear, one output": (lambda: nn.Linear(4, 1), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv1d, all": (lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, 2, bias=False), (2, 4, 9)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 9)),
    "conv1d, valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid"), (2, 4, 9)),
    "conv1d, circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    "conv1d, unbatched": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 6)),
    "conv2d, all": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), (2, 4, 7, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 5, 5)),
    "conv2d, pointwise, stride": (lambda: nn.Conv2d(4, 6, 1, 2), (2, 4, 5, 6)),
    "conv2d, same, even kernel": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 5, 6)),
    "conv2d, same, reflect": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 5, 6)),
    "conv2d, same, even, circular": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
        (2, 4, 5, 6),
    ),
    "conv2d, replicate": (lambda: nn.Conv2d(4, 6, 3, 2, (2, 1), padding_mode="replicate"), (2, 4, 5, 6)),
    "conv2d, padding past the input": (lambda: nn.Conv2d(4, 6, 5, padding=4), (2, 4, 2, 2)),
    "conv2d, rest dropped by stride": (lambda: nn.Conv2d(4, 6, 2, 3), (2, 4, 7, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(4, 6, 3, 2, groups=2), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
    "conv3d, all": (lambda: nn.Conv3d(2, 4, (2, 1, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), 2), (2, 2, 3, 4, 3)),
    "conv3d, same": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding="same", bias=False), (2, 2, 3, 4, 3)),
    "conv3d, unbatched": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 5)),
    "transposed 1d, all": (lambda: nn.ConvTranspose1d(4, 6, 3, 3, 1, 2, 2, False, 2), (2, 4, 5)),
    "transposed 1d, unbatched": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 3, 4)),
    "transposed 2d, all": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, True, (1, 2)),
        (2, 4, 3, 4),
    ),
    "transposed 2d, unbatched": (lambda: nn.ConvTranspose2d(4, 6, 2, 2, bias=False), (4, 3, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2, 2, 1, 1), (2, 2, 2, 3, 2)),
    "transposed 3d, groups": (lambda: nn.ConvTranspose3d(2, 4, (2, 1, 3), groups=2, bias=False), (2, 2, 2, 3, 2)),
    "transposed 3d, unbatched": (lambda: nn.ConvTranspose3d(2, 4, 2), (2, 2, 3, 2)),
}


def is_unbatched(name):
    return "unbatched" in name or name == "linear, one vector"


def with_weight(layer, weight):
    """The same layer, plain, with another weight."""
    twin = copy.deepcopy(layer)
    del twin._parameters["weight"]
    twin.weight = weight
    return twin


def check_local(model, plain, x, delta_of=lambda model: model.y.grad, call=lambda layer, x: layer(x)):
    """x's gradient is that of ``plain`` with B as its weight; weight and bias gradients are plain's own.

    Every one given the gradient delta that arrived at the layer's output.
    """
    model.zero_grad()
    out = model(x)
    (out * draw(*out.shape, seed=3)).sum().backward()
    delta = delta_of(model)
    B = rewire.feedback(model)["layer"]
    at = model.x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(call(with_weight(plain, B), at), at, delta)
    close(model.x.grad, expected, "x")
    ours, theirs = dict(model.layer.named_parameters()), dict(plain.named_parameters())
    grads = torch.autograd.grad(call(plain, at.detach()), [theirs[name] for name in ours], delta)
    for name, expected in zip(ours, grads, strict=True):
        close(ours[name].grad, expected, name)


@pytest.mark.parametrize("name", PLAIN)
def test_forward_is_bitwise_the_same(name):
    make, shape = PLAIN[name]
    x = draw(*shape)
    layer = seeded(make)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        expected = layer.to(dtype)(x.to(dtype))
        for rule in ("fa", "dfa"):
            twin = rewire.convert(copy.deepcopy(layer), rule)
            assert torch.equal(twin(x.to(dtype).requires_grad_()), expected)
            assert torch.equal(twin(x.to(dtype)), expected)
            with torch.no_grad():
                assert torch.equal(twin(x.to(dtype)), expected)


@pytest.mark.parametrize("rule", LOCAL)
@pytest.mark.parametrize("name", PLAIN)
def test_local(name, rule):
    make, shape = PLAIN[name]
    x = draw(*shape).requires_grad_()
    flat = {"call": lambda layer, x: layer(x).flatten()} if is_unbatched(name) else {}
    model = above(make, x, **flat)
    plain = copy.deepcopy(model.layer)
    rewire.convert(model, rule)
    delta = (lambda m: m.y.grad.reshape(plain(x).shape)) if flat else (lambda m: m.y.grad)
    for _ in range(2):
        check_local(model, plain, x, delta)


@pytest.mark.parametrize("name", PLAIN)
def test_direct(name):
    """Given delta, weight and bias gradients are exact; x gets e B, whatever the layer."""
    make, shape = PLAIN[name]
    x = draw(*shape).requires_grad_()
    flat = is_unbatched(name)
    model = above(make, x, **({"call": lambda layer, x: layer(x).flatten()} if flat else {}))
    plain = copy.deepcopy(model.layer)
    rewire.convert(model, "dfa", scale=0.3)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        delta = model.y.grad.reshape(plain(x).shape)
        at = x.detach()
        ours, theirs = dict(model.layer.named_parameters()), dict(plain.named_parameters())
        for key, expected in zip(ours, torch.autograd.grad(plain(at), list(theirs.values()), delta), strict=True):
            close(ours[key].grad, expected, key)
        B = rewire.feedback(model)["layer"]
        fed = torch.tensordot(e, B, ([-1], [0]))  # (N, *B's own shape)
        while fed.dim() < x.dim():  # tokens and images with channels last: the same at every position
            fed = fed.unsqueeze(1)
        close(model.x.grad, fed.expand(x.shape), "x")
        close(x.grad, model.x.grad, "what x was made of")
        x.grad = None


@pytest.mark.parametrize("rule", LOCAL)
def test_output_size_of_a_transposed_convolution(rule):
    x = draw(2, 4, 3, 4).requires_grad_()
    call = lambda layer, x: layer(x, output_size=[7, 8])  # noqa: E731
    model = above(lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), x, call=call)
    plain = copy.deepcopy(model.layer)
    rewire.convert(model, rule)
    assert torch.equal(model.layer(x, [7, 8]), plain(x, [7, 8]))
    check_local(model, plain, x, call=call)
    with pytest.raises(ValueError, match="output size"):
        model.layer(x, output_size=[9, 9])


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 2d"])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_keyword_input(name, rule):
    make, shape = PLAIN[name]
    x = draw(*shape).requires_grad_()
    layer = seeded(make)
    expected = layer(x)
    assert torch.equal(rewire.convert(layer, rule)(input=x), expected)


# -- layers of other libraries, subclasses, parametrizations -------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_transformers_conv1d(shape):
    """W is (in, out): y = x W + b."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = draw(*shape).requires_grad_()
    for rule in LOCAL:
        model = above(lambda: Conv1D(3, 4), x)
        layer, W, b = model.layer, model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
        expected = layer(x)
        rewire.convert(model, rule, scale=0.5)
        assert torch.equal(layer(x), expected)
        out = model(x)
        (out * draw(*out.shape, seed=3)).sum().backward()
        B, delta = rewire.feedback(model)["layer"], model.y.grad
        assert B.shape == W.shape
        if rule == "usf":
            close(B, 0.5 * W.sign())
        close(model.x.grad, torch.einsum("...o,io->...i", delta, B), rule)
        close(layer.weight.grad, torch.einsum("...i,...o->io", x, delta), rule)
        close(layer.bias.grad, delta.reshape(-1, 3).sum(0), rule)
        assert b.shape == layer.bias.shape
    model = above(lambda: Conv1D(3, 4), x)
    rewire.convert(model, "dfa", scale=0.3)
    out = model(x)
    e = draw(*out.shape, seed=3)
    (out * e).sum().backward()
    fed = e @ rewire.feedback(model)["layer"]
    close(model.x.grad, (fed if x.dim() == 2 else fed[:, None]).expand(x.shape))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class MaskedLinear(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.arange(12).reshape(3, 4) % 3 > 0).double())

    def forward(self, x):
        return nn.functional.linear(x, weight=self.weight * self.mask, bias=self.bias)


class LoraLinear(nn.Linear):
    """W x + U D x, as adapters write it; U and D are matrices of another shape."""

    def __init__(self, *args):
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


class MergedLora(LoraLinear):
    def forward(self, x):
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(2 * x, self.weight / 3, self.bias)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight - weight.mean((1, 2, 3), keepdim=True), bias, self.stride, "same")


class OwnTransposed(nn.ConvTranspose1d):
    def forward(self, x):
        return F.conv_transpose1d(x, self.weight.tanh(), self.bias, stride=2, output_padding=1)


class Renamed(nn.Linear):
    """No forward of its own."""


class Wrapping(nn.Linear):
    """A forward that only adds to its base's."""

    def forward(self, x):
        return super().forward(x) * 2


class Gated(nn.Linear):
    """Two matrices of one shape, of which the rule is about ``weight``."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * torch.sigmoid(F.linear(x, self.gate))


# name: (layer, input's shape, its forward with the used weight replaced, the weight it uses)
def lora(layer, x, w):
    return F.linear(x, w, layer.bias) + F.linear(F.linear(x, layer.down), layer.up)


OWN = {
    "scaled": (lambda: ScaledLinear(4, 3), (5, 4), lambda m, x, w: F.linear(x, w, m.bias), lambda m: m.weight / 2),
    "masked": (
        lambda: MaskedLinear(4, 3),
        (5, 4),
        lambda m, x, w: F.linear(x, w, m.bias),
        lambda m: m.weight * m.mask,
    ),
    "lora": (lambda: LoraLinear(4, 3), (5, 4), lora, lambda m: m.weight),
    "merged lora": (
        lambda: MergedLora(4, 3),
        (5, 4),
        lambda m, x, w: F.linear(x, w, m.bias),
        lambda m: m.weight + m.up @ m.down,
    ),
    "tokens": (lambda: ScaledLinear(4, 3), (2, 5, 4), lambda m, x, w: F.linear(x, w, m.bias), lambda m: m.weight / 2),
    "conv": (
        lambda: ScaledConv(2, 4, 3, 2, 1, groups=2),
        (2, 2, 5, 6),
        lambda m, x, w: F.conv2d(2 * x, w, m.bias, 2, 1, 1, 2),
        lambda m: m.weight / 3,
    ),
    "conv, _conv_forward": (
        lambda: OwnConvForward(2, 4, 4),
        (2, 2, 5, 6),
        lambda m, x, w: F.conv2d(x, w, m.bias, 1, "same"),
        lambda m: m.weight - m.weight.mean((1, 2, 3), keepdim=True),
    ),
    "transposed": (
        lambda: OwnTransposed(2, 4, 3),
        (2, 2, 5),
        lambda m, x, w: F.conv_transpose1d(x, w, m.bias, 2, 0, 1),
        lambda m: m.weight.tanh(),
    ),
    "gated": (
        lambda: Gated(4, 3),
        (5, 4),
        lambda m, x, w: (
            # the value of W x, with the derivative of B x
            (F.linear(x.detach(), m.weight, m.bias) + F.linear(x - x.detach(), w)) * torch.sigmoid(F.linear(x, m.gate))
        ),
        lambda m: m.weight,
    ),
    "renamed": (lambda: Renamed(4, 3), (5, 4), lambda m, x, w: F.linear(x, w, m.bias), lambda m: m.weight),
    "wrapping": (lambda: Wrapping(4, 3), (5, 4), lambda m, x, w: 2 * F.linear(x, w, m.bias), lambda m: m.weight),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        (5, 4),
        lambda m, x, w: F.linear(x, w, m.bias),
        lambda m: (
            m.parametrizations.weight.original0
            * m.parametrizations.weight.original1
            / m.parametrizations.weight.original1.norm(dim=1, keepdim=True)
        ),
    ),
    "weight_norm, conv": (
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
        (2, 2, 5, 6),
        lambda m, x, w: F.conv2d(x, w, m.bias),
        lambda m: (
            m.parametrizations.weight.original0
            * m.parametrizations.weight.original1
            / m.parametrizations.weight.original1.square().sum((1, 2, 3), keepdim=True).sqrt()
        ),
    ),
    "spectral_norm, eval": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
        (5, 4),
        lambda m, x, w: F.linear(x, w, m.bias),
        lambda m: m.weight,  # PyTorch's own; in eval mode it does not change
    ),
}


def check_used_weight(model, plain, x, forward, used, rule):
    """Local rules see the weight the forward used; what made it keeps its own gradient."""
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        (out * draw(*out.shape, seed=3)).sum().backward()
        delta = model.y.grad
        s = rewire.scales(model)["layer"]
        W = used(plain).detach()
        if rule == "usf":
            B = s * W.sign()
        else:
            R = draw_r(model, W.shape, s)
            B = R if rule == "fa" else R.abs() * W.sign()
        at = model.x.detach().requires_grad_()
        (expected,) = torch.autograd.grad(forward(plain, at, B), at, delta)
        close(model.x.grad, expected, f"x under {rule}")
        theirs = dict(plain.named_parameters())
        grads = torch.autograd.grad(plain(at.detach()), list(theirs.values()), delta)
        for name, expected in zip(theirs, grads, strict=True):
            close(dict(model.layer.named_parameters())[name].grad, expected, name)


def draw_r(model, shape, s):
    """R, for rules whose feedback shows it."""
    R = rewire.feedback(model)["layer"]
    assert R.shape == shape
    assert 0.2 * s < R.abs().mean() < 3 * s
    return R


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@pytest.mark.parametrize("name", OWN)
def test_own_forward_local(name, rule):
    make, shape, forward, used = OWN[name]
    x = draw(*shape).requires_grad_()
    model = above(make, x)
    plain = copy.deepcopy(model.layer)
    expected = plain(x)
    rewire.convert(model, rule)
    assert torch.equal(model.layer(x), expected)
    check_used_weight(model, plain, x, forward, used, rule)


@pytest.mark.parametrize("name", OWN)
def test_own_forward_direct(name):
    make, shape, _, _ = OWN[name]
    x = draw(*shape).requires_grad_()
    model = above(make, x)
    plain = copy.deepcopy(model.layer)
    rewire.convert(model, "dfa", scale=0.3)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        theirs = dict(plain.named_parameters())
        grads = torch.autograd.grad(plain(x.detach()), list(theirs.values()), model.y.grad)
        for key, expected in zip(theirs, grads, strict=True):
            close(dict(model.layer.named_parameters())[key].grad, expected, key)
        fed = torch.tensordot(e, rewire.feedback(model)["layer"], ([-1], [0]))
        close(model.x.grad, (fed if fed.dim() == x.dim() else fed[:, None]).expand(x.shape), "x")


class Unused(nn.Linear):
    """Never hands its weight to an operation that could be recognised."""

    def forward(self, x):
        return (x[..., None, :] * self.weight).sum(-1) + self.bias


@pytest.mark.parametrize("rule", LOCAL)
def test_a_forward_that_hides_its_weight_cannot_have_a_local_rule(rule):
    x = draw(5, 4).requires_grad_()
    model = above(lambda: Unused(4, 3), x)
    expected = model(x)
    rewire.convert(model, rule)
    with pytest.raises(rewire.PassError) as problem:
        model(x)
    for word in ("Unused", "(3, 4)", "direct rule", "'bp'", "layers="):
        assert word in str(problem.value)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for way_out in ("bp", "dfa"):
        rewire.convert(model, rule, layers={"layer": way_out})
        assert torch.equal(model(x), expected)


def timm_layers():
    try:
        from timm import layers
    except Exception as problem:  # timm needs torchvision, whose kernels must fit the installed PyTorch
        pytest.skip(f"timm cannot be imported: {problem}")
    return {
        "StdConv2d": layers.StdConv2d(3, 4, 3, padding=1),
        "StdConv2dSame": layers.StdConv2dSame(3, 4, 3, stride=2),
        "ScaledStdConv2d": layers.ScaledStdConv2d(3, 4, 3, padding=1),
        "ScaledStdConv2dSame": layers.ScaledStdConv2dSame(3, 4, 3, stride=2),
    }


def standardised(m):
    """timm's formulas: zero mean and unit variance over each filter; the scaled ones times gain and fan-in."""
    mean = m.weight.mean((1, 2, 3), keepdim=True)
    variance = (m.weight - mean).square().mean((1, 2, 3), keepdim=True)
    unit = (m.weight - mean) / (variance + m.eps).sqrt()
    return unit * m.gain * m.scale if hasattr(m, "gain") else unit


def timm_forward(m, x, w):
    if "Same" in type(m).__name__:  # TensorFlow's padding: 5 and 6 with kernel 3, stride 2
        x = F.pad(x, (0, 1, 1, 1))
        return F.conv2d(x, w, m.bias, m.stride)
    return F.conv2d(x, w, m.bias, m.stride, 1)


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_timm(name, rule):
    x = draw(2, 3, 5, 6).requires_grad_()
    model = above(lambda: timm_layers()[name], x)
    with torch.no_grad():
        model.layer.weight.add_(0.2)  # so that standardised signs are others
    plain = copy.deepcopy(model.layer)
    assert (standardised(plain).sign() != plain.weight.sign()).any()
    expected = plain(x)
    close(timm_forward(plain, x, standardised(plain)), expected, "the formulas")
    rewire.convert(model, rule)
    assert torch.equal(model.layer(x), expected)
    check_used_weight(model, plain, x, timm_forward, standardised, rule)
    if rule == "usf":
        B = rewire.feedback(model)["layer"]
        close(B, rewire.scales(model)["layer"] * standardised(plain).sign(), "the feedback reported is the one used")


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_timm_direct(name):
    x = draw(2, 3, 5, 6).requires_grad_()
    model = above(lambda: timm_layers()[name], x)
    plain = copy.deepcopy(model.layer)
    rewire.convert(model, "dfa", scale=0.3)
    out = model(x)
    e = draw(*out.shape, seed=3)
    (out * e).sum().backward()
    grads = torch.autograd.grad(plain(x.detach()), list(plain.parameters()), model.y.grad)
    for p, expected in zip(model.layer.parameters(), grads, strict=True):
        close(p.grad, expected)
    close(model.x.grad, torch.tensordot(e, rewire.feedback(model)["layer"], ([1], [0])))


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "brsf", "dfa"])
def test_spectral_norm_in_training_takes_one_power_step_per_forward(rule):
    x = draw(5, 4).requires_grad_()
    model = above(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), x)
    plain = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rewire.convert(model, rule)
    str(rewire.summary(model))
    for _ in range(3):
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in before.items()), "looking at it changes nothing"
        out, expected = model(x), plain(x)
        assert torch.equal(out, expected)
        before = {k: v.clone() for k, v in plain.state_dict().items()}
        model.zero_grad()
        plain.zero_grad()
        (out * draw(*out.shape, seed=3)).sum().backward()
        delta = model.y.grad
        (grad,) = torch.autograd.grad(plain.y, plain.layer.parametrizations.weight.original, delta)
        close(model.layer.parametrizations.weight.original.grad, grad)
        if rule != "bp":
            assert torch.isfinite(rewire.feedback(model)["layer"]).all()
        rewire.summary(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_norms_by_hook(norm, rule):
    """The old kind: a hook sets ``module.weight`` before each forward."""
    x = draw(5, 4).requires_grad_()

    def make():
        return getattr(torch.nn.utils, norm)(nn.Linear(4, 3))

    layer, plain = seeded(make), seeded(make)
    rewire.convert(layer, rule)
    for _ in range(2):
        y, expected = layer(x), plain(x)
        assert torch.equal(y, expected)
        delta = draw(*y.shape, seed=3)
        ours = torch.autograd.grad(y, list(layer.parameters()), delta)
        for mine, theirs in zip(ours, torch.autograd.grad(expected, list(plain.parameters()), delta), strict=True):
            close(mine, theirs)


# -- sharing, freezing, modules left alone -------------------------------------------------------------


class Loop(nn.Module):
    """ALBERT: one layer several times."""

    def __init__(self, times=3):
        super().__init__()
        self.layer, self.head, self.times = nn.Linear(5, 5), nn.Linear(5, 4), times

    def forward(self, x):
        self.xs = [x]
        for _ in range(self.times):
            self.xs.append(torch.tanh(self.layer(self.xs[-1])))
        return self.head(self.xs[-1])


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_a_layer_used_several_times(rule):
    model = seeded(Loop)
    rewire.convert(model, rule, scale=0.3)
    x = draw(6, 5)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        B = rewire.feedback(model)
        fed = e @ B["head"]  # (n, features) for dfa, the weight's (out, in) otherwise: the same thing here
        dW, hs = torch.zeros(5, 5, dtype=torch.float64), [h.detach() for h in model.xs]
        for h_in, h_out in zip(hs[-2::-1], hs[:0:-1], strict=True):
            delta = fed * (1 - h_out**2)
            dW += delta.T @ h_in
            fed = e @ B["layer"] if rule == "dfa" else delta @ B["layer"]
        close(model.layer.weight.grad, dW)
        close(model.head.weight.grad, e.T @ hs[-1])


class Tied(nn.Module):
    """A language model: the head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        self.h = self.embed(ids)
        self.z = torch.tanh(self.layer(self.h))
        return self.head(self.z)


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_head_tied_to_the_embedding(rule):
    model = seeded(Tied)
    rewire.convert(model, rule, scale=0.3)
    assert model.head.weight is model.embed.weight
    ids = torch.tensor([[0, 3, 3], [6, 1, 2]])
    for _ in range(2):
        model.zero_grad()
        out = model(ids)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        B = rewire.feedback(model)
        delta = (e @ B["head"]) * (1 - model.z.detach() ** 2)
        below = e @ B["layer"] if rule == "dfa" else delta @ B["layer"]
        expected = torch.einsum("nto,nti->oi", e, model.z.detach())
        for place in [(n, t) for n in range(2) for t in range(3)]:
            expected[ids[place]] += below[place]
        close(model.embed.weight.grad, expected)


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_two_linears_sharing_a_parameter(rule):
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)))
    model[2].weight = model[0].weight
    rewire.convert(model, rule, scale=0.3)
    x = draw(6, 5)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        B = rewire.feedback(model)
        with torch.no_grad():
            h1 = torch.tanh(F.linear(x, model[0].weight, model[0].bias))
            h2 = torch.tanh(F.linear(h1, model[2].weight, model[2].bias))
        d2 = (e @ B["4"]) * (1 - h2**2)
        d1 = (e @ B["2"] if rule == "dfa" else d2 @ B["2"]) * (1 - h1**2)
        close(model[0].weight.grad, d2.T @ h1 + d1.T @ x)
        if rule == "fa":
            assert "0" in B and not torch.equal(B["0"], B["2"])  # feedback goes by name


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa", "shallow"])
def test_frozen_layers_hand_back_all_the_same(rule):
    """Frozen in the middle: nothing for itself, its rule's feedback for what is below."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)))
    model[2].requires_grad_(False)
    rewire.convert(model, rule, scale=0.3)
    x = draw(6, 5)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        B = rewire.feedback(model)
        with torch.no_grad():
            h1 = torch.tanh(model[0](x))
            h2 = torch.tanh(model[2](h1))
        if rule == "shallow":
            fed = torch.zeros_like(h1)
        else:
            fed = e @ B["2"] if rule == "dfa" else ((e @ B["4"]) * (1 - h2**2)) @ B["2"]
        close(model[0].weight.grad, (fed * (1 - h1**2)).T @ x)
        assert model[2].weight.grad is None and model[2].bias.grad is None
        close(model[4].weight.grad, e.T @ h2)


LAID_OUT = {
    "expanded": lambda h: h[:, :1].expand(-1, 3, -1),
    "transposed": lambda h: h.transpose(0, 1),
    "every second": lambda h: h[:, ::2],
    "images": lambda h: h[:, None].expand(-1, 2, -1, -1),
}


class Written(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


class OtherLayout(nn.Module):
    """A layer whose input does not lie in memory in the order of its dimensions."""

    def __init__(self, how, bias, kind):
        super().__init__()
        self.how = LAID_OUT[how]
        self.first, self.layer, self.head = nn.Linear(5, 6), kind(6, 7, bias=bias), nn.Linear(7, 4)

    def forward(self, x):
        self.x = self.how(torch.tanh(self.first(x)))
        self.x.retain_grad()
        self.y = self.layer(self.x)
        if self.y.requires_grad:
            self.y.retain_grad()
        return self.head(torch.tanh(self.y))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", LAID_OUT)
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf"])
@pytest.mark.parametrize("frozen", [["layer"], ["layer", "head"], ["head"]], ids=" ".join)
@pytest.mark.parametrize("kind", [nn.Linear, Written])
def test_frozen_layers_of_inputs_laid_out_otherwise(kind, rule, how, bias, frozen):
    """PyTorch's product is another then, which keeps the weight of a frozen layer once for each of a batch."""
    model = rewire.convert(seeded(lambda: OtherLayout(how, bias, kind)), rule, scale=0.3)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    x = draw(4, 3, 5)
    for passes in range(1, 4):
        model.zero_grad()
        out = model(x)
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        B = rewire.feedback(model)
        close(model.x.grad, model.y.grad @ B["layer"])
        close(model.y.grad, (e @ B["head"]) * (1 - torch.tanh(model.y.detach()) ** 2))
        if rule == "brsf":
            assert model.layer._rewire.draws == passes


def test_frozen_below_and_bias_only():
    make = lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 4))  # noqa: E731
    for rule in ("fa", "usf", "dfa"):
        net = seeded(make)
        net[0].requires_grad_(False)
        net[2].weight.requires_grad_(False)
        rewire.convert(net, rule, scale=0.3)
        out = net(draw(4, 2, 5))
        e = draw(*out.shape, seed=3)
        (out * e).sum().backward()
        fed = e @ rewire.feedback(net)["4"]
        close(net[2].bias.grad, fed.reshape(4, 4, 4).sum((0, 2)))
        assert net[0].weight.grad is None and net[2].weight.grad is None


class Mixture(nn.Module):
    """Experts kept in one three-dimensional Parameter, as Mixtral does; and a ParameterList."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 5, 5) / 2)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))])
        self.lower, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.lower(x))
        return self.head(sum(torch.tanh(h @ w) * s for w, s in zip(self.experts, self.scales, strict=True)))


def test_unknown_modules_keep_backprop_and_are_named():
    model = seeded(Mixture)
    rewire.convert(model, "fa")
    rows = {row.name: row for row in rewire.summary(model).rows}
    assert not rows[""].converted and rows[""].rule == "bp" and "Mixture" in rows[""].note
    assert rows["scales"].rule == "bp" and not rows["scales"].converted
    x = draw(6, 5)
    out = model(x)
    e = draw(*out.shape, seed=3)
    (out * e).sum().backward()
    h = torch.tanh(F.linear(x, model.lower.weight, model.lower.bias)).detach().requires_grad_()
    mixed = sum(torch.tanh(h @ w) * s for w, s in zip(model.experts, model.scales, strict=True))
    back = e @ rewire.feedback(model)["head"]
    wanted = torch.autograd.grad(mixed, [h, model.experts, *model.scales], back)
    for ours, expected in zip([model.experts, *model.scales], wanted[1:], strict=True):
        close(ours.grad, expected)
    close(model.lower.weight.grad, (wanted[0] * (1 - h.detach() ** 2)).T @ x)


def test_lazy_modules_must_have_run():
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(rewire.ConversionError, match=r"'0' is lazy.*forward"):
        rewire.convert(model, "fa")
    assert type(model[2]) is nn.Linear
    model(torch.randn(3, 4))
    assert type(model[0]) is nn.Linear
    rewire.convert(model, "fa")
    assert isinstance(model[0], nn.Linear)
    model(torch.randn(3, 4)).sum().backward()


def test_recurrent_and_embedding_are_named_with_their_reason():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "lstm": nn.LSTM(4, 4), "gru": nn.GRU(4, 4), "norm": nn.LayerNorm(4)}
    )
    model["head"] = nn.Linear(4, 2)
    rewire.convert(model, "dfa")
    notes = {row.name: row.note for row in rewire.summary(model).rows if not row.converted}
    assert "recurrent" in notes["lstm"] and "recurrent" in notes["gru"]
    assert "looks rows up" in notes["embed"] and "elementwise" in notes["norm"]


# -- in-place operations on a layer's output -----------------------------------------------------------


class InPlace(nn.Module):
    """lower, then ``layer`` whose output is changed in place (or not), then the head."""

    def __init__(self, lower, layer, head, change):
        super().__init__()
        self.lower, self.layer, self.head, self.change = lower, layer, head, change

    def forward(self, x):
        h = self.change(self.lower(x), None)
        return self.head(self.change(self.layer(h), h))


def relu_(y, h):
    return F.relu(y, inplace=True)


def relu(y, h):
    return F.relu(y)


def add_(y, h):
    y = y if h is None else y.add_(h)
    return torch.tanh(y)


def add(y, h):
    y = y if h is None else y + h
    return torch.tanh(y)


def chain_(y, h):
    y *= 2
    y += 1 if h is None else h
    return y.sigmoid_()


def chain(y, h):
    return torch.sigmoid(2 * y + (1 if h is None else h))


def index_(y, h):
    y[..., 0] = 0.5
    return torch.tanh(y)


def index(y, h):
    keep = torch.ones_like(y)
    keep[..., 0] = 0
    return torch.tanh(torch.where(keep > 0, y, torch.full_like(y, 0.5)))


CHANGES = {"relu": (relu_, relu), "residual": (add_, add), "chain": (chain_, chain), "index": (index_, index)}


def flat_head(features):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 3))


NETS = {
    "linear": (lambda: (nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)), (4, 5)),
    "linear on tokens": (lambda: (nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)), (4, 6, 5)),
    "own forward": (lambda: (Wrapping(5, 5), Wrapping(5, 5), nn.Linear(5, 3)), (4, 5)),
    "own forward on tokens": (lambda: (Wrapping(5, 5), Wrapping(5, 5), nn.Linear(5, 3)), (4, 6, 5)),
    "conv1d": (lambda: (nn.Conv1d(2, 2, 3, 1, 1), nn.Conv1d(2, 2, 3, 1, 1), flat_head(10)), (4, 2, 5)),
    "conv2d": (lambda: (nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1), flat_head(20)), (3, 2, 2, 5)),
    "conv2d, same": (
        lambda: (nn.Conv2d(2, 2, 2, padding="same"), nn.Conv2d(2, 2, 2, padding="same"), flat_head(20)),
        (3, 2, 2, 5),
    ),
    "conv2d, unbatched": (
        lambda: (nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Sequential(nn.Flatten(0), nn.Linear(20, 3))),
        (2, 2, 5),
    ),
    "transposed": (
        lambda: (nn.ConvTranspose2d(2, 2, 3, 1, 1), nn.ConvTranspose2d(2, 2, 3, 1, 1), flat_head(20)),
        (3, 2, 2, 5),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_in_place(rule, name, change):
    make, shape = NETS[name]
    within, without = (seeded(lambda c=c: InPlace(*make(), c)) for c in CHANGES[change])
    scale = "auto" if rule == "bp" else 0.3
    rewire.convert(within, rule, scale=scale)
    rewire.convert(without, rule, scale=scale)
    for step in range(3):
        x = draw(*shape, seed=step)
        outs = [model(x) for model in (within, without)]
        assert torch.equal(*outs)
        e = draw(*outs[0].shape, seed=10 + step)
        for model, out in zip((within, without), outs, strict=True):
            model.zero_grad()
            (out * e).sum().backward()
        for (key, mine), theirs in zip(within.named_parameters(), without.parameters(), strict=True):
            close(mine.grad, theirs.grad, f"{key}, pass {step}")


@pytest.mark.parametrize("rule", RULES)
def test_in_place_on_the_output_itself(rule):
    """The output layer's y is changed in place before the loss sees it."""
    for shape in [(4, 5), (4, 6, 5)]:
        grads = []
        for change in (relu_, relu):
            model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
            rewire.convert(model, rule, scale="auto" if rule == "bp" else 0.3)
            for _ in range(2):
                model.zero_grad()
                change(model(draw(*shape)), None).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for mine, theirs in zip(*grads, strict=True):
            close(mine, theirs)


class Squashed(nn.Linear):
    """Ends in an operation that keeps its own output for backward."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("options", [{"rule": "dfa"}, {"rule": "fa"}, {"rule": "dfa", "blocks": "1"}])
@pytest.mark.parametrize("tokens", [False, True])
def test_in_place_on_an_output_that_the_layer_keeps_for_itself(options, tokens):
    """Refused by PyTorch, and so by the converted model: never a wrong gradient without a word."""
    x = draw(4, 6, 5) if tokens else draw(4, 5)
    for converted in (False, True):
        model = seeded(lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), Squashed(6, 3)))
        if converted:
            rewire.convert(model, scale=0.3, **options)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model(x).mul_(3).square().sum().backward()
            model(x).square().sum().backward()
