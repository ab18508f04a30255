"""What the tests of passes and of whole modules share: the equations of a tanh MLP, in plain tensor operations.

Nothing here uses autograd for what it is to check: errors at an output come from the loss alone, and every
gradient below is written out.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

import rewire

TOL = 1e-10
SCALE = 0.3


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(make, *args, seed=0, **kwargs):
    """``make(...)`` with weights from ``seed``, in float64; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **kwargs).double()


def chain(*widths):
    """Linear, Tanh, Linear, Tanh, ..., Linear; the linear layers are called 0, 2, 4, ..."""
    modules = []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def mlp(widths=(5, 7, 6, 4), seed=0):
    return seeded(chain, *widths, seed=seed)


def weights(model):
    """[(name, W, b)] of all linear layers, in order, detached copies."""
    return [
        (name, m.weight.detach().clone(), m.bias.detach().clone())
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]


def error(loss_of, y):
    """dL/dy of a scalar function of one output."""
    y = y.detach().clone().requires_grad_()
    (e,) = torch.autograd.grad(loss_of(y), y)
    return e


def cross_entropy(labels):
    return lambda y: F.cross_entropy(y, labels)


def states(layers, x):
    """Inputs of every layer and the output: [x, h1, h2, ..., y] with h = tanh(W h + b)."""
    h = [x.detach()]
    for _, W, b in layers[:-1]:
        h.append(torch.tanh(h[-1] @ W.T + b))
    _, W, b = layers[-1]
    return [*h, h[-1] @ W.T + b]


def chain_gradients(layers, x, delta, hand_back, extra=None, prefix=""):
    """Gradients of a tanh MLP's parameters, and of x as "x".

    Args:
        layers: ``[(name, W, b)]``.
        delta: gradient at the output of the last layer.
        hand_back: (name, delta at that layer's output) -> gradient of its input.
        extra: gradients that come to h_i from elsewhere, by i (h_0 = x).
    """
    h = states(layers, x)
    found = {}
    for i in reversed(range(len(layers))):
        name, _, _ = layers[i]
        found[f"{prefix}{name}.weight"] = delta.T @ h[i]
        found[f"{prefix}{name}.bias"] = delta.sum(0)
        back = hand_back(name, delta) + (extra or {}).get(i, 0.0)
        delta = back * (1 - h[i] ** 2)
    found["x"] = back
    return found


def rule_gradients(rule, layers, x, e, feedback, extra=None, prefix=""):
    """:func:`chain_gradients` under ``dfa``, ``fa`` or ``bp``, with feedback by (prefixed) layer name."""
    W = {name: W for name, W, _ in layers}
    # A layer with nothing to hand back has no feedback.
    none = torch.zeros(())
    ways = {
        "dfa": lambda name, delta: e @ feedback[prefix + name] if prefix + name in feedback else none,
        "fa": lambda name, delta: delta @ feedback[prefix + name] if prefix + name in feedback else none,
        "bp": lambda name, delta: delta @ W[name],
    }
    return chain_gradients(layers, x, e, ways[rule], extra, prefix)


def add(*all_gradients):
    total = {}
    for gradients in all_gradients:
        for name, g in gradients.items():
            if name != "x":
                total[name] = total.get(name, 0.0) + g
    return total


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def check(model, expected, tol=TOL):
    """Every parameter's ``.grad`` is as expected; parameters that are not mentioned must have none, or zero."""
    for name, p in model.named_parameters():
        if name in expected:
            assert p.grad is not None, f"{name} has no gradient"
            same(p.grad, expected[name], name, tol)
        else:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient"
    unknown = set(expected) - {n for n, _ in model.named_parameters()} - {"x"}
    assert not unknown, unknown


def same(ours, expected, what="", tol=TOL):
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    off = (ours.detach() - expected.detach()).abs().max().item() if ours.numel() else 0.0
    assert off <= tol, f"{what}: off by {off}"


def settled(model, x, loss_of, passes=2):
    """Run whole training passes first, so that roles and scales are known; gradients are dropped."""
    for _ in range(passes):
        loss_of(model(x)).backward()
    model.zero_grad()
    return model


def converted(rule="dfa", widths=(5, 7, 6, 4), seed=0, **options):
    return rewire.convert(mlp(widths, seed), rule, scale=options.pop("scale", SCALE), **options)
