"""One call of one converted layer: where x is cut, and what is left on the graph.

Under ``bp`` the operation runs as it is, under a local rule with another backward weight, and under a direct rule in
:func:`_direct`, cut off from its input. All end in :func:`finish`, which joins the output to the pass if the
layer is, or may be, an output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rewire.edges import Wall, port, probe, wall_at
from rewire.errors import PassError
from rewire.kernels import fastest
from rewire.layers.kinds import Forward, Kind
from rewire.learning import look
from rewire.local_weights import local_weight
from rewire.marks import finish, sources_of
from rewire.passes import OutputError, backward_id
from rewire.roles import Role
from rewire.rows import is_new, note_rows, refuse_picks
from rewire.rules.base import DirectRule, LearnedLocal, LocalRule
from rewire.state import LayerState
from rewire.streaming import stream_of, streaming
from rewire.transforms import transformed, transformed_output

# Looked up once: these run in every call of every layer.


_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def run(
    state: LayerState,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: Kind | None = None,
    index: int = 0,
) -> Any:
    """Run ``forward`` (unbound, the original class's) under the layer's rule. Gradients are on.

    Args:
        kind: how a local rule runs it, if not as the layer's kind does: for a use of its weight by another module.
        index: number of the (first) input, for layers with several.
    """
    if not state.watched:
        output = _run(state, module, forward, args, kwargs, kind or state.kind, index)
    else:
        # What watches for uses of the weight elsewhere must not take the layer itself for one.
        me = get_ident()
        if me in state.busy:
            return forward(module, *args, **kwargs)
        state.busy.add(me)
        try:
            output = _run(state, module, forward, args, kwargs, kind or state.kind, index)
        finally:
            state.busy.discard(me)
    if state.wiring.guard is not None:
        state.wiring.guard.watch(state, output)
    return output


def _run(
    state: LayerState,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: Kind,
    index: int,
) -> Any:
    if state.wiring.unsettled and backward_id() == -1:
        state.wiring.settle()
    state.ran = True
    if state.unseen:  # so its forward is how its weight is used
        state.lost, state.unseen = "", False
    if not _takes_part(module, args, kwargs) and (streaming.get() is None or not _was_cut(state, args, kwargs)):
        return idle(state, forward(module, *args, **kwargs))
    if state.idle:
        state.wake()
    if state.role is Role.UNKNOWN:
        state.wiring.note_weight(state, state.kind.own(module) if state.kind.local else None)
        if state.active:
            state.check_ranks(module)
        state.fed = state.fed or any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs)))
    rule = state.rule
    if rule.learns:
        state.wiring.note_ranks(module)
    if not state.linked and backward_id() == -1:
        state.link(module)
        state.refresh()
    learner = state.learner
    stand_in: Tensor | None = None
    if learner is not None:
        learner.enter(module)
        if kind is state.kind and kind.parameter in module._parameters:  # a use by another module has seen to it
            stand_in = learner.stand_in(module, kind.weight(module))
            forward = _with(kind, stand_in)
    if isinstance(rule, DirectRule):
        if _transforming():
            return transformed(state, rule, module, forward, args, kwargs, index)
        if state.wiring.skip == "cut" and (stream := stream_of(state)) is not None:
            refuse_picks(state)
            return stream.direct(state, rule, module, forward, args, kwargs, index)
        return _direct(state, rule, module, forward, args, kwargs, index)
    if isinstance(rule, LearnedLocal):
        assert learner is not None
        output = kind.run(module, forward, args, kwargs, learner.backward(module, stand_in))
        learner.watch(module, output, kind.delta_axis(output), index)
    elif isinstance(rule, LocalRule):
        output = kind.run(module, forward, args, kwargs, local_weight(state, rule))
    else:
        output = forward(module, *args, **kwargs)
    if not state.joins and (not state.wiring.picks or _transforming()):
        return output
    if _transforming():
        return transformed_output(state, output, args, kwargs)
    x = args[0] if args else None
    pick = note_rows(state, x) if (state.picks or is_new(state)) and isinstance(x, Tensor) else None
    return finish(state, output, sources_of(args, kwargs), [], [], 0, pick)


def _was_cut(state: LayerState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an input needs no gradient any more only because another layer of a streamed pass was fed with it."""
    stream = stream_of(state)
    return stream is not None and any(stream.has_cut(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _takes_part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether anything about the call may need a gradient. It does not where the layer and all below are frozen."""
    if kwargs or len(args) != 1:
        args = (*args, *kwargs.values())
    for x in args:
        # What is no tensor may hold some; only blocks are given such.
        if not isinstance(x, Tensor):
            if any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(x)[0]):
                return True
        elif x.requires_grad:
            return True
    own = module.parameters() if module._modules else module._parameters.values()
    for p in own:  # noqa: SIM110  (this runs in every call of every frozen layer)
        if p is not None and p.requires_grad:
            return True
    return False


def idle(state: LayerState, output: Any) -> Any:
    """What a layer returns that takes no part: its output, and no trace on any graph."""
    state.idle = True
    if isinstance(output, Tensor) and not output.requires_grad:
        return output
    # A weight given from outside, or a forward that asks for a gradient itself.
    if any(isinstance(y, Tensor) and y.requires_grad for y in tree_flatten(output)[0]):
        state.wake()
        return finish(state, output, [], [], [], 0)
    return output


def _with(kind: Kind, weight: Tensor) -> Forward:
    """The layer's forward with another tensor in its weight's place."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.operate(module, weight, *args, **kwargs)

    return forward


def _direct(
    state: LayerState,
    rule: DirectRule,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    index: int,
) -> Any:
    """The operation on inputs cut from the graph, and a port (or, before all is known, a probe) for each."""
    _refuse_nested(state, args)
    errors: list[OutputError] = []
    if not state.settled:
        state.wiring.note_ranks(module)
    if not kwargs and len(args) == 1 and isinstance(x := args[0], Tensor):  # nearly every layer
        if not x.requires_grad:
            return finish(state, fastest(module, forward)(module, x), [], [], errors, 0)
        node = x.grad_fn
        pick = note_rows(state, x) if state.picks or is_new(state) else None
        feed = (state, rule, errors, index, _wall(state, rule, x), pick, look(state, rule, x))
        sources = [] if node is None else [node]
        if state.settled:
            ticket = port(x, feed)
            y = fastest(module, forward)(module, x.detach())
            return finish(state, y, sources, [ticket], errors, 1, pick)
        return finish(state, forward(module, probe(x, feed)), sources, [], errors, 1, pick)

    leaves, spec = tree_flatten((args, kwargs))
    tickets: list[Tensor] = []
    sources = []
    ports = 0
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.requires_grad:
            if x.grad_fn is not None:
                sources.append(x.grad_fn)
            feed = (state, rule, errors, index + ports, _wall(state, rule, x), None, look(state, rule, x))
            if state.settled:
                tickets.append(port(x, feed))
                leaves[i] = x.detach()
            else:
                leaves[i] = probe(x, feed)
            ports += 1
    args, kwargs = tree_unflatten(leaves, spec)
    return finish(state, forward(module, *args, **kwargs), sources, tickets, errors, ports)


def _refuse_nested(state: LayerState, args: tuple[Any, ...]) -> None:
    if any(isinstance(x, Tensor) and x.is_nested for x in args):
        name = state.name
        raise PassError(
            f"layer {state.label}: its input is a nested tensor, whose samples have shapes of their own, and an output "
            "error is fed back by shape: give the model padded batches, or use a local rule here, "
            f"layers={{{name!r}: 'fa'}}"
        )


def _wall(state: LayerState, rule: DirectRule, x: Tensor) -> Wall | None:
    """The wall at a fed-back tensor, if skip connections are cut; not while backprop is being measured."""
    exact = state.exact or state.needs_scale(rule)
    return wall_at(x) if state.wiring.skip == "cut" and not exact else None
