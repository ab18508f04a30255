"""Attention by ``F.multi_head_attention_forward``, as in ``nn.MultiheadAttention``.

Its projections are linear layers, but none of them is called as a module: the function is given their weights. So
the function's own code is run with its linear operations exchanged for calls of the layers they belong to. The
weight ``in_proj_weight`` (or ``q_proj_weight`` and so on) of an ``nn.MultiheadAttention`` is a layer in its own right,
named like the parameter without ``_weight``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rewire.layers.kinds import Kind

FUNCTION = F.multi_head_attention_forward
_PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# The functions in which FUNCTION multiplies inputs by weights.
_INSIDE = ("_in_projection_packed", "_in_projection")


class Projection(Kind):
    """A linear operation whose weight (out, in) is a parameter of an attention: always run as a use of it."""

    title = "projection of an attention"

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.part = parameter.removesuffix("_weight")

    def axis(self, dims: int) -> int:
        return -1


def projections(module: nn.MultiheadAttention) -> dict[str, Projection]:
    """The projections of ``module`` that are no modules of their own, by name."""
    there = [Projection(name) for name in _PARAMETERS if module._parameters.get(name) is not None]
    return {projection.part: projection for projection in there}


def plain(module: nn.Module | None) -> bool:
    """Whether ``module``'s forward is that of ``nn.MultiheadAttention`` itself."""
    own = vars(type(module)).get("_rewired_from", type(module))
    return issubclass(own, nn.MultiheadAttention) and own.forward is nn.MultiheadAttention.forward


@dataclass(frozen=True)
class Seat:
    """How a tensor inside the function, (T, N, E) or (T·N, E), lies in the model around it.

    Attributes:
        length: T of the query, which alone is seen flattened.
        batch: N.
        batched: whether the model's tensors have a batch dimension.
        batch_first: whether it is in front.
    """

    length: int
    batch: int
    batched: bool
    batch_first: bool

    def outer(self, x: Tensor) -> Tensor:
        """x as the model has it, which is what feedback is found for."""
        if x.dim() == 2:
            x = x.view(self.length, self.batch, x.shape[-1])
        if not self.batched:
            return x.squeeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def inner(self, x: Tensor, dims: int) -> Tensor:
        """The inverse of :meth:`outer`, with ``dims`` dimensions."""
        if not self.batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(-1, x.shape[-1]) if dims == 2 else x


# What runs a projection: (function, args, kwargs, seat) -> result.
Operation = Callable[..., Any]


def attend(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], batch_first: bool) -> Any:
    """``F.multi_head_attention_forward(*args, **kwargs)``, with ``operation`` in place of its ``F.linear``.

    Args:
        batch_first: whether the module around the function turned (N, T, E) into the function's (T, N, E).
    """
    query: Tensor = args[0] if args else kwargs["query"]
    batched = query.dim() == 3
    seat = Seat(query.shape[0], query.shape[1] if batched else 1, batched, batch_first)
    token = _under_way.set((operation, seat))
    try:
        return _function()(*args, **kwargs)
    finally:
        _under_way.reset(token)


_under_way: ContextVar[tuple[Operation, Seat]] = ContextVar("rewire_projections")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    operation, seat = _under_way.get()
    return operation(F.linear, (x, weight, bias), {}, seat)


def _function() -> Callable[..., Any]:
    """PyTorch's function, in a namespace where ``linear`` is ours and overrides have been seen to already.

    Made once, and again should somebody have put other functions in the place of those it calls.
    """
    global _made
    functions = vars(F)
    calls = [functions.get(name) for name in _CALLS]
    made, of = _made
    if made is None or calls != of:
        namespace = {**functions, "linear": _linear, "has_torch_function": lambda tensors: False}
        for name in _INSIDE:
            namespace[name] = _in(namespace, functions[name])
        made = _in(namespace, FUNCTION)
        _made = made, calls
    return made


_CALLS = sorted({name for f in (FUNCTION.__name__, *_INSIDE) for name in vars(F)[f].__code__.co_names} & set(vars(F)))
_made: tuple[Callable[..., Any] | None, list[Any]] = (None, [])


def forward_with(function: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.MultiheadAttention.forward``, with ``function`` in the place of ``F.multi_head_attention_forward``."""
    functions = ModuleType("functional")
    vars(functions).update({name: value for name, value in vars(F).items() if not name.startswith("__")})
    vars(functions)[FUNCTION.__name__] = function
    # Without a name the namespace is nobody's but ours, to Dynamo too.
    own = {name: value for name, value in vars(nn.modules.activation).items() if name != "__name__"}
    return _in({**own, "F": functions}, nn.MultiheadAttention.forward)


def _in(namespace: dict[str, Any], function: Any) -> FunctionType:
    """``function``, with other globals."""
    made = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
