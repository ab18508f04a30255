"""The short ways through a call: what nearly every call of a settled layer is, written out in one place.

Everything that is special about a call sends it back to :func:`rewire.run.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewire.edges import READ_REPEATED, alias, guard, listen, look, port
from rewire.exchange import exchange, exchangeable, swapped
from rewire.kernels import linear
from rewire.layers.kinds import BackwardWeight, Forward
from rewire.local_weights import LocalWeight, local_weight
from rewire.marks import finish, joined, mark, mark_all, sources_of
from rewire.nodes import Node
from rewire.passes import CALL, Call, OutputError, backward_id
from rewire.routing import LAYOUTS
from rewire.run import idle, run
from rewire.state import LayerState
from rewire.uses import input_of

if TYPE_CHECKING:
    from rewire.attention import Seat

# Looked up once: these run in every call of every layer.
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

_NONE: tuple[Any, ...] = ()
_VIEWED = 2**16  # numbers that an output may have whose view is left as it is: see _small


def steady_direct(state: LayerState, module: nn.Module, forward: Forward, fast: Forward, x: Tensor) -> Any:
    """:func:`run` for nearly every call there is: a settled hidden layer under a direct rule, with one input.

    Written out in one place because every Python function more is felt in small layers, and more so when the
    weights of large ones have swept the cache.
    """
    wiring = state.wiring
    if wiring.unsettled or _transforming():
        return run(state, module, forward, (x,), {})
    if not x.requires_grad:  # there is nothing to hand back to: the first layer of a network
        y = fast(module, x)
        if type(y) is not Tensor or not y.requires_grad or state.idle or y._is_view() or (made := y.grad_fn) is None:
            return _first(state, fast, y)
        made.metadata[CALL] = Call(state, _NONE, _NONE, [])  # type: ignore[index]
        return y
    if not state.settled:
        return run(state, module, forward, (x,), {})
    if state.idle:
        state.wake()
    node = x.grad_fn
    call = Call(state, _NONE if node is None else (node,), _NONE, [])
    B, shape = state.mirror, x.shape
    if (
        B is not None
        and len(shape) > 1
        and shape[-1] == state.held
        and shape[0] <= wiring.held_rows
        and (_repeats(shape, node) if state.repeats else len(shape) == 2)
        and x.dtype is B.dtype
        and x.device == B.device
        and not _autocast()
    ):
        # e B is small: it is made as soon as e is known, by the join, which needs x itself and no ticket.
        call.mirrored = x, shape, state.rule, B  # type: ignore[assignment]
    else:
        _ask(call, x, 0)
    y = fast(module, x.detach())
    if type(y) is not Tensor or not y.requires_grad:
        if not call.tickets and not (isinstance(y, Tensor) and y.requires_grad):
            call.mirrored = None
            _ask(call, x, 0)  # a frozen layer: something has to tie y to the graph
        return mark(state, call, y, joins=False) if isinstance(y, Tensor) else mark_all(state, call, y, joins=False)
    if y._is_view():
        if not _small(y, fast):
            return mark(state, call, y, joins=False)
        guard(*_leave(y, call), call)
        return y
    made = y.grad_fn
    if made is None:  # cut off from the graph, by a forward of its own
        return y
    made.metadata[CALL] = call  # type: ignore[index]
    if backward_id() == -1 and y.output_nr == 0:  # as guard would see, in a function more
        look(made)
    else:
        guard(y, made, call)
    return y


def _ask(call: Call, x: Tensor, index: int) -> None:
    """Have ``call``'s input x fed back by a port, which will ask for e.

    Args:
        index: which of the layer's inputs x is.
    """
    state = call.state
    call.tickets = (port(x, (state, state.rule, call.errors, index, None, None, None)),)
    call.ports = 1


def _repeats(shape: torch.Size, node: Node | None) -> bool:
    """Whether an input of this shape, (N, positions..., features), may be handed e B once for all positions.

    Nothing is written out then, so that is for whatever made x.
    """
    return (
        len(shape) > 2
        and shape[0] != shape[1]  # which of the two is the batch could not be told
        and node is not None
        and node.name() in READ_REPEATED
    )


def _small(y: Tensor, fast: Forward) -> bool:
    """Whether a view of what a linear layer made may stay one.

    An alias in its place costs microseconds, but in-place operations on a view cost more than on other tensors.
    """
    return fast is linear and y.numel() <= _VIEWED


def _leave(y: Tensor, call: Call) -> tuple[Tensor, Node]:
    """Leave ``call`` at y, the result of an operation or a linear layer's view of it; returns that result and its node.

    An in-place operation on a view replaces the view's node, but not the one of what it is a view of.
    """
    made: Any = y.grad_fn
    made.metadata[CALL] = call
    base = y._base if y._is_view() else None
    if base is None or base.grad_fn is None:
        return y, made
    base.grad_fn.metadata[CALL] = call  # type: ignore[index]
    return base, base.grad_fn


def steady_projection(
    state: LayerState,
    weight: Tensor,
    x: Tensor,
    view: Tensor,
    bias: Tensor | None,
    seat: Seat,
    within: Sequence[Node] | None,
) -> Tensor | None:
    """:func:`rewire.uses.call` for nearly every projection there is: a settled hidden layer of PyTorch's attention.

    Args:
        x: as the attention's function has it.
        view: the layer's ``weight``, or rows of it.
        seat: how x lies in the model around the attention.
        within: if x can be made of nothing else, the nodes of what the attention's other projections made: the way to
            them need not be walked.

    Returns:
        None for a call that is special after all.
    """
    if state.wiring.unsettled or state.observer is not None or not x.requires_grad or state.idle or _transforming():
        return None
    if state.steady_use == "local":
        return _exchanged_projection(state, weight, x, view, bias)
    if seat.batched and state.layout != LAYOUTS[0 if seat.batch_first else 1]:
        return None
    outer = seat.outer(x)
    if within is None or state.wiring.pours:
        within = _NONE if outer.grad_fn is None else (outer.grad_fn,)
    call = Call(state, within, _NONE, [])
    _ask(call, outer, input_of(state, view, weight, -1))
    y = F.linear(x.detach(), view, bias)
    if not y.requires_grad or (y._is_view() and y.numel() > _VIEWED):
        return mark(state, call, y, joins=False)
    guard(*_leave(y, call), call)
    return y


def _first(state: LayerState, fast: Forward, y: Any) -> Any:
    """What is left to do about the output y of a layer whose input needs no gradient, where something is special."""
    if type(y) is not Tensor or not y.requires_grad:
        return idle(state, y)
    if state.idle:
        state.wake()
    if y._is_view() and not _small(y, fast):
        return finish(state, y, _NONE, _NONE, [], 0)
    if y.grad_fn is not None:
        _leave(y, Call(state, _NONE, _NONE, []))
    return y


def steady_local(state: LayerState, module: nn.Module, forward: Forward, fast: Forward, x: Tensor) -> Any:
    """:func:`run` for a hidden layer under a local rule whose operation's weight can be exchanged."""
    if state.wiring.unsettled or not exchangeable():
        return run(state, module, forward, (x,), {})
    y = _exchanged(state, module, forward, x)
    return run(state, module, forward, (x,), {}) if y is None else y


