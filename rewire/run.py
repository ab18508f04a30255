"""One call of one converted layer: where x is cut, and what is left on the graph.

Under ``bp`` the operation runs as it is, under a local rule with another backward weight, and under a direct rule in
:func:`_direct`, cut off from its input. All end in :func:`finish`, which joins the output to the pass if the
layer is, or may be, an output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rewire.bypass import direct_uses
from rewire.edges import Wall, alias, carry, check, join, port, probe, project, wall_at
from rewire.errors import PassError
from rewire.exchange import exchange, exchangeable
from rewire.layers.kinds import BackwardWeight, Kind
from rewire.learning import look
from rewire.passes import (
    CALL,
    Call,
    Node,
    OutputError,
    PouredError,
    backward_id,
    call_of,
    call_sources,
    leave,
    metadata,
    picked,
    upstream,
)
from rewire.picks import Pick, Unclear, pick_of
from rewire.pours import pours_below
from rewire.roles import Role
from rewire.rules.base import DirectRule, LearnedLocal, LocalRule
from rewire.stacked import given_direct, given_local
from rewire.stacks import stacked_below
from rewire.state import LayerState
from rewire.targets import current_targets
from rewire.wiring import Wiring

Forward = Callable[..., Any]
# Looked up once: these run in every call of every layer.
_backward_id: Callable[[], int] = torch._C._current_graph_task_id
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


class Stream(Protocol):
    """A forward that takes the calls of direct rules into its own hands (:mod:`rewire.stream`).

    Attributes:
        wiring: the conversion it is about.
        joins: output layers are to be joined to the pass.
    """

    wiring: Wiring
    joins: bool

    def direct(
        self,
        state: LayerState,
        rule: DirectRule,
        module: nn.Module,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
    ) -> Any:
        """In place of :func:`_direct`."""

    def joined(self, error: OutputError, y: Tensor) -> None:
        """An output layer was joined to the pass; ``y`` is its output."""


# Read only where skip connections are cut (a streamed pass cuts), and at output layers.
streaming: ContextVar[Stream | None] = ContextVar("rewire_streaming", default=None)


def _stream(state: LayerState) -> Stream | None:
    """The streamed forward that this call is a part of; a recomputation in a backward is none."""
    stream = streaming.get()
    return stream if stream is not None and stream.wiring is state.wiring and backward_id() == -1 else None


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
    if not _takes_part(module, args, kwargs):
        return _idle(state, forward(module, *args, **kwargs))
    if state.idle:
        state.wake()
    if state.role is Role.UNKNOWN:
        state.wiring.note_weight(state, module)
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
            return _transformed(state, rule, module, forward, args, kwargs, index)
        if state.wiring.skip == "cut" and (stream := _stream(state)) is not None:
            _refuse_picks(state)
            return stream.direct(state, rule, module, forward, args, kwargs, index)
        return _direct(state, rule, module, forward, args, kwargs, index)
    if isinstance(rule, LearnedLocal):
        assert learner is not None
        output = kind.run(module, forward, args, kwargs, learner.backward(module, stand_in))
        learner.watch(module, output, kind.delta_axis(output), index)
    elif isinstance(rule, LocalRule):
        output = kind.run(module, forward, args, kwargs, _backward(state, rule))
    else:
        output = forward(module, *args, **kwargs)
    if not state.joins:
        return output
    if _transforming():
        return _transformed_output(state, output, args, kwargs)
    x = args[0] if args else None
    pick = _pick(state, x) if (state.picks or _new(state)) and isinstance(x, Tensor) else None
    return finish(state, output, _sources(args, kwargs), [], [], 0, pick)


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


def _idle(state: LayerState, output: Any) -> Any:
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


def steady_direct(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """:func:`run` for nearly every call there is: a settled hidden layer under a direct rule, with one input.

    Written out in one place because every Python function more is felt in small layers, and more so when the
    weights of large ones have swept the cache.
    """
    if state.wiring.unsettled or _transforming():
        return run(state, module, forward, (x,), {})
    if not x.requires_grad:
        return _first(state, module, forward, x)
    if not state.settled:
        return run(state, module, forward, (x,), {})
    node = x.grad_fn
    errors: list[OutputError] = []
    B = state.mirror
    if B is not None and x.dtype is B.dtype and x.dim() == 2 and x.device == B.device and not _autocast():
        # e B is what the backward of x Bᵀ makes of e: a ticket with a value, and no node of ours. If e B is small it
        # may as well be made as soon as e is known, and needs no ticket at all.
        tickets = [] if x.numel() <= state.hold else [linear(x, B)]
        call = Call(state, [] if node is None else [node], tickets, errors)
        call.mirrored = x, state.rule, B  # type: ignore[assignment]
    else:
        ticket = port(x, (state, state.rule, errors, 0, None, None, None))
        call = Call(state, [] if node is None else [node], [ticket], errors, 1)
    y = forward(module, x.detach())
    if type(y) is not Tensor or not y.requires_grad or y._is_view():
        if not call.tickets:
            call.tickets = [linear(x, B)]  # type: ignore[arg-type]  # of a frozen layer: what ties y to the graph
        return _mark(state, call, y, joins=False) if isinstance(y, Tensor) else _mark_all(state, call, y, joins=False)
    made = y.grad_fn
    made.metadata[CALL] = call  # type: ignore[union-attr, index]
    made.register_prehook(partial(check, call, _backward_id() != -1))  # type: ignore[union-attr]
    return y


def _first(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """:func:`steady_direct` where there is nothing to hand back to: the first layer of a network."""
    y = forward(module, x)
    if type(y) is not Tensor or not y.requires_grad:
        return _idle(state, y)
    if state.idle:
        state.wake()
    if y._is_view():
        return finish(state, y, [], [], [], 0)
    y.grad_fn.metadata[CALL] = Call(state, [], [], [])  # type: ignore[union-attr, index]
    return y


def steady_local(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """:func:`run` for a hidden layer under a local rule whose operation's weight can be exchanged."""
    if state.wiring.unsettled or not exchangeable():
        return run(state, module, forward, (x,), {})
    y = forward(module, x)
    if not x.requires_grad:
        return y
    if exchange(y, _steady_backward(state), transposed=state.kind.transposed):
        return y
    return run(state, module, forward, (x,), {})


