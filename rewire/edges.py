"""The autograd nodes of direct rules: port, probe and join.

A layer under a direct rule runs its own operation on ``x.detach()``, so its weight gradients are PyTorch's
own and no gradient flows from its output to its input. What x gets instead comes through one of these:

- :class:`Port` sits at x and gives out a *ticket*, a scalar nobody reads. The output layer's :class:`Join`
  takes all tickets of the pass as inputs. Autograd runs a node only after all nodes that use its output,
  so e is known before any port runs; and it runs ready nodes newest first, so each port runs just before
  the layer below it and feedback never piles up.
- :class:`Probe` sits between x and the operation while a layer is not settled (its scale or its role is not
  known yet): there the layer's exact gradient passes by and can be measured.
- :class:`Project` is Join and all ports in one pure function, for ``torch.func`` transforms, where nothing
  may be remembered on the side.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from rewire.errors import PassError, RewireWarning
from rewire.nodes import Node
from rewire.passes import CALL, Call, OutputError, backward_id, metadata
from rewire.picks import Pick
from rewire.structures.base import Cache

if TYPE_CHECKING:
    from rewire.rules.base import DirectRule
    from rewire.state import LayerState


_current_node: Callable[[], Any] = torch._C._current_autograd_node
_graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def alias(y: Tensor) -> Tensor:
    """``y`` as a tensor of its own over the same memory, not a view in autograd's eyes.

    An in-place operation on a view that a custom Function returned is an error, and one on a view that
    PyTorch returned replaces its graph node; neither happens to this.
    """
    out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return out


class Wall:
    """Makes a fed-back tensor a wall (``skip="cut"``): its gradient is what was fed back, and nothing else."""

    def __init__(self) -> None:
        self.fed: Tensor | None = None

    def add(self, fed: Tensor) -> None:
        """Note what one port hands back; several layers may share the tensor."""
        self.fed = fed if self.fed is None else self.fed + fed

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        """The tensor's hook: replaces the sum of all gradients, skip connections' included."""
        fed, self.fed = self.fed, None
        return torch.zeros_like(gradient) if fed is None and gradient is not None else fed


def wall_at(x: Tensor) -> Wall | None:
    """The wall at x, made when first asked for. A leaf has none: nothing below it could be reached."""
    if x.grad_fn is None:
        return None
    walls: dict[int, Wall] = metadata(x.grad_fn).setdefault("rewire.walls", {})
    wall = walls.get(x.output_nr)
    if wall is None:
        wall = walls[x.output_nr] = Wall()
        register: Callable[..., Any] = x.register_hook
        register(wall)
        hooks: Any = x._backward_hooks
        for key in [*hooks][:-1]:  # those there before see what is fed back, as those to come do
            hooks[key] = hooks.pop(key)
    return wall


# One tensor per device; every ticket is an alias of it. Nobody reads its value, but its device decides
# in which stream autograd runs the port.
_tickets: dict[torch.device, Tensor] = {}


# Where one input's feedback comes from, as its port or probe needs it in the backward: the layer, its rule when
# the forward ran, the errors that output layers downstream have added, which of the layer's inputs this is, the wall
# there, if any, how its rows were picked from the batch, if they were, and what a rule whose feedback learns will want
# of the input. A tuple, because one is made in every call.
Feed = tuple["LayerState", "DirectRule", list[OutputError], int, Wall | None, Pick | None, Tensor | None]


def laid_out(x: Tensor) -> torch.memory_format:
    """How x lies in memory: what comes back to it had better lie the same way."""
    dims = x.dim()
    if 4 <= dims <= 5 and not x.is_contiguous():
        last = torch.channels_last if dims == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


# Backwards of operations on each number alone. A gradient that is the same for many numbers (with strides of 0) they
# read as fast as any other, and what they make of it is written out in full.
_IN_PIECES = ("Elu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Relu")
_SMOOTH = ("Gelu", "Mish", "Sigmoid", "Silu", "Softplus", "Tanh")
_NUMBER_BY_NUMBER = frozenset(f"{name}Backward0" for name in (*_IN_PIECES, *_SMOOTH))
# And one that writes them out in full itself.
READ_REPEATED = _NUMBER_BY_NUMBER | {"NativeLayerNormBackward0"}


def _feed(ctx: Any) -> Tensor | None:
    """The feedback of all errors that arrived in this backward pass, for the input of a port or probe."""
    state, rule, errors, index, wall, pick, seen = ctx.feed
    fed: Tensor | None = state.hand_back(rule, errors, index, *ctx.like, pick, seen)
    if fed is None:
        return None
    if not (0 in fed.stride() and _may_repeat(ctx)):
        fed = fed.contiguous(memory_format=ctx.layout)
    if wall is not None:
        wall.add(fed)
    return fed


def _may_repeat(ctx: Any) -> bool:
    """Whether what reads a port's gradient next does not mind numbers that are there once for many places."""
    reader = ctx.next_functions[0][0]
    return len(ctx.like[0]) > 2 and ctx.layout is torch.contiguous_format and reader.name() in _NUMBER_BY_NUMBER