def _exchanged(state: LayerState, module: nn.Module, forward: Forward, x: Tensor) -> Any:
    """The layer's output, B being where its operation keeps its weight; None if that cannot be."""
    if not x.requires_grad:
        y = forward(module, x)
        if not y.requires_grad:
            return idle(state, y)
        if state.idle:
            state.wake()
        return y
    if state.idle:
        state.wake()
    backward = _weight_of(state)
    hooks = backward.exchange
    B = None if hooks is None or not hooks.turned else hooks.fixed
    if B is not None and type(module).__base__ is nn.Linear and type(x) is Tensor and x.dim() == 2 and not _autocast():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if type(weight) is nn.Parameter and type(bias) is nn.Parameter:
            kept = weight.t()
            # A mode that traces operations (make_fx) would not see that numbers are exchanged.
            if kept.dtype is B.dtype and kept.shape == B.shape and kept.device == B.device and not _dispatch_modes():
                state.wiring.swapped = True
                return swapped(x, kept, bias, B)
    y = forward(module, x)
    return y if exchange(y, backward, transposed=state.kind.transposed) else None


def _exchanged_projection(
    state: LayerState, weight: Tensor, x: Tensor, view: Tensor, bias: Tensor | None
) -> Tensor | None:
    """:func:`steady_projection` under a local rule: the same as :func:`_exchanged` for a weight that is used whole."""
    if view is not weight or not exchangeable():
        return None
    backward = _weight_of(state)
    backward.note(weight)
    y = F.linear(x, view, bias)
    return y if exchange(y, backward, transposed=False) else None


