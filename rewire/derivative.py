"""Activations with another local derivative in the backward pass (surrogate derivatives)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rewire.errors import PassError
from rewire.swap import STATE

Derivative = Callable[[Tensor], Tensor]


class _Surrogate(Function):
    """a, y = f(a), f' -> y; backward: delta * f'(a)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor, derivative: Derivative) -> Tensor:  # type: ignore[override]
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, ctx.derivative = inputs
        ctx.save_for_backward(a)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        return delta * ctx.derivative(a), None, None


class DerivativeState:
    """The derivative that replaces an activation's own."""

    def __init__(self, name: str, derivative: Derivative) -> None:
        self.name = name
        self.derivative = derivative


@cache
def surrogate_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an activation whose backward multiplies with the derivative it was given."""

    def forward(self: nn.Module, a: Tensor) -> Tensor:
        plain = super(surrogate, self).forward
        if not (torch.is_grad_enabled() and a.requires_grad):
            y: Tensor = plain(a)
            return y
        state: DerivativeState = self.__dict__[STATE]
        with torch.no_grad():
            # An in-place activation would overwrite the a that the derivative is taken at.
            y = plain(a.clone() if getattr(self, "inplace", False) else a.detach())
        if y.shape != a.shape:
            raise PassError(
                f"derivative= is for elementwise activations; {state.name!r} ({base.__name__}) turned "
                f"{tuple(a.shape)} into {tuple(y.shape)}"
            )
        out: Tensor = _Surrogate.apply(a, y, state.derivative)
        return out

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (base,), self.__getstate__()

    body = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "_rewired_from": base,
    }
    surrogate: type[nn.Module] = type(f"Rewired{base.__name__}", (base,), body)
    return surrogate


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = surrogate_class(base)
    return cls.__new__(cls)
