"""Feedback fitted to exact gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire.rules.base import LearnedDirect, Rows, register_rule
from rewire.structures import Structure


@register_rule("fitted")
class Fitted(LearnedDirect):
    """``B e`` with B the ridge least-squares map from output errors to exact gradients."""

    def __init__(
        self,
        *,
        every: int = 20,
        decay: float = 0.8,
        ridge: float = 0.01,
        cap: float | None = None,
        context: int = 0,
        layout: str | None = None,
        feedback: str | Structure | None = None,
    ) -> None:
        super().__init__(layout=layout, feedback=feedback)
        self.every = every
        self.decay = decay
        self.ridge = ridge
        self.cap = cap
        self.context = context

    def exact(self, passes: int) -> bool:
        return passes % self.every == 0

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        assert rows.exact is not None
        e, run = rows.e, len(rows.exact) // max(len(rows.e), 1)
        features = rows.exact.shape[1]
        if rows.seen is None:
            if rows.wide is not None:
                return {"S": e.T @ e, "R": e.T @ rows.wide}
            return {"S": e.T @ e * run, "R": e.T @ rows.exact.reshape(len(e), run, features).sum(1)}
        sums: dict[str, Tensor] = {}
        if rows.wide is not None:
            sums = {"S": e.T @ e, "R": e.T @ rows.wide}
            # what is left to the context is what this pass's own fit leaves over
            fit = torch.linalg.solve(_ridged(sums["S"], self.ridge), sums["R"])
            left = rows.wide - e @ fit
            G = left.reshape(len(e), features, run).transpose(1, 2)
            c = rows.seen.reshape(len(e), run, -1)
        else:
            G = rows.exact.reshape(len(e), run, features)
            c = rows.seen.reshape(len(e), run, -1)
            c = torch.cat([c.new_ones(len(e), run, 1), c], 2)
        n, r = e.shape[1], c.shape[2]
        cc = torch.bmm(c.transpose(1, 2), c).reshape(len(e), r * r)
        ee = (e[:, :, None] * e[:, None, :]).reshape(len(e), n * n)
        sums["T"] = (ee.T @ cc).reshape(n, n, r, r).permute(0, 2, 1, 3).reshape(n * r, n * r)
        cg = torch.bmm(c.transpose(1, 2), G).reshape(len(e), r * features)
        sums["Q"] = (e.T @ cg).reshape(n * r, features)
        return sums

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        for what, new in sums.items():
            if what != "samples":
                memory[what] = memory[what] * self.decay + new if what in memory else new
        n = len(B)
        if "S" in memory:
            B = torch.linalg.solve(_ridged(memory["S"], self.ridge), memory["R"])
        if "T" in memory:
            A = torch.linalg.solve(_ridged(memory["T"], self.ridge), memory["Q"])
            A = A.reshape(n, -1, A.shape[1])
            if "S" not in memory:
                B, A = A[:, 0], A[:, 1:]
            memory["C"] = A.contiguous()
        return B


def _ridged(S: Tensor, ridge: float) -> Tensor:
    """Normal equations with ``ridge`` times their own diagonal added."""
    d = S.diagonal()
    return S + torch.diag(d * ridge + d.mean() * ridge * 1e-2 + torch.finfo(S.dtype).tiny)