def _weight_of(state: LayerState) -> BackwardWeight:
    """:func:`local_weight` without the cases that a settled layer outside of transforms cannot be in."""
    rule: Any = state.rule
    made = state.local
    return made if type(made) is LocalWeight and made.rule is rule and not rule.redraw else local_weight(state, rule)


def steady_output_direct(state: LayerState, module: nn.Module, forward: Forward, fast: Forward, x: Tensor) -> Any:
    """:func:`run` for an output layer under a direct rule: its join hands back to its own input as well."""
    B, shape = state.mirror, x.shape
    fits = B is not None and x.dtype is B.dtype and len(shape) == 2 and x.device == B.device and not _autocast()
    fits = fits and shape[1] == state.held
    if not fits or not x.requires_grad or state.idle or state.wiring.unsettled or _transforming():
        return run(state, module, forward, (x,), {})
    node = x.grad_fn
    call = Call(state, _NONE if node is None else (node,), _NONE, [])
    call.mirrored = x, shape, state.rule, B  # type: ignore[assignment]
    y = fast(module, x.detach())
    if type(y) is not Tensor:
        return mark(state, call, y, joins=True) if isinstance(y, Tensor) else mark_all(state, call, y, joins=True)
    y = joined(state, call, y)
    if y.grad_fn is not None:
        y.grad_fn.metadata[CALL] = call  # type: ignore[index]
    return y


def steady_output_local(state: LayerState, module: nn.Module, forward: Forward, fast: Forward, x: Tensor) -> Any:
    """:func:`run` for the only output layer of a network without direct rules.

    Nobody waits for e, so nothing needs to be joined: that e is seen when it arrives is enough. With a second call
    before that, one may be the output of the pass and the other not; the join of the second finds out.
    """
    wiring = state.wiring
    if state.called or not wiring.local or not wiring.certain or wiring.unsettled or not exchangeable():
        return run(state, module, forward, (x,), {})
    if backward_id() != -1:
        return run(state, module, forward, (x,), {})
    y = _exchanged(state, module, forward, x)
    if y is None:
        return run(state, module, forward, (x,), {})
    if not y.requires_grad:
        return y
    if type(y) is not Tensor:
        return finish(state, y, sources_of((x,), {}), _NONE, [], 0)
    if y._is_view():
        y = alias(y)  # as in :func:`rewire.marks.mark`
    state.called = True
    wiring.errors.pop(state.name, None)  # the newest pass has no error yet
    error = OutputError(state, state.kind.axis(y.dim()), None)
    call = Call(state, _NONE, _NONE, [])
    call.own = (error,)
    made = y.grad_fn
    made.metadata[CALL] = call  # type: ignore[union-attr, index]
    listen(made, call.own)  # type: ignore[arg-type]
    return y


# (layer, module, its own forward, one that is faster where the input needs no gradient or the same, x)
Steady = Callable[[LayerState, nn.Module, Forward, Forward, Tensor], Any]


# By LayerState.steady.
STEADY: dict[str, Steady] = {
    "direct": steady_direct,
    "local": steady_local,
    "output-direct": steady_output_direct,
    "output-local": steady_output_local,
}
