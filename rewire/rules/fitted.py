"""Feedback fitted to exact gradients, from training passes themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from rewire.errors import ConversionError
from rewire.feedback import standard_normal
from rewire.rules import jacobian
from rewire.rules.base import LearnedDirect, Rows, register_rule
from rewire.rules.least_squares import least_squares
from rewire.structures import Structure

BY = ("gradients", "jvp")


@register_rule("fitted")
class Fitted(LearnedDirect):
    """``B e``, B being the ridge least-squares map from output errors to exact gradients.

    Every ``every``-th training pass is an *anchor*: handed back exactly, it shows errors E and exact gradients G.
    B minimises ``|E B - G|² + ridge |B|²`` over the anchors so far, older ones weighing ``decay`` less each time::

        S <- decay S + EᵀE,  R <- decay R + EᵀG,  B = (S + ridge diag(S))⁻¹ R

    With ``context`` = r, the feedback looks at the layer's own input x as well. With c = x P, P random and fixed, G is
    fitted to e ⊗ [1, c] in place of e: each number of c adds a B of its own. A convolution's C is the same at all
    positions, and fitted to what B leaves over.

    Args:
        every: passes from one round of anchors to the next.
        probe: samples (rows of e) that a round takes in, over as many passes as that needs; None: those of one pass.
        decay: weight of what earlier anchors showed, 0 (only the newest counts) to 1 (all alike).
        ridge: relative to the diagonal of EᵀE.
        cap: B's norm is at most ``cap`` times that of the first fit that was not zero, 0 for no cap. Without one
            feedback and weights can drive each other up under SGD with momentum.
        context: r, how many numbers of the layer's own input the feedback looks at.
        by: ``"gradients"``: as described. ``"jvp"``: no pass is handed back exactly (but the first, for the scale),
            and there is no backward in fitting: every ``every``-th pass a forward-mode probe (:mod:`rewire.jvp`) of
            ``probe`` samples shows what random tangents at the input of one layer, each in its turn, become at the
            output, and B takes a least-squares step towards that (:mod:`rewire.rules.jacobian`). Without context.
        sketch: an error with more outputs than this is first summed up into so many numbers, each output under a random
            sign into a random one of them (count sketch).
        layout, feedback: see :class:`~rewire.rules.base.DirectRule`. With feedback of low rank, B = P Q, all of this is
            about e P and Q; with sparse feedback the columns of B minimise the above among those with the same zeros;
            with shared feedback they become those of one matrix (:mod:`rewire.agree`), small enough for every layer's
            cap, and each layer keeps the C that it fitted.
    """

    source = "rewire"

    def __init__(
        self,
        *,
        every: int = 5,
        probe: int | None = None,
        decay: float = 0.8,
        ridge: float = 0.01,
        cap: float = 10.0,
        context: int = 0,
        sketch: int = 512,
        by: str = "gradients",
        layout: str | None = None,
        feedback: str | Structure | None = None,
    ) -> None:
        super().__init__(layout=layout, feedback=feedback)
        _check("every", every, whole=True, least=1)
        _check("context", context, whole=True, least=0)
        _check("sketch", sketch, whole=True, least=1)
        _check("decay", decay, least=0, most=1)
        _check("ridge", ridge, least=0)
        _check("cap", cap, least=0)
        if probe is not None:
            _check("probe", probe, whole=True, least=1)
        self.every = every
        self.probe = probe
        self.decay = decay
        self.ridge = ridge
        self.cap = cap
        self.context = context
        self.sketch = sketch
        if by not in BY:
            raise ConversionError(f"fitted: by is {' or '.join(map(repr, BY))}, not {by!r}")
        if by == "jvp" and context:
            raise ConversionError("fitted: by='jvp' fits no context, whose part differs from sample to sample")
        self.by = by
        self.probes = by == "jvp"
        self.samples = probe

    def exact(self, passes: int, sampled: int) -> bool:
        return self.by == "gradients" and (passes % self.every == 0 or 0 < sampled < (self.probe or 0))

    def probe_number(self, passes: int) -> int | None:
        return None if passes % self.every else passes // self.every

    def observe(self, rows: Rows, B: Tensor) -> dict[str, Tensor]:
        return jacobian.residual(rows, B)

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        n = error.shape[axis]
        if n <= self.sketch:
            return error
        place, sign = _buckets(n, self.sketch)
        signed = error.movedim(axis, -1) * sign.to(device=error.device, dtype=error.dtype)
        summed = signed.new_zeros(*signed.shape[:-1], self.sketch)
        return summed.index_add_(-1, place.to(error.device), signed).movedim(-1, axis)

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        assert rows.exact is not None
        whole = rows.exact if rows.wide is None else rows.wide
        run, places = rows.run, len(rows.exact) // max(len(rows.e), 1)
        e = rows.e if self.probe is None else rows.e[: self.probe]
        N = len(e)
        G = whole[: N * run].reshape(N, run, whole.shape[1])
        sums: dict[str, Tensor] = {}
        if rows.seen is None or rows.wide is not None:
            sums["S"], sums["R"] = e.T @ e * run, e.T @ (G[:, 0] if run == 1 else G.sum(1))
        if rows.seen is None:
            return sums
        c = rows.seen[: N * places].reshape(N, places, -1)
        if rows.wide is None:
            c = torch.cat([c.new_ones(N, places, 1), c], 2)
        else:
            # What B leaves over, by a fit to this pass alone: the C of all anchors is not known here.
            left = G - (e @ least_squares(self._ridged(sums["S"]), sums["R"], rows.mask()))[:, None]
            features = rows.exact.shape[1]
            G = left.reshape(N, run, features, -1).transpose(2, 3).reshape(N, places, features)
        return sums | _normal_equations(e, c, G)

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        if self.by == "jvp":
            return jacobian.corrected(B, sums) if "wrong" in sums else B
        mask = sums.get("mask")
        for what, new in sums.items():
            if what not in ("samples", "mask"):
                memory[what] = memory[what] * self.decay + new if what in memory else new
        parts: list[Tensor] = []
        if "S" in memory:
            parts.append(least_squares(self._ridged(memory["S"]), memory["R"], mask))
            mask = None  # C is the same at all positions, where B has entries at one and not at another
        if "T" in memory:
            T, Q = memory["T"], memory["Q"]
            each = None if mask is None else mask.repeat_interleave(len(T) // len(B), 0)
            both = least_squares(self._ridged(T), Q, each).reshape(len(B), -1, Q.shape[1])
            parts += [both] if parts else [both[:, 0], both[:, 1:]]
        norm = parts[0].norm() if len(parts) == 1 else torch.stack([part.norm() for part in parts]).norm()
        # A fit of zeros, as an output layer that starts at zero gives, is no measure of those to come.
        first = torch.where(memory["first"] > 0, memory["first"], norm) if "first" in memory else norm
        memory["first"] = first
        # max() keeps a fit of zeros from being divided by; where there is nothing to cap the factor is one.
        factor = torch.clamp(self.cap * first / norm.clamp_min(torch.finfo(norm.dtype).tiny), max=1)
        if self.cap:
            parts = [part * factor for part in parts]
        if len(parts) > 1:
            memory["C"] = parts[1].contiguous()
        return parts[0]

    def remembers(self, n: int, features: int, elements: int | None) -> dict[str, tuple[int, ...]]:
        if self.by == "jvp":
            return {}
        shapes: dict[str, tuple[int, ...]] = {"first": ()}
        if not self.context or elements is not None:
            shapes |= {"S": (n, n), "R": (n, elements or features)}
        if self.context:
            each = n * (self.context if elements is not None else 1 + self.context)
            shapes |= {"T": (each, each), "Q": (each, features), "C": (n, self.context, features)}
        return shapes

    def largest(self, memory: Mapping[str, Tensor]) -> Tensor | None:
        first = memory.get("first")
        return torch.where(first > 0, self.cap * first, math.inf) if self.cap and first is not None else None

    def _ridged(self, S: Tensor) -> Tensor:
        """Normal equations that can be solved: an error of a softmax sums to zero, so EᵀE alone is singular."""
        diagonal = S.diagonal()
        floor = diagonal.mean() * 1e-2 * self.ridge + torch.finfo(S.dtype).tiny
        ridged = S.clone()
        ridged.diagonal().add_(diagonal * self.ridge + floor)
        return ridged


def _normal_equations(e: Tensor, c: Tensor, G: Tensor) -> dict[str, Tensor]:
    """Those of G fitted to e ⊗ c, without that product ever made.

    Args:
        e: (N, n). c: (N, run, r). G: (N, run, features).

    Returns:
        ``T`` (n r, n r) and ``Q`` (n r, features).
    """
    (N, n), r, features = e.shape, c.shape[2], G.shape[2]
    cc = torch.bmm(c.transpose(1, 2), c).reshape(N, r * r)
    ee = (e[:, :, None] * e[:, None, :]).reshape(N, n * n)
    T = (ee.T @ cc).reshape(n, n, r, r).permute(0, 2, 1, 3).reshape(n * r, n * r)
    Q = (e.T @ torch.bmm(c.transpose(1, 2), G).reshape(N, r * features)).reshape(n * r, features)
    return {"T": T, "Q": Q}


@lru_cache(maxsize=8)
def _buckets(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Place (n,) and sign (n,) of each output in a count sketch; the same everywhere."""
    drawn = standard_normal((2, n), seed=0, name="rewire:sketch")
    return drawn[0].argsort().remainder(size), drawn[1].sign()


def _check(
    option: str, value: object, *, whole: bool = False, least: float | None = None, most: float | None = None
) -> None:
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if right and not isinstance(value, bool):
        number = float(value)  # type: ignore[arg-type]
        if (least is None or number >= least) and number <= (sys.float_info.max if most is None else most):
            return
    kind = "an int" if whole else "a number"
    bounds = f" from {least:g}" + (f" to {most:g}" if most is not None else " on") if least is not None else ""
    raise ConversionError(f"fitted: {option} is {kind}{bounds}, not {value!r}")