def _steady_backward(state: LayerState) -> BackwardWeight:
    """:func:`_backward` without the cases that a settled layer outside of transforms cannot be in."""
    rule: Any = state.rule
    made = state.local
    return made if type(made) is _Backward and made.rule is rule and not rule.redraw else _backward(state, rule)


def steady_output_direct(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """:func:`run` for an output layer under a direct rule: its join hands back to its own input as well."""
    B = state.mirror
    fits = B is not None and x.dtype is B.dtype and x.dim() == 2 and x.device == B.device and not _autocast()
    if not fits or not x.requires_grad or state.wiring.unsettled or _transforming():
        return run(state, module, forward, (x,), {})
    node = x.grad_fn
    call = Call(state, [] if node is None else [node], [], [])
    call.mirrored = x, state.rule, B  # type: ignore[assignment]
    y = forward(module, x.detach())
    return _mark(state, call, y, joins=True) if isinstance(y, Tensor) else _mark_all(state, call, y, joins=True)


def steady_output_local(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """:func:`run` for the only output layer of a network without direct rules.

    Nobody waits for e, so nothing needs to be joined: that e is seen when it arrives is enough. With a second call
    before that, one may be the output of the pass and the other not; the join of the second finds out.
    """
    wiring = state.wiring
    if state.called or not wiring.local or not wiring.certain or wiring.unsettled or not exchangeable():
        return run(state, module, forward, (x,), {})
    if _backward_id() != -1:
        return run(state, module, forward, (x,), {})
    y = forward(module, x)
    if type(y) is not Tensor or not y.requires_grad or y._is_view():
        return run(state, module, forward, (x,), {})
    if x.requires_grad and not exchange(y, _steady_backward(state), transposed=state.kind.transposed):
        return run(state, module, forward, (x,), {})
    state.called = True
    wiring.errors.pop(state.name, None)  # the newest pass has no error yet
    error = OutputError(state, state.kind.axis(y.dim()), None)
    call = Call(state, [], [], [])
    call.own.append(error)
    made = y.grad_fn
    made.metadata[CALL] = call  # type: ignore[union-attr, index]
    made.register_prehook(partial(_arrived, error))  # type: ignore[union-attr]
    return y


def _arrived(error: OutputError, gradients: Sequence[Tensor | None]) -> None:
    """Hook of the node of an output layer's output."""
    if gradients[0] is not None:
        error.state.wiring.error_reached(error.state, error, gradients[0])


Steady = Callable[[LayerState, nn.Module, Forward, Tensor], Any]
# By LayerState.steady.
STEADY: dict[str, Steady] = {
    "direct": steady_direct,
    "local": steady_local,
    "output-direct": steady_output_direct,
    "output-local": steady_output_local,
}


class _Backward(BackwardWeight):
    """The backward weight of a local rule. A redrawn R is made in the backward, and not kept."""

    def __init__(self, state: LayerState, rule: LocalRule, draw: int) -> None:
        self.state = state
        self.rule = rule
        self.keep = rule.uses_weight
        self.lasting = not rule.redraw
        self.draw = draw
        self.scale = 0.0
        self.fixed: Tensor | None = None

    def random(self, weight: Tensor) -> Tensor | None:
        self.scale = self.state.local_scale(weight)
        self.state.random_as = (weight.shape, weight.dtype, weight.device)
        if self.rule.redraw:
            self.like = (weight.shape, weight.dtype, weight.device)
        elif self.rule.random:
            fixed = self.fixed
            if fixed is None or (fixed.shape, fixed.dtype, fixed.device) != (weight.shape, weight.dtype, weight.device):
                self.fixed = self.state.random(self.rule, weight.shape, weight.dtype, weight.device)
        return self.fixed

    def note(self, weight: Tensor) -> None:
        if self.rule.uses_weight and not _transforming():
            self.state.used = weight.detach()

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        if self.rule.redraw:
            random = self.state.random(self.rule, *self.like, self.draw)
        return self.rule.backward_weight(weight, random, self.scale)


class _Given(BackwardWeight):
    """The backward weight of one of several models that run as one (:mod:`rewire.stacked`).

    R and s arrive in one tensor, as an input of the operation: what a transform is to map over cannot be a number
    that our code remembers.
    """

    lasting = False

    def __init__(self, state: LayerState, rule: LocalRule, packed: Tensor) -> None:
        self.state = state
        self.rule = rule
        self.packed = packed
        self.keep = rule.uses_weight

    def random(self, weight: Tensor) -> Tensor | None:
        self.shape = weight.shape
        if self.packed.numel() != 1 + (weight.numel() if self.rule.random else 0):
            raise PassError(f"layer {self.state.label}: the feedback given is not of the shape of its weight")
        return self.packed

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        assert random is not None
        R = random[:-1].reshape(self.shape) if self.rule.random else None
        return self.rule.backward_weight(weight, R, random[-1])  # type: ignore[arg-type]


def _backward(state: LayerState, rule: LocalRule) -> BackwardWeight:
    """What makes B in this call; the same object each time, unless R is drawn anew, or given from outside."""
    if _transforming() and (packed := given_local(state)) is not None:
        return _Given(state, rule, packed)
    if rule.redraw:
        if backward_id() == -1:  # a recomputation in backward is still the same pass
            state.draws += 1
        return _Backward(state, rule, state.draws)
    made = state.local
    if not isinstance(made, _Backward) or made.rule is not rule:
        made = state.local = _Backward(state, rule, 0)
    return made


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
    errors: list[OutputError] = []
    if not state.settled:
        state.wiring.note_ranks(module)
    if not kwargs and len(args) == 1 and isinstance(x := args[0], Tensor):  # nearly every layer
        if not x.requires_grad:
            return finish(state, forward(module, x), [], [], errors, 0)
        node = x.grad_fn
        pick = _pick(state, x) if state.picks or _new(state) else None
        feed = (state, rule, errors, index, _wall(state, rule, x), pick, look(state, rule, x))
        sources = [] if node is None else [node]
        if state.settled:
            ticket = port(x, feed)
            return finish(state, forward(module, x.detach()), sources, [ticket], errors, 1, pick)
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


def _wall(state: LayerState, rule: DirectRule, x: Tensor) -> Wall | None:
    """The wall at a fed-back tensor, if skip connections are cut; not while backprop is being measured."""
    exact = state.exact or state.needs_scale(rule)
    return wall_at(x) if state.wiring.skip == "cut" and not exact else None


def finish(
    state: LayerState,
    output: Any,
    sources: list[Node],
    tickets: list[Tensor],
    errors: list[OutputError],
    ports: int,
    pick: Pick | None = None,
) -> Any:
    """Leave the call on the graph; join the output to the pass unless the layer is known to be hidden."""
    call = Call(state, sources, tickets, errors, ports)
    call.pick = pick
    if state.start is None and backward_id() == -1:
        state.note_start(output)
    joins = state.joins
    return _mark(state, call, output, joins) if isinstance(output, Tensor) else _mark_all(state, call, output, joins)


def _pick(state: LayerState, x: Tensor) -> Pick | None:
    """How the rows of x were picked from the batch, if they were."""
    if _stream(state) is not None:  # whose first graph keeps no index
        _refuse_picks(state)
        return None
    _note_stacks(state, x)
    try:
        pick = pick_of(x, picked)
    except Unclear:
        if isinstance(state.rule, DirectRule):
            state.wiring.unclear.add(state.name)
        return None
    if pick is not None and not state.picks:
        state.picks = True
        state.changed()
    return pick


def _poured(call: Call, error: OutputError) -> dict[Call, OutputError]:
    """The error for each call below whose rows were added up by index."""
    wiring = call.state.wiring
    found = pours_below(call.sources, call_of, lambda lower: () if lower.state.wiring is not wiring else lower.sources)
    poured: dict[Call, OutputError] = {}
    for lower, rows in found.items():
        state = lower.state
        if lower.pick is not None or state.wiring is not wiring or not isinstance(state.rule, DirectRule):
            continue  # rows that were picked have the place they were picked from
        poured[lower] = PouredError(error, rows)
        wiring.pours = True
        wiring.unclear.discard(state.name)  # whatever they were picked from: it is known where they go
        if not state.picks:
            state.picks = True
            state.changed()
    return poured


def _new(state: LayerState) -> bool:
    return state.role is Role.UNKNOWN or not state.wiring.looked


def _note_stacks(state: LayerState, x: Tensor) -> None:
    """Should x be all parts of what lies in several batches below, the layers down there have to know."""
    for node, count in stacked_below(x, _is_call).items():
        call: Call = metadata(node)[CALL]
        for lower in (call, *upstream(call.sources, state.wiring)):
            if lower.state.stacked != count:
                lower.state.stacked = count
                lower.state.changed()


def _is_call(node: Node) -> bool:
    return CALL in metadata(node)


def _refuse_picks(state: LayerState) -> None:
    if state.picks:
        raise PassError(
            f"layer {state.label}: rows of its input are picked from the batch by an index, or added up by one, which "
            "a streamed pass does not follow: use loss.backward()"
        )


def _mark_all(state: LayerState, call: Call, output: Any, joins: bool) -> Any:
    """:func:`_mark` for each tensor in what a block returns."""
    leaves, spec = tree_flatten(output)
    for i, y in enumerate(leaves):
        if isinstance(y, Tensor) and (y.requires_grad or (call.tickets and y.is_floating_point())):
            leaves[i] = _mark(state, call, y, joins)
    return tree_unflatten(leaves, spec)


def _mark(state: LayerState, call: Call, y: Tensor, joins: bool) -> Tensor:
    if joins:
        y = _join(state, call, y)
    elif call.tickets and not y.requires_grad:
        y = join(y, state, None, False, [], [], *call.tickets)  # frozen: keeps the graph in one piece
    elif y._is_view():
        # An in-place operation on a view would replace its graph node, and the call left there with it.
        y = alias(y)
    node = y.grad_fn
    if node is not None:
        leave(node, call)
        if call.tickets and not joins:
            # Some microseconds in each call: a layer that no error can reach must not go unnoticed, not once.
            node.register_prehook(partial(check, call, backward_id() != -1))
    return y


def _join(state: LayerState, call: Call, y: Tensor) -> Tensor:
    """The output of an output layer: every port upstream, its own included, will wait for its gradient."""
    stream = _stream(state)
    if stream is not None and not stream.joins:
        return alias(y) if y._is_view() else y  # as what joins return: no view
    wiring = state.wiring
    wiring.errors.pop(state.name, None)  # the newest pass has no error yet
    error = OutputError(state, state.kind.axis(y.dim()), current_targets())
    error.pick = call.pick
    if state.role is Role.UNKNOWN:
        wiring.bypassed.update(direct_uses(call.sources, call_sources))
    feeders = upstream(call.sources, wiring)
    poured = _poured(call, error) if wiring.pours or not wiring.looked else {}
    tickets: list[Tensor] = []
    mirrored: list[Tensor] = []
    held: list[Tensor] = []
    fed: list[Call] = []
    to_hold: list[Call] = []
    for feeder in [call, *feeders]:
        arrives = poured.get(feeder, error)
        feeder.errors.append(arrives)
        for lower in feeder.own:
            lower.above.append(error)
        if feeder.mirrored is not None:
            x, rule, B = feeder.mirrored
            fits = y.dim() == 2 and y.dtype is B.dtype and len(x) == len(y) and len(B) == y.shape[1]
            if state.role is Role.OUTPUT and fits and call.pick is None and arrives is error:
                if feeder.tickets:
                    mirrored += feeder.tickets
                    fed.append(feeder)
                else:
                    held.append(x)
                    to_hold.append(feeder)
            else:  # not the output that B is for, or not with an error for each row of x
                tickets.append(port(x, (feeder.state, rule, [arrives], 0, None, None, None)))
                error.ports += 1
            continue
        tickets.extend(feeder.tickets)
        error.ports += feeder.ports
    if not y.requires_grad and not tickets and not mirrored and not held:
        return y
    call.own.append(error)
    call.feeders = feeders
    nested = backward_id() != -1
    joined = join(y, state, error, nested, fed, to_hold, *tickets, *mirrored, *held)
    if stream is not None:
        stream.joined(error, joined)
    return joined


def _sources(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Node]:
    """Graph nodes of a layer's inputs."""
    inputs = [*args, *kwargs.values()]
    if not all(isinstance(x, Tensor) for x in inputs):  # a block may take anything
        inputs = tree_flatten(inputs)[0]
    return [x.grad_fn for x in inputs if isinstance(x, Tensor) and x.grad_fn is not None]


# -- torch.func transforms -----------------------------------------------------------------------------


def _transformed(
    state: LayerState,
    rule: DirectRule,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    index: int,
) -> Any:
    """Under ``grad``, ``vmap`` and their like: inputs are remembered on the graph, the output layer projects to all."""
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    _require_known(state, waiting=bool(inputs) and state.needs_scale(rule))
    cut = tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], spec)
    y = forward(module, *cut[0], **cut[1])
    call = Call(state, [x.grad_fn for x in inputs if x.grad_fn is not None], [], [])
    call.inputs = inputs
    call.index = index
    if state.role is Role.OUTPUT:
        return _project(state, call, y)
    if not isinstance(y, Tensor):
        raise PassError(f"block {state.label} returns {type(y).__name__}; under torch.func it must return one tensor")
    if inputs and not y.requires_grad:
        y = carry(y, inputs[0])
    if y.grad_fn is not None:
        leave(y.grad_fn, call)
    return y