class Port(Function):
    """x -> ticket; backward: x's gradient is its layer's feedback of the errors that arrived."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, feed: Feed) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.feed = feed
        device = x.device
        ctx.like = (x.shape, x.dtype, device)
        ctx.layout = laid_out(x)
        if device not in _tickets:
            _tickets[device] = torch.zeros((), device=device)
        return _tickets[device].detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return _feed(ctx), None


class Probe(Function):
    """Identity on the way into an unsettled layer's operation; backward sees the exact gradient.

    With a scale to be measured, or feedback that learns from this pass, the exact gradient is handed on and noted. With
    a given scale only the output layer was unknown: the rule's feedback is handed on in place of the exact gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, feed: Feed) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.feed = feed
        ctx.learn = feed[0].exact
        ctx.like = (x.shape, x.dtype, x.device)
        ctx.layout = laid_out(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, exact: Tensor | None) -> tuple[Tensor | None, None]:
        state, rule, errors, index, _, pick, seen = ctx.feed
        measure = state.needs_scale(rule)
        if not measure and not ctx.learn:
            return _feed(ctx), None
        if exact is not None:
            if ctx.learn:
                state.study(rule, errors, index, exact, pick, seen)
            if measure:
                state.measure(rule, errors, index, exact, pick)
            else:
                state.done(errors)
        return exact, None


class Join(Function):
    """Identity on a layer's output y that takes tickets; backward: the gradient at y is e.

    Where e B is small, x itself takes the ticket's place and is handed it here.

    Also used without an ``error`` to keep the graph in one piece where y alone has no gradient (a frozen
    layer under a direct rule).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, error: OutputError | None, handed: list[Handed], *tensors: Tensor) -> Tensor:
        """
        Args:
            handed: of the last ones of ``tensors``, in their order; the others are tickets.
        """
        ctx.set_materialize_grads(False)
        ctx.error, ctx.handed = error, handed
        ctx.tickets = len(tensors) - len(handed)
        # Here, inside a Function, an alias that is no view, and that shares y's version counter: changing it in
        # place is allowed or refused exactly as for y itself.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        error: OutputError | None = ctx.error
        handed: list[Handed] = ctx.handed
        fed: list[Tensor | None] = [None] * len(handed)
        if error is not None and gradient is not None:
            state = error.state
            # A part that is run again ends at a layer that may only look like an output layer. Where nobody is handed
            # its error, and passes do not count, nothing comes of that.
            if error.nested:
                if error.ports or handed:
                    raise PassError(reentrant_message(state.label))
                if state.wiring.counts:
                    raise PassError(reentrant_message(state.label, "from rules that count passes when one begins"))
            if state.wiring.error_reached(state, error, gradient):
                if handed:
                    fed = _made(handed, error)
                error.let_go()
        return (gradient, None, None, *(None,) * ctx.tickets, *fed)


# What a join hands e B to: the call whose x it is, the shape of x, the rule, and B.
Handed = tuple[Call, torch.Size, "DirectRule", Tensor]


def _made(handed: list[Handed], error: OutputError) -> list[Tensor | None]:
    fed: list[Tensor | None] = []
    free = not _graph_is_kept()
    newest: DirectRule | None = None
    for call, shape, rule, B in handed:
        if rule is not newest:
            newest, signal = rule, error.signal(rule)
        if len(shape) == 2:
            fed.append(torch.mm(signal, B))
        else:  # (N, positions..., features): the same at all positions
            eB = torch.mm(signal, B).view(shape[0], *(1,) * (len(shape) - 2), shape[-1])
            fed.append(eB.expand(shape))
        if free:  # x need not outlive its own layer's backward
            call.mirrored = None
    return fed


class Project(Function):
    """Identity on an output layer's y; backward: e goes to y, and its feedback to each x, at once.

    A pure function of its tensor inputs, so every ``torch.func`` transform applies.

    Inputs: y, the targets or None, the output error's place, the fed (layer, rule, input, whether B is given), the
    fed tensors x in the same order, and then the B that are given (:mod:`rewire.stacked`). Others are the layers' own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor,
        targets: Tensor | None,
        error: OutputError,
        plan: Sequence[tuple[LayerState, DirectRule, int, bool]],
        *tensors: Tensor,
    ) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, targets, ctx.error, ctx.plan, *tensors = inputs
        count = len(ctx.plan)
        ctx.shapes = [(x.shape, x.dtype) for x in tensors[:count]]
        ctx.save_for_backward(targets, *tensors[count:])

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        error: OutputError = ctx.error
        targets, *given = ctx.saved_tensors
        signals: dict[DirectRule, Tensor] = {}
        shared: Cache = {}
        fed: list[Tensor] = []
        own = iter(given)
        for (state, rule, index, is_given), (shape, dtype) in zip(ctx.plan, ctx.shapes, strict=True):
            if rule not in signals and not rule.silent:
                signals[rule] = rule.signal(e, targets, error.axis)
            signal = signals.get(rule, e)
            B = next(own) if is_given else None
            fed.append(state.project(rule, error, signal, index, shape, dtype, e.device, shared, B).contiguous())
        return (e, None, None, None, *fed, *(None for _ in given))


