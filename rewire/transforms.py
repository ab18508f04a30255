"""Calls inside ``torch.func`` transforms, which have no hooks: the output layer projects to all inputs itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire.edges import carry, project
from rewire.errors import PassError
from rewire.layers.kinds import Forward
from rewire.marks import sources_of
from rewire.passes import Call, OutputError, leave, upstream
from rewire.roles import Role
from rewire.rules.base import DirectRule
from rewire.stacked import given_direct
from rewire.state import LayerState
from rewire.targets import current_targets


def transformed(
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
    _refuse_forward_mode(state, leaves)
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


def transformed_output(state: LayerState, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An output layer under ``bp`` or a local rule, with direct rules somewhere below it."""
    if not any(isinstance(other.rule, DirectRule) for other in state.wiring.layers.values()):
        return y
    _require_known(state, waiting=False)
    if state.role is not Role.OUTPUT:
        return y
    return _project(state, Call(state, sources_of(args, kwargs), [], []), y)


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


def _refuse_forward_mode(state: LayerState, leaves: list[Any]) -> None:
    """Cut off from its input, a layer would have a derivative of zero."""
    if forward_ad._current_level < 0:
        return
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if any(isinstance(x, Tensor) and unpack(x).tangent is not None for x in leaves):
        raise PassError(
            f"layer {state.label}: forward-mode derivatives (torch.func.jvp, jacfwd) do not know of {state.rule!r}, "
            "which says what is handed back: take them under rewire.use_rule(model, 'bp')"
        )


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