def _transformed_output(state: LayerState, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An output layer under ``bp`` or a local rule, with direct rules somewhere below it."""
    if not any(isinstance(other.rule, DirectRule) for other in state.wiring.layers.values()):
        return y
    _require_known(state, waiting=False)
    if state.role is not Role.OUTPUT:
        return y
    return _project(state, Call(state, _sources(args, kwargs), [], []), y)


def _project(state: LayerState, call: Call, y: Tensor) -> Tensor:
    error = OutputError(state, state.kind.axis(y.dim()), current_targets())
    fed = [call, *upstream(call.sources, state.wiring)]
    plan: list[tuple[LayerState, Any, int, bool]] = []
    given: list[Tensor] = []
    for other in fed:
        for index, _ in enumerate(other.inputs, other.index):
            B = given_direct(other.state, state.name, index)
            plan.append((other.state, other.state.rule, index, B is not None))
            if B is not None:
                given.append(B)
    inputs = [x for other in fed for x in other.inputs]
    return project(y, error.targets, error, plan, *inputs, *given)


def _require_known(state: LayerState, waiting: bool) -> None:
    wiring = state.wiring
    if wiring.skip == "cut":
        raise PassError("skip='cut' does not work under torch.func transforms; use skip='keep'")
    if waiting or (state.role is Role.UNKNOWN and wiring.asked is None):
        raise PassError(
            f"layer {state.label}: a torch.func transform came before the first training pass, which finds the output "
            "layer and measures the scale. Run one ordinary forward and backward first, or give both: "
            "convert(..., output='...', scale=0.05)"
        )
