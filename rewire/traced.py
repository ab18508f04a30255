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
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire import ready, redraw
from rewire.distributed import in_parallel_forward
from rewire.edges import Wall, alias, check, wall_at
from rewire.errors import PassError
from rewire.exchange import exchange
from rewire.handback import through
from rewire.layers.kinds import BackwardWeight, Forward
from rewire.passes import Call, OutputError, leave, metadata, upstream
from rewire.ready import given, parts
from rewire.roles import Role
from rewire.rules.base import DirectRule, LocalRule
from rewire.rules.direct import given_in_graph
from rewire.run import run
from rewire.state import LayerState
from rewire.structures import Feedback
from rewire.ways import heard, plan
from rewire.wiring import conversions

_ERRORS = "rewire.errors"


class _Port(Function):
    """x, what B of each output layer is made of -> ticket; as :class:`rewire.edges.Port`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        state: LayerState,
        rule: DirectRule,
        errors: list[OutputError],
        wall: Wall | None,
        fixed_as: dict[str, Tensor | Feedback],
        *fixed: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.feed = state, rule, errors, wall, fixed_as
        ctx.like = x.shape, x.dtype, x.device
        ctx.save_for_backward(*fixed)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        state, rule, errors, wall, fixed_as = ctx.feed
        shape, dtype, device = ctx.like
        structure = state.structure(rule)
        # x may be on another device, or of another dtype, than in the pass that made B.
        kept = structure.dtype or dtype
        tensors = [t.to(device=device, dtype=kept if t.is_floating_point() else t.dtype) for t in ctx.saved_tensors]
        Bs = dict(zip(fixed_as, given(fixed_as.values(), tensors), strict=True))
        total: Tensor | None = None
        for error in errors:
            if error.error is None or not error.here():
                continue
            signal = error.signal(rule)
            if rule.silent:
                fed = signal.new_zeros(shape, dtype=dtype)
            else:
                B = Bs.get(error.state.name)
                if B is None:
                    raise PassError(f"layer {state.label} has no feedback yet: run one ordinary training step first")
                route = plan(state, rule, error, shape, heard(B, signal.shape, error.axis), structure.routing)
                # What layers share, such as e P, each makes for itself here: the compiler does the same work only once.
                fed = through(route, B, signal, error.axis, {}).to(dtype).contiguous()
            total = fed if total is None else total + fed
        if wall is not None and total is not None:
            wall.add(total)
        return (total, None, None, None, None, None, *(None,) * len(tensors))


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
    """The backward weight of a local rule whose R is at hand.

    Args:
        whole, rows: the operation is given only these rows of the whole weight.
    """

    def __init__(
        self, rule: LocalRule, random: Tensor | None, scale: float, whole: Tensor | None, rows: slice | None
    ) -> None:
        self.rule = rule
        self.given = random
        self.scale = scale
        self.keep = rule.uses_weight
        self.whole = whole
        self.rows = rows

    def random(self, weight: Tensor) -> Tensor | None:
        return self.given if self.given is None else self.given.to(weight.dtype)

    def combine(self, weight: Tensor | None, random: Tensor | None) -> Tensor:
        if self.rows is None:
            return self.rule.backward_weight(weight, random, self.scale)
        whole = None if weight is None or self.whole is None else self.whole.to(weight.dtype)
        return self.rule.backward_weight(whole, random, self.scale)[self.rows]


class _Redrawn(_Given):
    """The same where R is drawn in the backward. ``number``: of the draw."""

    def __init__(self, state: LayerState, number: Tensor, whole: Tensor | None, rows: slice | None) -> None:
        assert isinstance(state.rule, LocalRule) and state.std is not None
        super().__init__(state.rule, None, state.std, whole, rows)
        self.state = state
        self.number = number

    def later(self, weight: Tensor) -> Callable[[], Tensor]:
        whole = weight if self.rows is None or self.whole is None else self.whole
        wiring, name = self.state.wiring, self.state.name
        like = (list(whole.shape), weight.dtype, weight.device)

        def make() -> Tensor:
            own = (str(wiring.seed), name, self.scale, self.rule.magnitude)
            R = redraw.operations().draw(self.number, *like, *own)
            return self.combine(weight if self.keep else None, R)

        return make


# -- functions that Dynamo takes into the graph as they are ----------------------------------------------


def opened(
    key: int,
    name: str,
    written: str,
    outputs: tuple[str, ...],
    walls: tuple[bool, ...],
    *tensors: Tensor,
    first: int = 0,
) -> list[Tensor]:
    """Ports at the inputs of one call.

    Args:
        written: the rule as it is written; here only so that another rule makes another graph.
        outputs: output layers that the feedback is for.
        walls: for each input, whether it is to be a wall (``skip="cut"``).
        tensors: the inputs, then, for each of them in turn, what B of each output layer is made of.
        first: which of the layer's inputs the first of them is.
    """
    state = conversions[key].layers[name]
    rule = state.rule.in_graph() if isinstance(state.rule, DirectRule) else None
    assert rule is not None
    errors: list[OutputError] = []
    port: Callable[..., Tensor] = _Port.apply
    tickets = []
    fixed = iter(tensors[len(walls) :])
    for i, x in enumerate(tensors[: len(walls)], first):
        of_one = dict(zip(outputs, state.fixed_as[i * len(outputs) :], strict=False))
        own = [t for B in of_one.values() for t in itertools.islice(fixed, len(parts(B) or ()))]
        ticket = port(x, state, rule, errors, wall_at(x) if walls[i - first] else None, of_one, *own)
        if ticket.grad_fn is not None:
            metadata(ticket.grad_fn)[_ERRORS] = errors
        tickets.append(ticket)
    return tickets


def closed(y: Tensor, key: int, name: str, count: int, *tensors: Tensor) -> Tensor:
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


def joined(y: Tensor, key: int, name: str, count: int, *tensors: Tensor) -> Tensor:
    """The output of an output layer, joined to the tickets of all calls upstream. ``tensors`` as above."""
    call = _call(key, name, count, tensors)
    state = call.state
    error = OutputError(state, state.kind.axis(y.dim()), None)
    feeders = upstream(call.sources, state.wiring)
    if any(isinstance(f.state.rule, DirectRule) and f.state.rule.needs_targets for f in (call, *feeders)):
        error.targets = given_in_graph(y, error.axis)
    tickets: list[Tensor] = []
    for feeder in [call, *feeders]:
        feeder.errors.append(error)
        tickets.extend(feeder.tickets)
        error.ports += len(feeder.tickets)
        for lower in feeder.own:
            lower.above.append(error)
    if not y.requires_grad and not tickets:
        return y
    call.own = (*call.own, error)
    call.feeders = feeders
    y = _join(y, error, *tickets)
    if y.grad_fn is not None:
        leave(y.grad_fn, call)
    return y


def _exchanged(y: Tensor, x: Tensor, key: int, name: str, rule: str, *random: Tensor) -> Tensor:
    """Let the operation that made y from x hand back what a local rule says."""
    return exchanged(conversions[key].layers[name], y, random)


def exchanged(
    state: LayerState, y: Tensor, random: Sequence[Tensor], whole: Tensor | None = None, rows: slice | None = None
) -> Tensor:
    """y, of which the operation hands back what the local rule says. The rest: as :class:`_Given` has it."""
    assert isinstance(state.rule, LocalRule) and state.std is not None
    if state.rule.random and not random:
        raise PassError(f"layer {state.label} has no feedback yet: run one ordinary training step first")
    if state.rule.redraw:
        backward: _Given = _Redrawn(state, redraw.operations().count(random[0]), whole, rows)
    else:
        backward = _Given(state.rule, random[0] if random else None, state.std, whole, rows)
    if y.grad_fn is not None and not exchange(y, backward, transposed=state.kind.transposed):
        raise PassError(f"layer {state.label}: torch.compile made something of its operation that the rule cannot use")
    return y


_join: Callable[..., Tensor] = _Join.apply


def _call(key: int, name: str, count: int, tensors: tuple[Tensor, ...]) -> Call:
    state = conversions[key].layers[name]
    inputs, tickets = tensors[:count], list(tensors[count:])
    seen = None if not tickets or tickets[0].grad_fn is None else metadata(tickets[0].grad_fn)
    if seen is not None and _ERRORS not in seen:
        raise PassError(f"layer {state.label}: its compiled graph was cut in two{_buckets()}")
    errors = [] if seen is None else seen[_ERRORS]
    return Call(state, [x.grad_fn for x in inputs if x.grad_fn is not None], tickets, errors, len(tickets))


def _check(call: Call, gradients: Any) -> None:
    try:
        check(call, gradients)
    except PassError as problem:
        raise PassError(
            f"{problem}. Under torch.compile a graph break between the two has the same effect (fullgraph=True finds "
            f"it), and so has compiling a part of the model: compile all of it{_buckets()}"
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
    for function in (opened, closed, joined, _exchanged):
        allow(function)
    constant: Callable[..., Any] = torch.compiler.assume_constant_result
    constant(prepare)
    constant(_widened)


def never_alone(forward: Callable[..., Any], *, within: bool = True) -> None:
    """Let no frame of ``forward`` be a compiled graph of its own. As a part of one it is traced.

    Dynamo leaves out frames that it cannot compile (PyTorch's own containers among them, if they are what is compiled),
    and compiles what they call. The layers of a pass, which find each other on one graph, would be on as many as there
    are layers.

    Args:
        within: what it calls may be one.
    """
    with suppress(ImportError, AttributeError):  # not public: without it such passes end in an error
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        inner = _FrameAction.DEFAULT if within else _FrameAction.SKIP
        set_code_exec_strategy(forward.__code__, _FrameExecStrategy(_FrameAction.SKIP, inner))


def _nowhere() -> None:
    return None


# What compiles frames where this is called; None outside of what is to be compiled.
compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", _nowhere)


def _widened(key: int, name: str, dtype: torch.dtype) -> bool:
    """Run when a call is compiled: see :func:`rewire.ready.widen`."""
    ready.widen(conversions[key].layers[name], dtype)
    return True


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
_tracing: Callable[[], Any] = torch._C._get_tracing_state
_NO_EXPORT = (
    "rewire: an exported or traced program has PyTorch's own backward in place of the rules of a converted model. Call "
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


def in_jit(training: bool) -> bool:
    """:func:`exports` for what ``torch.jit`` traces (TensorBoard's graphs and the older ONNX exporter too)."""
    if _tracing() is None:
        return False
    if training:
        _cannot_export()
    return True


@contextmanager
def as_it_was(state: LayerState, training: bool) -> Iterator[None]:
    """Around a call of a layer that ``torch.jit`` traces: its forward runs without any rule, as in an exported program.

    Raises:
        PassError: in training mode, as for :func:`exports`.
    """
    me = get_ident()
    if not torch.is_grad_enabled() or not in_jit(training) or me in state.busy:
        yield
        return
    before = state.steady, state.watched
    state.steady, state.watched = "", True  # the way through a call that asks whether the layer is running
    state.busy.add(me)
    try:
        yield
    finally:
        state.busy.discard(me)
        state.steady, state.watched = before


def outside(state: LayerState, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """A call that is a break of the graph."""
    left_out(state)
    return run(state, module, forward, args, kwargs)


def left_out(state: LayerState) -> None:
    """A layer of a compiled model runs outside of any graph."""
    if isinstance(state.rule, DirectRule):
        ready.part(state.wiring)


# -- traced by Dynamo ----------------------------------------------------------------------------------


def lacks(state: LayerState, args: Any, kwargs: Any) -> bool:
    """Whether an input needs a gradient where none has before (something below was frozen): no feedback is there."""
    if state.has_feedback:
        return False
    return any([isinstance(x, Tensor) and x.requires_grad for x in tree_flatten((args, kwargs))[0]])


def call(state: LayerState, module: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """One call of one layer, as part of a compiled graph."""
    rule, key = state.rule, state.wiring.key
    leaves, spec = tree_flatten((args, kwargs))  # a block may be given lists of tensors
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    tickets: list[Tensor] = []
    if inputs:
        _widened(key, state.name, inputs[0].dtype)
    if isinstance(rule, DirectRule):
        if inputs:
            # As in eager mode a leaf has none. To the graph itself all its inputs look alike.
            walls = tuple([state.wiring.skip == "cut" and not x.is_leaf for x in inputs])
            tickets = opened(key, state.name, state.written, state.fixed_outputs, walls, *inputs, *state.fixed)
        args, kwargs = tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], spec)
        y = forward(module, *args, **kwargs)
    else:
        y = forward(module, *args, **kwargs)
        if inputs and isinstance(rule, LocalRule):
            y = _exchanged(y, inputs[0], key, state.name, state.written, *state.fixed)
    if state.role is Role.OUTPUT:
        state.wiring.errors = {}  # a compiled pass notes none, and that of an earlier pass is not its
    if state.joins_traced:
        return joined(y, key, state.name, len(inputs), *inputs, *tickets)
    return closed(y, key, state.name, len(inputs), *inputs, *tickets) if tickets else y
