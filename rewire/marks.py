"""What a call leaves on the graph: a mark at its output, which an output layer joins to the pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire.bypass import direct_uses
from rewire.edges import Handed, alias, guard, join, port
from rewire.nodes import Node
from rewire.passes import (
    Call,
    OutputError,
    backward_id,
    call_sources,
    leave,
    upstream,
)
from rewire.picks import Pick
from rewire.roles import Role
from rewire.rows import errors_below
from rewire.state import LayerState
from rewire.streaming import stream_of, streaming
from rewire.targets import current_targets


def finish(
    state: LayerState,
    output: Any,
    sources: Sequence[Node],
    tickets: Sequence[Tensor],
    errors: list[OutputError],
    ports: int,
    pick: Pick | None = None,
) -> Any:
    """Leave the call on the graph; join the output to the pass unless the layer is known to be hidden."""
    call = Call(state, sources, tickets, errors, ports)
    call.pick = None if pick is None else pick.above()
    if state.start is None and backward_id() == -1:
        state.note_start(output)
    joins = state.joins
    return mark(state, call, output, joins) if isinstance(output, Tensor) else mark_all(state, call, output, joins)


def mark_all(state: LayerState, call: Call, output: Any, joins: bool) -> Any:
    """:func:`mark` for each tensor in what a block returns."""
    leaves, spec = tree_flatten(output)
    tensors = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and (y.is_floating_point() or y.requires_grad)]
    if call.ports and not call.tickets:  # probes: what is made of the inputs needs a gradient, whatever is frozen
        state.made_of_inputs = frozenset(i for i in tensors if leaves[i].requires_grad)
    for i in tensors:
        y = leaves[i]
        ties = call.tickets and (state.made_of_inputs is None or i in state.made_of_inputs)
        if y.requires_grad or ties:
            leaves[i] = mark(state, call, y, joins)
    return tree_unflatten(leaves, spec)


def mark(state: LayerState, call: Call, y: Tensor, joins: bool) -> Tensor:
    """Leave ``call`` at its output, joined to the pass if it ``joins``; returns what takes the output's place."""
    if joins:
        y = joined(state, call, y)
    elif call.tickets and not y.requires_grad:
        y = join(y, None, [], *call.tickets)  # frozen: keeps the graph in one piece
    elif y._is_view():
        # An in-place operation on a view would replace its graph node, and the call left there with it.
        y = alias(y)
    node = y.grad_fn
    if node is not None:
        leave(node, call)
        if (call.tickets or call.mirrored is not None) and not joins:
            # Some microseconds in each call: a layer that no error can reach must not go unnoticed, not once.
            guard(y, node, call)
    return y


def joined(state: LayerState, call: Call, y: Tensor) -> Tensor:
    """The output of an output layer: every port upstream, its own included, will wait for its gradient."""
    stream = None if streaming.get() is None else stream_of(state)
    if stream is not None and not stream.joins:
        return alias(y) if y._is_view() else y  # as what joins return: no view
    wiring = state.wiring
    wiring.errors.pop(state.name, None)  # the newest pass has no error yet
    error = OutputError(state, state.kind.axis(y.dim()), current_targets())
    error.pick = call.pick
    if state.role is Role.UNKNOWN:
        wiring.bypassed.update(direct_uses(call.sources, call_sources))
    feeders = upstream(call.sources, wiring)
    others = errors_below(call, error, y) if wiring.pours or not wiring.looked else {}
    tickets: list[Tensor] = []
    handed: list[Handed] = []
    inputs: list[Tensor] = []
    shape, dtype = y.shape, y.dtype
    error.nested = backward_id() != -1
    plain = state.role is Role.OUTPUT and call.pick is None and len(shape) == 2
    rows, features = shape if plain else (0, 0)
    for feeder in (call, *feeders):
        arrives = others.get(feeder, error) if others else error
        feeder.errors.append(arrives)
        if feeder is not call:  # another output of the same call is beside it
            for lower in feeder.own:
                lower.above.append(error)
        if feeder.mirrored is not None:
            x, at, rule, B = feeder.mirrored
            if plain and arrives is error and dtype is B.dtype and at[0] == rows and len(B) == features:
                inputs.append(x)
                handed.append((feeder, at, rule, B))
            else:  # not the output that B is for, or not with an error for each row of x
                tickets.append(port(x, (feeder.state, rule, [arrives], 0, None, None, None)))
                error.ports += 1
            continue
        tickets.extend(feeder.tickets)
        error.ports += feeder.ports
    if not y.requires_grad and not tickets and not inputs:
        return y
    call.own = (*call.own, error)
    call.feeders = feeders
    out = join(y, error, handed, *tickets, *inputs)
    if stream is not None:
        stream.joined(error, out)
    return out


def sources_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Node]:
    """Graph nodes of a layer's inputs."""
    inputs = [*args, *kwargs.values()]
    if not all(isinstance(x, Tensor) for x in inputs):  # a block may take anything
        inputs = tree_flatten(inputs)[0]
    return [x.grad_fn for x in inputs if isinstance(x, Tensor) and x.grad_fn is not None]
