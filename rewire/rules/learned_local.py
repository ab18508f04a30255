"""Local rules whose backward weight learns: ``B^T delta`` with a B that comes to resemble the weight.

Equations are written for the matrix form of a weight, W (outputs, inputs): a convolution's kernel is flattened to
(out, in / groups x k). ``dW`` is the weight's own gradient, delta x^T. None of the rules reads W in a backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rewire.errors import ConversionError
from rewire.layers.form import Form
from rewire.rules.base import Draw, LearnedLocal, register_rule


@register_rule("kp")
class KP(LearnedLocal):
    """Kolen-Pollack: B gets the weight's own gradient, dB = dW, and both decay in the user's optimizer.

    Then W - B only decays. B starts at ``fa``'s R. See docs/rules/kp.md.
    """

    source = "Akrout et al. 2019, arXiv:1904.05391; Kolen & Pollack 1994"
    trained = ("B",)

    def start(self, form: Form, scale: float, draw: Draw) -> dict[str, Tensor]:
        return {"B": draw.normal("B", form.shape) * scale}

    def feedback(self, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        return kept["B"]

    def follow(self, gradient: Tensor, kept: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
        return {"B": gradient}

    def gap(self, weight: Tensor, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        return weight - kept["B"]


@register_rule("wm")
class WM(LearnedLocal):
    """Weight mirror: for noise xi at the layer's input, B follows (W xi) xi^T.

    One mirror step: ``B <- (1 - rate) B + rate (W Xi)(Xi)^T / samples``, Xi being N(0, 1). B starts at ``fa``'s R.
    See docs/rules/wm.md.

    Args:
        every: a mirror step before every that many passes; 0: only by :func:`rewire.mirror`.
        samples: noise vectors in a step.
        rate: of a step; also how much of B decays.
    """

    source = "Akrout et al. 2019, arXiv:1904.05391"

    def __init__(self, *, every: int = 1, samples: int = 64, rate: float = 0.01) -> None:
        _number("wm", "every", every, least=0)
        _number("wm", "samples", samples, least=1)
        _fraction("wm", "rate", rate)
        self.every: int = every
        self.samples = samples
        self.rate = rate

    def start(self, form: Form, scale: float, draw: Draw) -> dict[str, Tensor]:
        return {"B": draw.normal("B", form.shape) * scale}

    def feedback(self, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        return kept["B"]

    def mirror(
        self, weight: Tensor, kept: Mapping[str, Tensor], form: Form, noise: Callable[[int], Tensor]
    ) -> dict[str, Tensor]:
        xi = noise(self.samples)
        response = xi @ form.matrix(weight.to(xi.dtype)).t()
        follows = form.weight(response.t() @ xi / self.samples)
        return {"B": torch.lerp(kept["B"].to(xi.dtype), follows, self.rate)}


@register_rule("ldfa")
class LDFA(LearnedLocal):
    """Low-dimensional feedback: ``Q (P delta)``, with r numbers in between.

    P follows the subspace of the deltas by Oja's rule, ``P <- P + rate P C (1 - P^T P)``, C being their second moments
    divided by their trace. Q gets the gradient (P dW)^T and decays with the weight, as ``kp``'s B does. See
    docs/rules/ldfa.md.

    Args:
        rank: r; a layer with fewer outputs has as many as it has outputs.
        rate: of Oja's rule.
        align: Q follows the weight; otherwise it stays as it was drawn.
    """

    source = "Hanut & Kadmon 2025, arXiv:2502.20580"
    watches = True

    def __init__(self, *, rank: int = 32, rate: float = 0.1, align: bool = True) -> None:
        _number("ldfa", "rank", rank, least=1)
        _fraction("ldfa", "rate", rate)
        _flag("ldfa", "align", align)
        self.rank = rank
        self.rate = rate
        self.align = align
        self.trained = ("Q",) if align else ()

    def start(self, form: Form, scale: float, draw: Draw) -> dict[str, Tensor]:
        r = min(self.rank, form.rows)
        return {
            "P": draw.orthogonal("P", (r, form.rows)),
            "Q": draw.normal("Q", (form.columns, r)) * (scale * math.sqrt(form.rows / r)),
        }

    def feedback(self, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        Q = kept["Q"]
        return form.weight((Q @ kept["P"].to(Q.dtype)).t())

    def follow(self, gradient: Tensor, kept: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
        return {"Q": (kept["P"].to(gradient.dtype) @ form.matrix(gradient)).t()}

    def gather(self, delta: Tensor, kept: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        P = kept["P"].to(delta.dtype)
        whole = delta.new_zeros(P.shape)
        whole[:, rows] = (delta @ P[:, rows].t()).t() @ delta
        return {"PC": whole, "power": delta.square().sum()}

    def learn(self, kept: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        P, power = kept["P"], sums["power"]
        PC = sums["PC"].to(P.dtype) / power.to(P.dtype)
        moved = P + self.rate * (PC - (PC @ P.t()) @ P)
        # Deltas that are zero, or not finite (usual for the first steps under a gradient scaler), teach nothing.
        return {"P": torch.where(moved.isfinite().all(), moved, P)}


@register_rule("pfa")
class PFA(LearnedLocal):
    """Product feedback: ``(A R)^T delta``, A (outputs, m) random and fixed, R (m, inputs) learned.

    R gets the gradient A^T dW and decays with the weight: it comes to A^T W, and A R to A A^T W, A A^T being about
    (``orthogonal``: exactly) the identity. See docs/rules/pfa.md.

    Args:
        expand: m is that many times the number of outputs.
        orthogonal: A has orthonormal rows instead of N(0, 1/m) entries; ``expand`` 1 is enough then.
    """

    source = "Li Ji-An & Benna 2024, arXiv:2405.20594, PMC11160852"
    trained = ("R",)

    def __init__(self, *, expand: int = 10, orthogonal: bool = False) -> None:
        _number("pfa", "expand", expand, least=1)
        _flag("pfa", "orthogonal", orthogonal)
        self.expand = expand
        self.orthogonal = orthogonal

    def start(self, form: Form, scale: float, draw: Draw) -> dict[str, Tensor]:
        shape = form.rows, self.expand * form.rows
        A = draw.orthogonal("A", shape) if self.orthogonal else draw.normal("A", shape) / math.sqrt(shape[1])
        return {"A": A, "R": draw.normal("R", (shape[1], form.columns)) * scale}  # A R has entries of size s

    def feedback(self, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        R = kept["R"]
        return form.weight(kept["A"].to(R.dtype) @ R)

    def follow(self, gradient: Tensor, kept: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
        return {"R": kept["A"].to(gradient.dtype).t() @ form.matrix(gradient)}

    def gap(self, weight: Tensor, kept: Mapping[str, Tensor], form: Form) -> Tensor:
        return kept["A"].to(weight.dtype).t() @ form.matrix(weight) - kept["R"]


def _number(rule: str, option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConversionError(f"{rule}: {option} is a whole number of at least {least}, not {value!r}")


def _fraction(rule: str, option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConversionError(f"{rule}: {option} is a number above 0 and at most 1, not {value!r}")


def _flag(rule: str, option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConversionError(f"{rule}: {option} is True or False, not {value!r}")
