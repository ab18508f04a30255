"""Changing what a module's forward does by changing its class, in place, as parametrizations do.

Everything else about the object stays: parameters, buffers, hooks, attributes, identity. The new class is
a subclass of the old one, so ``isinstance`` holds, and setting the old class again undoes it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from rewire.run import run
from rewire.wiring import LayerState

STATE = "_rewire"  # in the module's __dict__: not a parameter, buffer or submodule


@cache
def rewired_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward runs under a rule. One per class, made when first needed."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = super(rewired, self).forward
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            return _outside_of_compile(self.__dict__[STATE], self, plain, args, kwargs)
        return run(self.__dict__[STATE], self, plain, args, kwargs)

    def extra_repr(self: nn.Module) -> str:
        plain: str = super(rewired, self).extra_repr()
        rule = f"rule={self.__dict__[STATE].rule!r}"
        return f"{plain}, {rule}" if plain else rule

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickles name the class it was made from.
        return _empty, (base,), self.__getstate__()

    body = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "extra_repr": extra_repr,
        "_rewired_from": base,
    }
    rewired: type[nn.Module] = type(f"Rewired{base.__name__}", (base,), body)
    return rewired


# Each layer is a graph break: what is left on the autograd graph cannot be traced.
_outside_of_compile = torch.compiler.disable(run)


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = rewired_class(base)
    return cls.__new__(cls)


def swap_in(module: nn.Module, cls: type[nn.Module], state: object) -> None:
    """Give ``module`` the class ``cls``, with its state."""
    module.__dict__[STATE] = state
    module.__class__ = cls


def swap_out(module: nn.Module) -> None:
    """Give ``module`` the class it had before. No trace is left."""
    module.__class__ = type(module)._rewired_from  # type: ignore[attr-defined]
    module.__dict__.pop(STATE, None)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's own class is one of ours, so that :func:`swap_out` applies."""
    return "_rewired_from" in vars(type(module))


def state_of(module: nn.Module) -> LayerState | None:
    """The state of a converted layer, or None. Sees through classes put on top of ours."""
    state = module.__dict__.get(STATE)
    return state if isinstance(state, LayerState) else None
