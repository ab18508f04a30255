"""Direct Kolen-Pollack: direct feedback that learns what the layers above do, from x and e alone."""

from __future__ import annotations

import math

from torch import Tensor

from rewire.errors import ConversionError
from rewire.rules.base import LearnedDirect, Rows, register_rule
from rewire.structures import Structure


@register_rule("dkp")
class DKP(LearnedDirect):
    """``B e``, with ``B <- B - lr (x e^T / u + decay B)`` after each pass, summed over its samples.

    It is the change that gradient descent would make to a weight that leads straight from the layer's input x to the
    output, so B comes to estimate the path between them. At the last hidden layer this is Kolen-Pollack learning.

    Args:
        lr: learning rate of B, which no optimizer knows of.
        decay: of B, as an optimizer's weight decay: by ``lr * decay`` in each pass.
        normalise: u is the sum of the norms of all samples' e in the first pass that B learns from, so that neither the
            loss's scale nor its reduction over the batch matters (for a mean softmax cross-entropy u is about 1).
            False: u = 1, as published.
        layout: see :class:`~rewire.rules.base.DirectRule`.
        feedback: see :class:`~rewire.rules.base.DirectRule`.

    Raises:
        ConversionError: for a number that cannot be.
    """

    source = "Webster, Choi and Ahn 2021, openreview zgGmAx9ZcY"
    watches = True

    def __init__(
        self,
        *,
        lr: float = 0.05,
        decay: float = 0.1,
        normalise: bool = True,
        layout: str | None = None,
        feedback: str | Structure | None = None,
    ) -> None:
        super().__init__(layout=layout, feedback=feedback)
        for name, value in {"lr": lr, "decay": decay}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConversionError(f"dkp: {name} is a number, 0 or more, not {value!r}")
        if not isinstance(normalise, bool):
            raise ConversionError(f"dkp: normalise is True or False, not {normalise!r}")
        self.lr = lr
        self.decay = decay
        self.normalise = normalise

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        return {"G": rows.e.T @ rows.summed(), "size": rows.e.norm(dim=1).sum()}

    def remembers(self, n: int, features: int, elements: int | None) -> dict[str, tuple[int, ...]]:
        return {"unit": ()} if self.normalise else {}

    def learn(self, B: Tensor, memory: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
        G, size = sums["G"], sums["size"]
        if self.normalise:
            if "unit" not in memory:
                if not bool(size > 0):
                    return B
                memory["unit"] = size.clone()
            G = G / memory["unit"]
        return B - self.lr * (G + self.decay * B)
