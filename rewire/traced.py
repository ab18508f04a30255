"""Converted layers under ``torch.compile``: the same mechanism, put into the compiled graph.

Dynamo traces a layer's forward up to a few functions that it takes into the graph as they are
(``torch.compiler.allow_in_graph``). When AOTAutograd then runs that graph to trace the backward, they do what they
do in eager mode: leave calls on graph nodes, hang ports on inputs, walk from the output layer up, exchange weights.
What they compute with tensors is traced; what they find out is settled at compile time and costs nothing later.

Such functions may be given tensors and constants only. So a layer is named by a number and a string, and its feedback
is handed in as a tensor: then nothing is frozen into the graph that training changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire import ready
from rewire.distributed import in_parallel_forward
from rewire.edges import alias, check
from rewire.errors import PassError
from rewire.exchange import exchange
from rewire.layers.kinds import BackwardWeight, Forward
from rewire.passes import Call, OutputError, leave, metadata, upstream
from rewire.roles import Role
from rewire.routing import route_to
from rewire.rules.base import DirectRule, LocalRule
from rewire.run import run
from rewire.state import LayerState
from rewire.wiring import conversions

_ERRORS = "rewire.errors"


class _Port(Function):
    """x, B of each output layer -> ticket; as :class:`rewire.edges.Port`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, state: LayerState, rule: DirectRule, errors: list[OutputError], *fixed: Any
    ) -> Any:
        names, matrices = fixed[: len(fixed) // 2], fixed[len(fixed) // 2 :]
        ctx.set_materialize_grads(False)
        ctx.feed = state, rule, errors, dict(zip(names, range(len(names)), strict=True))
        ctx.like = x.shape, x.dtype
        ctx.save_for_backward(*matrices)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        state, rule, errors, places = ctx.feed
        shape, dtype = ctx.like
        total: Tensor | None = None
        for error in errors:
            if error.error is None or not error.here():
                continue
            signal = error.signal(rule)
            if rule.silent:
                fed = signal.new_zeros(shape, dtype=dtype)
            else:
                if error.state.name not in places:
                    raise PassError(f"layer {state.label} has no feedback yet: run one ordinary training step first")
                B = ctx.saved_tensors[places[error.state.name]]
                above = error.state.rule
                route = route_to(
                    tuple(shape),
                    state.kind.axis(len(shape)),
                    tuple(signal.shape),
                    error.axis,
                    structure=state.structure(rule).routing,
                    layout=rule.layout,
                    e_layout=above.layout if isinstance(above, DirectRule) else rule.layout,
                    seen=state.order,
                    stacked=state.stacked,
                    hint=state.layout,
                )
                fed = route(signal, B.to(device=signal.device, dtype=dtype)).to(dtype).contiguous()
            total = fed if total is None else total + fed
        return (total, None, None, None, *(None,) * (2 * len(places)))


class _Join(Function):
    """Identity on y that takes tickets; backward: the gradient at y is e. As :class:`rewire.edges.Join`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, error: OutputError | None, *tickets: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.error, ctx.tickets = error, len(tickets)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.error is not None and gradient is not None:
            ctx.error.deliver(gradient)
        return (gradient, None, *(None,) * ctx.tickets)


class _Given(BackwardWeight):
    """The backward weight of a local rule whose R is at hand."""

    def __init__(self, rule: LocalRule, random: Tensor | None, scale: float) -> None:
        self.rule = rule
        self.given = random
        self.scale = scale
        self.keep = rule.uses_weight

    def random(self, weight: Tensor) -> Tensor | None:
        return self.given if self.given is None else self.given.to(weight.dtype)

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        return self.rule.backward_weight(weight, random, self.scale)


# -- functions that Dynamo takes into the graph as they are ----------------------------------------------


def _opened(key: int, name: str, rule: str, outputs: tuple[str, ...], count: int, *tensors: Tensor) -> list[Tensor]:
    """Ports at the inputs of one call.

    Args:
        rule: how the rule is written; here only so that another rule makes another graph.
        outputs: output layers that the feedback is for.
        tensors: ``count`` inputs, then for each of them a B for each output layer.
    """
    state = conversions[key].layers[name]
    assert isinstance(state.rule, DirectRule)
    errors: list[OutputError] = []
    port: Callable[..., Tensor] = _Port.apply
    tickets = []
    for i, x in enumerate(tensors[:count]):
        start = count + i * len(outputs)
        fixed = tensors[start : start + len(outputs)]
        ticket = port(x, state, state.rule, errors, *(outputs if fixed else ()), *fixed)
        if ticket.grad_fn is not None:
            metadata(ticket.grad_fn)[_ERRORS] = errors
        tickets.append(ticket)
    return tickets


def _closed(y: Tensor, key: int, name: str, count: int, *tensors: Tensor) -> Tensor:
    """Leave a hidden layer's call on the graph. ``tensors``: its ``count`` inputs, their tickets."""
    call = _call(key, name, count, tensors)
    if not y.requires_grad:
        y = _join(y, None, *call.tickets)
    elif y._is_view():
        y = alias(y)
    if y.grad_fn is not None:
        leave(y.grad_fn, call)
        y.grad_fn.register_prehook(partial(_check, call))
    return y


def _joined(y: Tensor, key: int, name: str, count: int, *tensors: Tensor) -> Tensor:
    """The output of an output layer, joined to the tickets of all calls upstream. ``tensors`` as above."""
    call = _call(key, name, count, tensors)
    state = call.state
    error = OutputError(state, state.kind.axis(y.dim()), None)
    feeders = upstream(call.sources, state.wiring)
    tickets: list[Tensor] = []
    for feeder in [call, *feeders]:
        feeder.errors.append(error)
        tickets.extend(feeder.tickets)
        error.ports += len(feeder.tickets)
        for lower in feeder.own:
            lower.above.append(error)
    if not y.requires_grad and not tickets:
        return y
    call.own.append(error)
    call.feeders = feeders
    y = _join(y, error, *tickets)
    if y.grad_fn is not None:
        leave(y.grad_fn, call)
    return y


def _exchanged(y: Tensor, x: Tensor, key: int, name: str, rule: str, *random: Tensor) -> Tensor:
    """Let the operation that made y from x hand back what a local rule says."""
    state = conversions[key].layers[name]
    assert isinstance(state.rule, LocalRule) and state.std is not None
    if state.rule.random and not random:
        raise PassError(f"layer {state.label} has no feedback yet: run one ordinary training step first")
    backward = _Given(state.rule, random[0] if random else None, state.std)
    if y.grad_fn is not None and not exchange(y, backward, transposed=state.kind.transposed):
        raise PassError(f"layer {state.label}: torch.compile made something of its operation that the rule cannot use")
    return y


_join: Callable[..., Tensor] = _Join.apply


def _call(key: int, name: str, count: int, tensors: tuple[Tensor, ...]) -> Call:
    state = conversions[key].layers[name]
    inputs, tickets = tensors[:count], list(tensors[count:])
    opened = None if not tickets or tickets[0].grad_fn is None else metadata(tickets[0].grad_fn)
    if opened is not None and _ERRORS not in opened:
        raise PassError(f"layer {state.label}: its compiled graph was cut in two{_buckets()}")
    errors = [] if opened is None else opened[_ERRORS]
    return Call(state, [x.grad_fn for x in inputs if x.grad_fn is not None], tickets, errors, len(tickets))


def _check(call: Call, gradients: Any) -> None:
    try:
        check(call, False, gradients)
    except PassError as problem:
        raise PassError(
            f"{problem}. Under torch.compile a graph break between the two has the same effect: fullgraph=True finds it"
            f"{_buckets()}"
        ) from None


def _buckets() -> str:
    """One more thing that cuts graphs, for messages."""
    return (
        ". DistributedDataParallel cuts a compiled graph into one for each bucket: "
        "torch._dynamo.config.optimize_ddp = False turns that off"
        if in_parallel_forward()
        else ""
    )


@functools.cache
def register() -> None:
    """Tell Dynamo about the functions above. Imports it, so it is not done before a layer is converted."""
    allow: Callable[..., Any] = torch.compiler.allow_in_graph
    for function in (_opened, _closed, _joined, _exchanged):
        allow(function)
    constant: Callable[..., Any] = torch.compiler.assume_constant_result
    constant(prepare)


def prepare(key: int, unsettled: bool) -> bool:
    """Run when a call is compiled, not when it is run: take in what passes have shown, get ready what graphs are given.

    Args:
        unsettled: of the conversion; here so that what is compiled holds only while nothing new has been shown.
    """
    wiring = conversions[key]
    if wiring.unsettled:
        wiring.settle()
    if not wiring.prepared:
        ready.prepare(wiring)
    return True


_exporting: Callable[[], bool] = torch.compiler.is_exporting
_NO_EXPORT = (
    "rewire: an exported program has PyTorch's own backward in place of the rules of a converted model. Call "
    "rewire.restore(model) first; or, to export the forward alone, model.eval() or torch.no_grad()"
)


def _cannot_export() -> None:
    raise PassError(_NO_EXPORT)


_disable: Callable[..., Any] = torch.compiler.disable
_refuse: Callable[[], None] = _disable(_cannot_export, reason=_NO_EXPORT)


def exports(training: bool) -> bool:
    """Whether a forward that Dynamo or ``torch.export`` traces is to be exported: then it runs without any rule.

    Raises:
        PassError: in training mode, where the rule would be missed without a word.
    """
    if not _exporting():
        return False
    if training:
        _refuse()
    return True


def outside(state: LayerState, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """A call that is a break of the graph."""
    if isinstance(state.rule, DirectRule):
        ready.part(state.wiring)
    return run(state, module, forward, args, kwargs)


# -- traced by Dynamo ----------------------------------------------------------------------------------


def call(state: LayerState, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """One call of one layer, as part of a compiled graph."""
    rule, key = state.rule, state.wiring.key
    leaves, spec = tree_flatten((args, kwargs))  # a block may be given lists of tensors
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    tickets: list[Tensor] = []
    if isinstance(rule, DirectRule):
        if inputs:
            fixed = state.fixed_outputs, len(inputs)
            tickets = _opened(key, state.name, state.written, *fixed, *inputs, *state.fixed)
        args, kwargs = tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], spec)
        y = forward(module, *args, **kwargs)
    else:
        y = forward(module, *args, **kwargs)
        if inputs and isinstance(rule, LocalRule):
            y = _exchanged(y, inputs[0], key, state.name, state.written, *state.fixed)
    if state.role is Role.OUTPUT:
        state.wiring.errors = {}  # a compiled pass notes none, and that of an earlier pass is not its
    if state.joins_traced:
        return _joined(y, key, state.name, len(inputs), *inputs, *tickets)
    return _closed(y, key, state.name, len(inputs), *inputs, *tickets) if tickets else y
