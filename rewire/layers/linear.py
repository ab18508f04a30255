"""Linear layers: ``nn.Linear``, and those that keep their weight transposed (transformers' ``Conv1D``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rewire import operations
from rewire.exchange import exchange, exchangeable
from rewire.layers.kinds import BackwardWeight, Kind


class Linear(Kind):
    """x (*, in), W (out, in) -> y (*, out)."""

    title = "linear"
    exchanges = True

    def axis(self, dims: int) -> int:
        return -1

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if exchangeable():
            y: Tensor = forward(module, *args, **kwargs)
            if not x.requires_grad or exchange(y, backward, transposed=self.transposed):
                return y
        weight = self.weight(module)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return operations.linear(x, weight, bias, backward.random(weight), backward.combine, backward.keep)


class TransposedLinear(Linear):
    """x (*, in), W (in, out) -> y (*, out)."""

    transposed = True

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if exchangeable():
            y: Tensor = forward(module, *args, **kwargs)
            if not x.requires_grad or exchange(y, backward, transposed=self.transposed):
                return y
        weight = self.weight(module)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        random = backward.random(weight)

        def combine(w: Tensor | None, r: Tensor | None) -> Tensor:
            return backward.combine(None if w is None else w.t(), None if r is None else r.t()).t()

        flipped = None if random is None else random.t()
        return operations.linear(x, weight.t(), bias, flipped, combine, backward.keep)