class Carry(Function):
    """Identity on y that keeps x in its graph without handing anything back; for ``torch.func`` transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape)


def eager(function: type[Function]) -> Callable[..., Tensor]:
    """A Function's ``apply`` without the dispatch to ``torch.func`` transforms, which costs microseconds a call."""
    plain: Any = super(Function, function)
    apply: Callable[..., Tensor] = plain.apply
    return apply


port = eager(Port)
probe = eager(Probe)
join = eager(Join)
# ``Function.apply`` is not annotated in PyTorch; these are.
project: Callable[..., Tensor] = Project.apply
carry: Callable[..., Tensor] = Carry.apply


# PyTorch takes the hooks of a tensor to its node, and that need not be the node's own output: handing over those of a
# tensor that is there already is all there is to do in each call of a hidden layer. ``register_hook`` makes a dict and
# a handle each time, and with a hook of the call's own, what the output holds would hold the call.
def _at_hidden(gradient: Tensor | None) -> None:
    """Hook of the outputs of all hidden layers: the call lies on the node under way."""
    node: Any = _current_node()
    if node is None:
        warnings.warn(_COMPILED_BACKWARD, RewireWarning, stacklevel=2)
        return
    call: Call | None = node.metadata.get(CALL)
    if call is not None and (call.nested or not call.errors):
        _refuse(call, gradient)


_COMPILED_BACKWARD = (
    "compiled autograd hides which layer a gradient arrives at: a layer under a direct rule that no output error can "
    "reach would go unnoticed. Run one step without it, or rewire.verify, to see that there is none"
)
_hidden = torch.empty(0)
_hidden._backward_hooks = OrderedDict(rewire=_at_hidden)


def look(node: Node) -> None:
    """Have :func:`check` look at the gradient of the (first) output of a node, where a hidden layer's call was left."""
    node._register_hook_dict(_hidden)


_mine = threading.local()  # of each thread: a tensor that lends hooks to a node


def listen(node: Node, errors: Sequence[OutputError]) -> None:
    """Have the gradient of the (first) output of a node taken for that of an output layer whose error nobody awaits."""
    try:
        lender = _mine.lender
    except AttributeError:
        lender = _mine.lender = torch.empty(0)
    lender._backward_hooks = {"rewire": partial(_arrived, errors)}
    node._register_hook_dict(lender)
    lender._backward_hooks = None


def guard(y: Tensor, node: Node, call: Call) -> None:
    """Have :func:`check` look at the gradient of y, the output of a hidden layer's ``call``."""
    if backward_id() != -1:
        call.nested = True
    if type(y) is Tensor and y.output_nr == 0:
        look(node)
    else:  # of a kind that hooks may mean something else to, or one of several outputs
        node.register_prehook(partial(check, call))


def _arrived(errors: Sequence[OutputError], gradient: Tensor | None) -> None:
    """An output layer whose error nobody waits for."""
    if gradient is not None:
        for error in errors:
            error.state.wiring.error_reached(error.state, error, gradient)
            error.let_go()


def check(call: Call, gradients: Sequence[Tensor | None]) -> None:
    """Hook of the node of a hidden layer's output: a gradient there, but no output error to come, is an error.

    Args:
        gradients: what arrived at the output.
    """
    if call.nested or not call.errors:
        for gradient in gradients:
            _refuse(call, gradient)


def _refuse(call: Call, gradient: Tensor | None) -> None:
    state = call.state
    if call.nested:
        raise PassError(reentrant_message(state.label))
    if gradient is not None:
        label, name, wiring = state.label, state.name, state.wiring
        out = any(wiring.layers[name].gone for name in wiring.outputs if name in wiring.layers)
        raise PassError(
            f"layer {label} got a gradient, but no output error can reach it: its output went to the loss without "
            f"passing output layer {wiring.outputs_label()}. {_TAKEN_OUT if out else ''}Call the whole model; or name "
            f"every layer the loss sees, output=[...]; or keep this part on backprop, layers={{{name!r}: 'bp'}}; or "
            f"run it under rewire.use_rule(model, 'bp') or torch.no_grad(){_STAGES if _pipelining() else ''}"
        )


_TAKEN_OUT = "That was taken out of the model, or restored, since: convert again. "
_STAGES = (
    ". Of a pipeline only the last stage has the output error: use a local rule, layers={...: 'fa'}, in the others"
)


def _pipelining() -> bool:
    return "torch.distributed.pipelining" in sys.modules


def reentrant_message(label: str, hides: str = "the layer from the output error") -> str:
    """What to say when a layer ran inside a backward pass that then went through it."""
    return (
        f"layer {label} was run again inside a backward pass that goes through it: re-entrant activation "
        f"checkpointing hides {hides}. Use checkpoint(..., use_reentrant=False). For a library that runs modules "
        "inside of a backward by itself: rewire.use_rule(model, 'bp') around all of it, or rewire.restore(model)"
    )
