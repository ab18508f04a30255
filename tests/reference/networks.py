"""Chains of layers, their losses, and the gradients every rule gives, in NumPy.

The equations, for a layer with input x, output y = op(x, W) + b and loss gradient δ at y:

    ∂W, ∂b        exact given δ, for every rule
    handed to x:
      bp          opᵀ(δ; W)
      fa          opᵀ(δ; B)                B = R, fixed
      usf         opᵀ(δ; B)                B = s·sign(W)
      frsf, brsf  opᵀ(δ; B)                B = |R|∘sign(W)
      dfa         e B                      e = ∂L/∂y at the output layer
      sdfa        sign(e) B
      drtp        y* B                     y* the one-hot target
      shallow     0

Non-linearities multiply what they are handed by their own derivative, so the layer below a tanh at
activation a gets δ = (e B) ⊙ (1 − tanh²(a)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .layers import Conv, ConvTranspose, Linear, describe

LOCAL = ("bp", "fa", "usf", "brsf", "frsf")
DIRECT = ("dfa", "sdfa", "drtp", "shallow")
RULES = LOCAL + DIRECT


class Tanh:
    def forward(self, x):
        return np.tanh(x)

    def backward(self, x, delta):
        return delta * (1 - np.tanh(x) ** 2)


class Flatten:
    def forward(self, x):
        return x.reshape(len(x), -1)

    def backward(self, x, delta):
        return delta.reshape(x.shape)


# losses: (y, target) -> (loss, e = ∂loss/∂y)


def cross_entropy(y, target):
    """Mean over the batch of −log softmax(y)[target]; targets are class indices or one-hot rows."""
    p = np.exp(y - y.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    t = one_hot(target, y.shape[1])
    return float(-(t * np.log(p)).sum() / len(y)), (p - t) / len(y)


def mse(y, target):
    """Mean over all entries of (y − target)²."""
    return float(((y - target) ** 2).mean()), 2 * (y - target) / y.size


def sum_of_squares(y, target=None):
    return float((y**2).sum()), 2 * y


def one_hot(target, n):
    target = np.asarray(target)
    if target.ndim == 2:
        return target.astype(float)
    t = np.zeros((len(target), n))
    for i, k in enumerate(target):
        t[i, k] = 1.0
    return t


def direct_feedback(signal, B, shape):
    """signal (N, n) times B (n, *shape without batch); B (n, C) gives every position its channel's value."""
    n = B.shape[0]
    flat = np.zeros((len(signal), B[0].size))
    for i in range(n):
        flat += signal[:, i, None] * B[i].reshape(1, -1)
    if B.shape[1:] == tuple(shape[1:]):
        return flat.reshape(shape)
    if B.ndim == 2 and len(shape) > 2 and B.shape[1] == shape[1]:
        per_channel = flat.reshape(len(signal), B.shape[1], *[1] * (len(shape) - 2))
        return per_channel * np.ones(shape)
    raise AssertionError(f"feedback of shape {B.shape} does not fit an input of shape {tuple(shape)}")


@dataclass
class Result:
    loss: float
    y: np.ndarray
    e: np.ndarray
    grads: dict[str, np.ndarray] = field(default_factory=dict)  # "<layer>.weight", "<layer>.bias"
    handed: dict[str, np.ndarray] = field(default_factory=dict)  # layer -> what it handed to its input
    deltas: dict[str, np.ndarray] = field(default_factory=dict)  # layer -> δ at its output
    x: np.ndarray | None = None  # gradient that reached the network's input


class Network:
    """A chain of (name, op); ops are reference layers, Tanh or Flatten."""

    def __init__(self, ops):
        self.ops = list(ops)
        self.layers = [n for n, op in self.ops if isinstance(op, Linear | Conv | ConvTranspose)]

    def forward(self, x, params):
        values = [x]
        for name, op in self.ops:
            if name in self.layers:
                values.append(op.forward(values[-1], params[f"{name}.weight"], params.get(f"{name}.bias")))
            else:
                values.append(op.forward(values[-1]))
        return values

    def run(self, x, params, loss, target=None, rule="bp", feedback=None, labels=None) -> Result:
        """Loss and gradients under ``rule`` (a name, or layer name -> name).

        ``feedback``: layer name -> B. The first layer needs none unless the input's gradient is asked
        for; without one, the result's ``x`` is None. ``labels``: y* for drtp when it is not ``target``.
        """
        feedback = feedback or {}
        values = self.forward(x, params)
        value, e = loss(values[-1], target)
        result = Result(value, values[-1], e)
        delta: np.ndarray | None = e
        for (name, op), x_in in zip(reversed(self.ops), reversed(values[:-1]), strict=True):
            if name not in self.layers:
                delta = None if delta is None else op.backward(x_in, delta)
                continue
            rule_here = rule.get(name, "bp") if isinstance(rule, Mapping) else rule
            W = params[f"{name}.weight"]
            first = name == self.layers[0]
            exact, dW, db = op.backward(x_in, delta, W)
            result.deltas[name] = delta
            result.grads[f"{name}.weight"] = dW
            if f"{name}.bias" in params:
                result.grads[f"{name}.bias"] = db
            if rule_here == "bp":
                handed = exact
            elif rule_here == "shallow":
                handed = np.zeros(x_in.shape)
            elif first and name not in feedback:
                handed = None
            elif rule_here in LOCAL:
                B = feedback[name]
                assert B.shape == W.shape, f"{name}: feedback {B.shape} for a weight {W.shape}"
                handed = op.backward(x_in, delta, B)[0]
            else:
                if rule_here == "dfa":
                    signal = e
                elif rule_here == "sdfa":
                    signal = np.sign(e)
                elif rule_here == "drtp":
                    signal = one_hot(target if labels is None else labels, e.shape[1])
                else:
                    raise ValueError(rule_here)
                handed = direct_feedback(signal, feedback[name], x_in.shape)
            if handed is not None:
                result.handed[name] = handed
            delta = handed
        result.x = delta
        return result


def mirror(sequential) -> Network:
    """The reference network of a torch nn.Sequential, under the same layer names."""
    ops = []
    for name, module in sequential.named_children():
        kind = type(module).__name__
        if kind == "Tanh":
            ops.append((name, Tanh()))
        elif kind == "Flatten":
            ops.append((name, Flatten()))
        else:
            ops.append((name, describe(module)))
    return Network(ops)


def mlp() -> Network:
    """Linear, tanh, linear, tanh, linear, under nn.Sequential's names."""
    return Network([("0", Linear()), ("1", Tanh()), ("2", Linear()), ("3", Tanh()), ("4", Linear())])


def cnn() -> Network:
    """conv (stride 2, padding 1, groups 2), tanh, conv, tanh, flatten, linear."""
    return Network(
        [
            ("0", Conv(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)),
            ("1", Tanh()),
            ("2", Conv(stride=(1, 1), padding=(0, 0), dilation=(1, 1))),
            ("3", Tanh()),
            ("4", Flatten()),
            ("5", Linear()),
        ]
    )
