"""GrAPE: direct feedback turned towards the Jacobian, which forward-mode derivatives estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.rules.base import LearnedDirect, Rows, register_rule
from rewire.structures import Structure


@register_rule("grape")
class Grape(LearnedDirect):
    """``B e``, with B turned towards an estimate of J."""

    source = "Caillon et al. 2026, ICLR, openreview kasbbmwk3s"
    probes = True

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
        self.every = every
        self.lr = lr
        self.anchor = anchor
        self.together = together
        self.samples = samples

    def exact(self, passes: int) -> bool:
        return bool(self.anchor) and passes % self.anchor == 0

    def probe(self, passes: int) -> int | None:
        return None if passes % self.every else passes // self.every

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error

    def observe(self, rows: Rows, B: Tensor) -> dict[str, Tensor]:
        return {"J": rows.e.T @ rows.summed()}

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        """Of an anchor: how large the gradient is (``G``), and how large the feedback of a B with orthonormal rows."""
        assert rows.exact is not None
        return {"S": rows.e.T @ rows.e * rows.run, "G": rows.exact.square().sum()}

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        if "J" in sums:
            J, size = sums["J"], B.norm()
            if bool(torch.isfinite(J).all()) and bool(J.norm() > 0) and bool(size > 0):
                J, unit = J / J.norm(), B / size
                unit = unit + self.lr * (J - (J * unit).sum() * unit)
                B = unit * (size / unit.norm())
        if "S" in sums:
            fed = ((sums["S"] @ B) * B).sum()  # the sum of squares of e B over the anchor's rows
            ratio = (sums["G"] / fed).sqrt()
            if bool(torch.isfinite(ratio)) and bool(ratio > 0):
                B = B * ratio
        return B
