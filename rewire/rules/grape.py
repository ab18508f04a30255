"""GrAPE: direct feedback turned towards the Jacobian, which forward-mode derivatives estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.errors import ConversionError
from rewire.rules.base import LearnedDirect, Rows, register_rule
from rewire.structures import Structure


@register_rule("grape")
class Grape(LearnedDirect):
    """``B e``. B is turned towards J, the Jacobian from layer input to output, by gradient ascent on their cosine.

    A probe (:mod:`rewire.jvp`) gives a rank-1 estimate ``J' = u v^T`` from each sample, u = J v being what a random
    tangent v at the layer's input becomes at the output; J' is the mean over the probe's samples. Then, with B^ and J^
    of norm 1 and c = <B^, J^>, B goes along the gradient of c, ``B^ + lr (J^ - c B^)``, and keeps its norm.

    An anchor is a pass that is handed back exactly, as under backprop; B takes the size of backprop's gradient there.

    Args:
        every: passes from one probe to the next. A probe is a forward with tangents and without a graph.
        lr: how far B turns by a probe.
        anchor: passes from one anchor to the next, the first of all being one; 0: none.
        together: all layers get tangents in the same probe: each is updated more often, from an estimate that has the
            tangents of the others as noise. Else one layer in each probe, in turn.
        samples: how many samples of the batch a probe takes; None: all.
        layout: see :class:`~rewire.rules.base.DirectRule`.
        feedback: see :class:`~rewire.rules.base.DirectRule`.

    Raises:
        ConversionError: for a number that cannot be.
    """

    source = "Caillon et al. 2026, ICLR, openreview kasbbmwk3s"
    probes = True
    keeps_norm = True

    def __init__(
        self,
        *,
        every: int = 1,
        lr: float = 0.2,
        anchor: int = 100,
        together: bool = False,
        samples: int | None = None,
        layout: str | None = None,
        feedback: str | Structure | None = None,
    ) -> None:
        super().__init__(layout=layout, feedback=feedback)
        for name, value, least in (("every", every, 1), ("anchor", anchor, 0), ("samples", samples, 1)):
            if value is None and name == "samples":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConversionError(f"grape: {name} is a whole number, {least} or more, not {value!r}")
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 <= lr <= 1:
            raise ConversionError(f"grape: lr is a number from 0 to 1, not {lr!r}")
        if not isinstance(together, bool):
            raise ConversionError(f"grape: together is True or False, not {together!r}")
        self.every = every
        self.lr = lr
        self.anchor = anchor
        self.together = together
        self.samples = samples

    def exact(self, passes: int, sampled: int) -> bool:
        return self.anchor > 0 and passes % self.anchor == 0

    def probe_number(self, passes: int) -> int | None:
        return None if passes % self.every else passes // self.every

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error

    def observe(self, rows: Rows, B: Tensor) -> dict[str, Tensor]:
        return {"J": rows.e.T @ rows.summed()}

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        assert rows.exact is not None
        return {"ee": rows.e.T @ rows.e * rows.run, "gg": rows.exact.square().sum()}

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        if "J" in sums:
            B = _turned(B, sums["J"] * sums.get("mask", 1), self.lr)
        if "ee" in sums:
            fed = ((sums["ee"] @ B) * B).sum()  # sum of the squares of e B over the anchor's rows
            ratio = (sums["gg"] / fed).sqrt()
            if bool(torch.isfinite(ratio)) and bool(ratio > 0):
                B = B * ratio
        return B


def _turned(B: Tensor, J: Tensor, lr: float) -> Tensor:
    """B a step towards J, of the norm it had."""
    size, other = B.norm(), J.norm()
    if not (bool(torch.isfinite(other)) and bool(other > 0) and bool(size > 0)):
        return B  # no tangent has arrived, or a number has run over
    unit, towards = B / size, J / other
    unit = unit + lr * (towards - (towards * unit).sum() * unit)
    turned: Tensor = unit * (size / unit.norm())
    return turned
