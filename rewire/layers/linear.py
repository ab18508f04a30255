"""Linear layers: ``nn.Linear``, and those that keep their weight transposed (transformers' ``Conv1D``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewire import operations
from rewire.exchange import exchange, exchangeable
from rewire.layers.form import Form
from rewire.layers.kinds import BackwardWeight, Kind


class Linear(Kind):
    """x (*, in), W (out, in) -> y (*, out)."""

    title = "linear"
    exchanges = True

    def axis(self, dims: int) -> int:
        return -1

    def operate(self, module: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return F.linear(x, weight, bias)

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
        weight = backward.stand_in(self.weight(module))
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return operations.linear(x, weight, bias, backward.random(weight), backward.combine, backward.keep)


class TransposedLinear(Linear):
    """x (*, in), W (in, out) -> y (*, out)."""

    transposed = True

    def form(self, module: nn.Module) -> Form:
        return Form(tuple(self.look(module).shape), turned=True)

    def operate(self, module: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        bias: Any = module.bias
        rows: Tensor = torch.addmm(bias, x.view(-1, x.size(-1)), weight)  # as transformers' Conv1D does
        return rows.view(*x.shape[:-1], weight.shape[1])

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
        weight = backward.stand_in(self.weight(module))
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        random = backward.random(weight)

        def combine(w: Tensor | None, r: Tensor | None) -> Tensor:
            return backward.combine(None if w is None else w.t(), None if r is None else r.t()).t()

        flipped = None if random is None else random.t()
        return operations.linear(x, weight.t(), bias, flipped, combine, backward.keep)
