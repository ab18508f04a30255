"""Activations with another local derivative in the backward pass (surrogate derivatives)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from rewire import traced
from rewire.errors import PassError
from rewire.state import STATE
from rewire.swap import derive, swap_back, swap_out

# Not annotated in PyTorch.
unpack_dual: Callable[[Tensor], Any] = forward_ad.unpack_dual
make_dual: Callable[..., Tensor] = forward_ad.make_dual

Derivative = Callable[[Tensor], Tensor]


class _Surrogate(Function):
    """a, y = f(a), f' -> y; backward: delta * f'(a)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor, derivative: Derivative) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, ctx.derivative = inputs
        ctx.save_for_backward(a)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        (a,) = ctx.saved_tensors
        return delta * ctx.derivative(a), None, None


class DerivativeState:
    """The derivative that replaces an activation's own."""

    def __init__(self, name: str, derivative: Derivative) -> None:
        self.name = name
        self.derivative = derivative


@contextmanager
def own_derivatives(model: nn.Module) -> Iterator[None]:
    """Activations have their own derivatives inside."""
    found = [m for m in model.modules() if isinstance(m.__dict__.get(STATE), DerivativeState)]
    taken = [(module, swap_out(module)) for module in found]
    try:
        yield
    finally:
        for module, swapped in taken:
            swap_back(module, swapped)


def _only_input(module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that f' is taken at: all that the activation may be called with."""
    given = (*args, *kwargs.values())
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise PassError(
            f"derivative= is for activations of one tensor, f(a); {module.__dict__[STATE].name!r} ({base.__name__}) "
            f"was called with {len(given)} arguments ({', '.join(type(x).__name__ for x in given)}). Put what is f(a) "
            "in it into a module of its own, and give that module's class to derivative="
        )
    return given[0]


_forward_mode: Any = forward_ad  # not annotated in PyTorch
_surrogate: Callable[..., Tensor] = _Surrogate.apply
_classes: dict[type, type[nn.Module]] = {}


def surrogate_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an activation whose backward multiplies with the derivative it was given."""
    if base in _classes:
        return _classes[base]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        a = _only_input(self, base, args, kwargs)
        parent: Any = super(cls, self)
        y: Tensor
        state: DerivativeState
        tangent = _forward_mode.unpack_dual(a).tangent if _forward_mode._current_level >= 0 else None
        if tangent is not None:  # forward mode (rewire.jvp) goes by the same derivative
            state = self.__dict__[STATE]
            primal = _forward_mode.unpack_dual(a).primal
            y = parent.forward(primal.clone() if getattr(self, "inplace", False) else primal)
            y = _forward_mode.make_dual(y, tangent * state.derivative(primal))
            return y
        if not (torch.is_grad_enabled() and a.requires_grad):
            y = parent.forward(a)
            return y
        state = self.__dict__[STATE]
        with torch.no_grad():
            # An in-place activation would overwrite the a that the derivative is taken at.
            y = parent.forward(a.clone() if getattr(self, "inplace", False) else a.detach())
        if y.shape != a.shape:
            raise PassError(
                f"derivative= is for elementwise activations; {state.name!r} ({base.__name__}) turned "
                f"{tuple(a.shape)} into {tuple(y.shape)}"
            )
        return _surrogate(a, y, state.derivative)

    def _slow_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super(cls, self)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not traced.in_jit(self.training)):
            return parent._slow_forward(*args, **kwargs)

    cls = _classes[base] = derive(base, surrogate_class, {"forward": forward, "_slow_forward": _slow_forward})
    return cls
