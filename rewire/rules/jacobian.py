"""Feedback fitted to what forward-mode probes show, without any backward.

A probe (:mod:`rewire.jvp`) gives tangents v at a layer's input and u = J v at the output. B is to be the mean of J over
samples and positions, which is the least-squares map from v to u. Its normal equations have as many unknowns as the
layer has inputs, squared; so B takes one step of gradient descent per probe instead, from what it gets wrong. What it
already explains of u is no noise then, and B settles as J does.
"""

from __future__ import annotations

from torch import Tensor

from rewire.rules.base import Rows


def residual(rows: Rows, B: Tensor) -> dict[str, Tensor]:
    """What B (n, features) gets wrong in one probe, to be summed up: for :meth:`LearnedDirect.observe`."""
    v = rows.summed()
    wrong = rows.e - v @ B.T
    return {"wrong": wrong.T @ v / rows.run, "probed": v.new_full((), len(v))}


def corrected(B: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """B after a step, for :meth:`LearnedDirect.learn`.

    The step N / (N + features) is the largest that N Gaussian tangents allow without their noise growing: on average
    B + (J - B) N / (N + features).
    """
    return B + sums["wrong"] / (sums["probed"] + B.shape[1])
