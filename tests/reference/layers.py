"""Linear, convolution and transposed convolution, forward and backward, in NumPy.

A layer is described by its hyperparameters alone; weights are arguments. Each layer has

    forward(x, W, b)            -> y
    backward(x, delta, B)       -> (handed, dW, db)

where ``delta`` is the loss gradient at y and ``B`` is the weight used on the way back (B = W is ordinary
backprop). ``dW`` and ``db`` never depend on B. All arrays are float64 and carry a batch dimension.

Convolutions are written as a list of *taps*: for every kernel offset, the pairs (input position, output
position) that the offset connects. Padding is part of that list, as the source index a padded position is
read from, so the gradient finds its way back through it without further code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b over the last dimension; W is (out, in)."""

    def forward(self, x, W, b=None):
        y = np.zeros((*x.shape[:-1], W.shape[0]))
        for o in range(W.shape[0]):
            y[..., o] = (x * W[o]).sum(-1) + (0.0 if b is None else b[o])
        return y

    def backward(self, x, delta, B):
        handed = np.zeros(x.shape)
        dW = np.zeros(B.shape)
        for o in range(B.shape[0]):
            handed += delta[..., o, None] * B[o]
            dW[o] = (delta[..., o, None] * x).reshape(-1, x.shape[-1]).sum(0)
        db = delta.reshape(-1, B.shape[0]).sum(0)
        return handed, dW, db


def _source(q: int, length: int, mode: str) -> int | None:
    """Where position q of a padded axis (q < 0 is left of the data) is read from; None is a zero."""
    if 0 <= q < length:
        return q
    if mode == "zeros":
        return None
    if mode == "circular":
        return q % length
    if mode == "replicate":
        return 0 if q < 0 else length - 1
    if mode == "reflect":
        return -q if q < 0 else 2 * (length - 1) - q
    raise ValueError(mode)


def _flat(axes: list[dict[int, int]], big: tuple[int, ...], small: tuple[int, ...]):
    """All combinations of per-axis pairs {small position: big position}, as two arrays of flat indices."""
    pairs = list(product(*[a.items() for a in axes]))
    smalls = [np.ravel_multi_index([p[0] for p in combo], small) for combo in pairs]
    bigs = [np.ravel_multi_index([p[1] for p in combo], big) for combo in pairs]
    return np.array(bigs, dtype=int), np.array(smalls, dtype=int)


