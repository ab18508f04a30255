"""Convolutions of every shape under a local and a direct rule, against NumPy (Hypothesis)."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rewire

from ..reference import networks
from ..rules.checks import assert_close, parameters, used_feedback

BOUNDED = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
MAX_POSITIONS = 250  # of any grid: the reference is slow on purpose


def per_dim(draw, low, highs):
    """An int for all dimensions, or a tuple; at most highs[i] in dimension i."""
    if draw(st.booleans()):
        return draw(st.integers(low, min(highs)))
    return tuple(draw(st.integers(low, high)) for high in highs)


def spread(value, n):
    return (value,) * n if isinstance(value, int) else value


@st.composite
def conv_layer(draw, n, space, channels=None):
    """A convolution that fits an input of ``space``, and the size of its output."""
    groups = draw(st.integers(1, 3)) if channels is None else draw(st.sampled_from(divisors(channels)))
    c_in = groups * draw(st.integers(1, 2)) if channels is None else channels
    c_out = groups * draw(st.integers(1, 2))
    make = draw(st.sampled_from([plain_conv, transposed_conv]))
    return draw(make(n, space, c_in, c_out, groups, draw(st.booleans())))


@st.composite
def plain_conv(draw, n, space, c_in, c_out, groups, bias):
    dims, widest = range(n), 3 if n < 3 else 2
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    # torch pads by no more than there is to copy
    most = [{"circular": space[i], "reflect": space[i] - 1}.get(mode, 2) for i in dims]
    dilation = per_dim(draw, 1, [2] * n)
    d = spread(dilation, n)
    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    if padding == "same":
        stride = 1
        kernel = per_dim(draw, 1, [min(widest, 2 * most[i] // d[i] + 1) for i in dims])
        totals = [d[i] * (k - 1) for i, k in enumerate(spread(kernel, n))]
    else:
        stride = per_dim(draw, 1, [widest] * n)
        if padding == "numbers":
            padding = per_dim(draw, 0, [min(most[i], widest - 1) for i in dims])
        totals = [2 * p for p in spread(0 if padding == "valid" else padding, n)]
        kernel = per_dim(draw, 1, [min(widest, (space[i] + totals[i] - 1) // d[i] + 1) for i in dims])
    make = getattr(nn, f"Conv{n}d")
    module = make(c_in, c_out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    k, s = spread(kernel, n), spread(stride, n)
    return module, tuple((space[i] + totals[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in dims)


@st.composite
def transposed_conv(draw, n, space, c_in, c_out, groups, bias):
    dims, widest = range(n), 3 if n < 3 else 2
    kernel, stride = per_dim(draw, 1, [widest] * n), per_dim(draw, 1, [widest] * n)
    dilation = per_dim(draw, 1, [2] * n)
    k, s, d = spread(kernel, n), spread(stride, n), spread(dilation, n)
    full = [(space[i] - 1) * s[i] + d[i] * (k[i] - 1) + 1 for i in dims]
    padding = per_dim(draw, 0, [min(1, (full[i] - 1) // 2) for i in dims])
    extra = per_dim(draw, 0, [max(s[i], d[i]) - 1 for i in dims])
    make = getattr(nn, f"ConvTranspose{n}d")
    module = make(c_in, c_out, kernel, stride, padding, extra, groups, bias, dilation)
    p, o = spread(padding, n), spread(extra, n)
    return module, tuple(full[i] - 2 * p[i] + o[i] for i in dims)


def divisors(c):
    return [g for g in (1, 2, 3) if c % g == 0]


def small(made):
    return math.prod(made[1]) <= MAX_POSITIONS


@st.composite
def chains(draw, n):
    """A conv, tanh, conv, flatten, linear chain in float64, and an input for it."""
    space = tuple(draw(st.integers(1, {1: 9, 2: 5, 3: 3}[n])) for _ in range(n))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**20)))
        first, middle = draw(conv_layer(n, space).filter(small))
        second, end = draw(conv_layer(n, middle, first.out_channels).filter(small))
        features = second.out_channels * math.prod(end)
        model = nn.Sequential(
            OrderedDict(conv=first, tanh=nn.Tanh(), conv2=second, flat=nn.Flatten(), head=nn.Linear(features, 3))
        ).double()
        x = torch.randn(draw(st.integers(1, 3)), first.in_channels, *space, dtype=torch.float64)
    return model, x


def mirror(model):
    network = networks.mirror(model)
    assert network.layers == ["conv", "conv2", "head"]
    return network


def check(model, x, rule, passes=1, **options):
    plain, network = copy.deepcopy(model), mirror(model)
    rewire.convert(model, rule, scale=0.5, **options)
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        before = plain(x)
        for _ in range(passes):
            model.zero_grad()
            x.grad = None
            y = model(x)
            y.square().sum().backward()
    assert torch.equal(before, y), "the forward changed"
    feedback = used_feedback(model)
    expected = network.run(x.detach().numpy(), parameters(model), networks.sum_of_squares, None, rule, feedback)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected.grads[name], name, tol=1e-10 * max(1, np.abs(expected.grads[name]).max()))
    assert set(feedback) == {"conv", "conv2", "head"}
    assert_close(x.grad, expected.x, "input", tol=1e-10 * max(1, np.abs(expected.x).max()))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_chain_of_convolutions(rule, n):
    @BOUNDED
    @given(chains(n))
    def holds(case):
        check(*case, rule)

    holds()


@BOUNDED
@given(st.integers(1, 3).flatmap(chains))
def test_channel_feedback(case):
    check(*case, "dfa", feedback="channel")


@BOUNDED
@given(st.integers(1, 3).flatmap(chains), st.sampled_from(["usf", "frsf", "brsf", "sdfa"]), st.integers(1, 2))
def test_other_rules(case, rule, passes):
    check(*case, rule, passes)


@BOUNDED
@given(
    n=st.integers(1, 3),
    transposed=st.booleans(),
    data=st.data(),
)
def test_an_input_without_a_batch_dimension(n, transposed, data):
    """torch's convolutions take (C, *space) as well; it is a batch of one."""
    make = getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")
    with torch.random.fork_rng():
        torch.manual_seed(data.draw(st.integers(0, 2**20)))
        model = nn.Sequential(
            make(2, 3, 2, stride=data.draw(st.integers(1, 2))),
            nn.Tanh(),
            make(3, 2, data.draw(st.integers(1, 2))),
        ).double()
        x = torch.randn(2, *(3,) * n, dtype=torch.float64)
    if len(model[0](x)[0]) < model[2].kernel_size[0]:
        return
    batched = copy.deepcopy(model)
    for m, data_in in ((model, x), (batched, x[None])):
        rewire.convert(m, "fa", scale=0.5)
        m(data_in).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), batched.parameters(), strict=True):
        assert_close(p.grad, q.grad.numpy(), name)
