"""Attention's projections as part of a compiled graph (:mod:`rewire.attention`, :mod:`rewire.traced`).

Dynamo traces ``nn.MultiheadAttention.forward`` up to its call of ``F.multi_head_attention_forward``. There
it takes a function of ours into the graph as it is: PyTorch's own, with its linear operations run as calls of layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rewire import attention, traced
from rewire.attention import Seat
from rewire.errors import PassError
from rewire.ready import parts
from rewire.roles import Role
from rewire.rules.base import DirectRule, LocalRule
from rewire.state import LayerState
from rewire.uses import input_of
from rewire.wiring import conversions

_arguments = inspect.signature(attention.FUNCTION).bind

# Which layer has which weight: the weight's name among the function's arguments, the layer's, its rule as it is written
# (another rule makes another graph), and how many tensors of feedback it is given.
Place = tuple[str, str, str, int]


@dataclass(frozen=True)
class _Owned:
    state: LayerState
    weight: Tensor
    fixed: tuple[Tensor, ...]


def _attended(
    key: int,
    places: tuple[Place, ...],
    batch_first: bool,
    fixed: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``F.multi_head_attention_forward``. ``fixed``: the feedback of its layers, one after the other."""
    wiring = conversions[key]
    bound = _arguments(*args, **kwargs).arguments
    rest = iter(fixed)
    owned = {
        id(bound[weight]): _Owned(wiring.layers[name], bound[weight], tuple(islice(rest, count)))
        for weight, name, _, count in places
    }

    def operation(linear: Any, given: tuple[Any, ...], _: dict[str, Any], seat: Seat) -> Any:
        x, view, bias = given
        layer = owned.get(id(view)) or (owned.get(id(view._base)) if view._is_view() else None)
        if layer is None:
            return linear(x, view, bias)
        return _call(key, layer, view, x, seat, lambda x: linear(x, view, bias))

    return attention.attend(operation, args, kwargs, batch_first)


def _call(
    key: int, layer: _Owned, view: Tensor, x: Tensor, seat: Seat, operation: Callable[[Tensor], Tensor]
) -> Tensor:
    """One call of one projection; as :func:`rewire.traced.call`.

    Args:
        view: the layer's weight, or rows of it.
        x: as the function has it.
    """
    state, weight, fixed = layer.state, layer.weight, layer.fixed
    rule, dims = state.rule, x.dim()
    x = seat.outer(x)
    inputs = [x] if x.requires_grad else []
    tickets: list[Tensor] = []
    index = input_of(state, view, weight, -1)
    if isinstance(rule, DirectRule):
        if inputs:
            tickets = _opened(key, state, index, x, fixed)
        y = operation(seat.inner(x.detach(), dims))
    else:
        y = operation(seat.inner(x, dims))
        if inputs and isinstance(rule, LocalRule):
            rows = None if view is weight else slice(index - 1, index - 1 + len(view))
            y = traced.exchanged(state, y, fixed, weight.detach(), rows)
    if state.joins_traced:
        # The error has to lie as the model around has it: see :func:`rewire.uses.call`.
        return seat.inner(traced.joined(seat.outer(y), key, state.name, len(inputs), *inputs, *tickets), dims)
    return traced.closed(y, key, state.name, len(inputs), *inputs, *tickets) if tickets else y


def _opened(key: int, state: LayerState, index: int, x: Tensor, fixed: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = state.fixed_outputs
    if outputs and index not in state.fixed_inputs:
        raise PassError(f"layer {state.label} has no feedback yet: run one ordinary training step first")
    first = state.fixed_inputs.index(index) if outputs else 0
    before = sum(len(parts(B) or ()) for B in state.fixed_as[: first * len(outputs)])
    walls = (state.wiring.skip == "cut" and not x.is_leaf,)
    return traced.opened(key, state.name, state.written, outputs, walls, x, *fixed[before:], first=first)


@functools.cache
def register() -> None:
    """Tell Dynamo about it, as :func:`rewire.traced.register` does."""
    allow: Callable[..., Any] = torch.compiler.allow_in_graph
    allow(_attended)


# -- traced by Dynamo ----------------------------------------------------------------------------------

# The attentions whose forward is being traced, innermost last: what :func:`_attended` is to be told of each.
_inside: list[tuple[int, tuple[Place, ...], bool, list[Tensor]]] = []


def _function(*args: Any, **kwargs: Any) -> Any:
    """In the place of ``F.multi_head_attention_forward``."""
    return _attended(*_inside[-1], args, kwargs)


_forward = attention.forward_with(_function)


def call(
    module: nn.MultiheadAttention,
    states: list[LayerState],
    output: LayerState | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The forward of an attention, as part of a compiled graph.

    Args:
        states: of its own projections.
        output: of its output projection, a child.
    """
    layers = [(state.kind.parameter, state) for state in states]
    if output is not None:
        layers.append(("out_proj_weight", output))
    places = tuple([(weight, state.name, state.written, len(state.fixed)) for weight, state in layers])
    for _, state in layers:
        if state.role is Role.OUTPUT:
            state.wiring.errors = {}  # a compiled pass notes none, and that of an earlier pass is not its
    fixed = [t for _, state in layers for t in state.fixed]
    _inside.append((layers[0][1].wiring.key, places, module.batch_first, fixed))
    try:
        return _forward(module, *args, **kwargs)
    finally:
        _inside.pop()