@dataclass(frozen=True)
class Conv:
    """y[o, p] = Σ_{c,k} W[o, c, k] x̃[c, p·stride + k·dilation] + b[o], x̃ the padded x.

    W is (out, in / groups, *kernel). ``padding`` is "same", "valid" or one number per dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def _pads(self, kernel):
        if self.padding == "valid":
            return [(0, 0) for _ in kernel]
        if self.padding == "same":  # an odd total puts the extra position on the right
            totals = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            return [(t // 2, t - t // 2) for t in totals]
        return [(p, p) for p in self.padding]

    def out_space(self, space, kernel):
        out = []
        for i, (left, right) in enumerate(self._pads(kernel)):
            reach = self.dilation[i] * (kernel[i] - 1) + 1
            out.append((space[i] + left + right - reach) // self.stride[i] + 1)
        return tuple(out)

    def _taps(self, space, kernel):
        """For every kernel offset: (offset, input positions, output positions)."""
        out = self.out_space(space, kernel)
        pads = self._pads(kernel)
        for offset in product(*map(range, kernel)):
            axes: list[dict[int, int]] = []
            for i, k in enumerate(offset):
                pairs = {}
                for p in range(out[i]):
                    q = p * self.stride[i] + k * self.dilation[i] - pads[i][0]
                    source = _source(q, space[i], self.padding_mode)
                    if source is not None:
                        pairs[p] = source
                axes.append(pairs)
            yield offset, *_flat(axes, big=space, small=out)

    def _group(self, g, c_in, c_out):
        i, o = c_in // self.groups, c_out // self.groups
        return range(g * i, (g + 1) * i), range(g * o, (g + 1) * o)

    def forward(self, x, W, b=None):
        n, c_in, *space = x.shape
        c_out, _, *kernel = W.shape
        out = self.out_space(space, kernel)
        xf = x.reshape(n, c_in, -1)
        y = np.zeros((n, c_out, int(np.prod(out))))
        for offset, at_in, at_out in self._taps(tuple(space), kernel):
            for g in range(self.groups):
                ins, outs = self._group(g, c_in, c_out)
                for o in outs:
                    for j, c in enumerate(ins):
                        y[:, o, at_out] += W[(o, j, *offset)] * xf[:, c, at_in]
        if b is not None:
            y += b[None, :, None]
        return y.reshape(n, c_out, *out)

    def backward(self, x, delta, B):
        n, c_in, *space = x.shape
        c_out, _, *kernel = B.shape
        xf, df = x.reshape(n, c_in, -1), delta.reshape(n, c_out, -1)
        handed, dW = np.zeros(xf.shape), np.zeros(B.shape)
        for offset, at_in, at_out in self._taps(tuple(space), kernel):
            for g in range(self.groups):
                ins, outs = self._group(g, c_in, c_out)
                for o in outs:
                    for j, c in enumerate(ins):
                        back = B[(o, j, *offset)] * df[:, o, at_out]
                        # add.at: padding may read one position several times
                        np.add.at(handed, (slice(None), c, at_in), back)
                        dW[(o, j, *offset)] += (df[:, o, at_out] * xf[:, c, at_in]).sum()
        return handed.reshape(x.shape), dW, df.sum((0, 2))


@dataclass(frozen=True)
class ConvTranspose:
    """y[o, p·stride + k·dilation − padding] += W[c, o, k] x[c, p], then + b[o].

    W is (in, out / groups, *kernel).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int = 1

    def out_space(self, space, kernel):
        return tuple(
            (space[i] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (kernel[i] - 1)
            + self.output_padding[i]
            + 1
            for i in range(len(kernel))
        )

    def _taps(self, space, kernel):
        """For every kernel offset: (offset, output positions, input positions)."""
        out = self.out_space(space, kernel)
        for offset in product(*map(range, kernel)):
            axes: list[dict[int, int]] = []
            for i, k in enumerate(offset):
                pairs = {}
                for p in range(space[i]):
                    q = p * self.stride[i] + k * self.dilation[i] - self.padding[i]
                    if 0 <= q < out[i]:
                        pairs[p] = q
                axes.append(pairs)
            yield offset, *_flat(axes, big=out, small=space)

    def _channels(self, c_in, c_out_per_group):
        """(input channel, output channel, index of the output channel in W) for all connected channels."""
        i = c_in // self.groups
        for c in range(c_in):
            for j in range(c_out_per_group):
                yield c, (c // i) * c_out_per_group + j, j

    def forward(self, x, W, b=None):
        n, c_in, *space = x.shape
        _, per_group, *kernel = W.shape
        out = self.out_space(space, kernel)
        xf = x.reshape(n, c_in, -1)
        y = np.zeros((n, per_group * self.groups, int(np.prod(out))))
        for offset, at_out, at_in in self._taps(tuple(space), kernel):
            for c, o, j in self._channels(c_in, per_group):
                y[:, o, at_out] += W[(c, j, *offset)] * xf[:, c, at_in]
        if b is not None:
            y += b[None, :, None]
        return y.reshape(n, -1, *out)

    def backward(self, x, delta, B):
        n, c_in, *space = x.shape
        _, per_group, *kernel = B.shape
        xf, df = x.reshape(n, c_in, -1), delta.reshape(n, delta.shape[1], -1)
        handed, dW = np.zeros(xf.shape), np.zeros(B.shape)
        for offset, at_out, at_in in self._taps(tuple(space), kernel):
            for c, o, j in self._channels(c_in, per_group):
                handed[:, c, at_in] += B[(c, j, *offset)] * df[:, o, at_out]
                dW[(c, j, *offset)] += (df[:, o, at_out] * xf[:, c, at_in]).sum()
        return handed.reshape(x.shape), dW, df.sum((0, 2))


def describe(module: Any) -> Linear | Conv | ConvTranspose:
    """The reference layer with the hyperparameters of a torch module."""
    kind = type(module).__mro__
    names = {cls.__name__ for cls in kind}
    if "Linear" in names:
        return Linear()
    if "_ConvTransposeNd" in names:
        return ConvTranspose(module.stride, module.padding, module.dilation, module.output_padding, module.groups)
    if "_ConvNd" in names:
        return Conv(module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    raise TypeError(f"no reference for {module}")
