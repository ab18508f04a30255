"""The way from an output error to a layer's input: where its rows go, and the B on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.errors import PassError, RoutingError
from rewire.layer_feedback import keep
from rewire.routing import Route, route_to
from rewire.rules.base import DirectRule
from rewire.structures import Feedback, Structure

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.state import LayerState

# How one shape of e reaches one shape of x, the feedback on the way, and the shape of its dense equivalent.
Way = tuple[Route, Tensor | Feedback, tuple[int, ...]]

_ROUTES = 256  # that a layer remembers: the number of an output's rows may be another in each pass
_AND_OTHERS = " and, likewise, others below that output layer"


def find(
    state: LayerState,
    rule: DirectRule,
    error: OutputError,
    index: int,
    shape: torch.Size,
    e_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Route, Tensor | Feedback]:
    """The way to an input of ``shape`` and ``dtype``, looked for once; what it shows of B is noted in the state.

    Raises:
        RoutingError: if there is none.
        PassError: under a rule that learns, if some errors need a B with a value for every element and others do not.
    """
    structure = state.structure(rule)
    key = (error.state.name, index, shape, e_shape, dtype, device, rule.layout, state.order, structure, state.stacked)
    routes = state.routes  # as ``made`` in _route
    found = routes.get(key)
    if found is None:
        if len(routes) >= _ROUTES:
            routes = state.routes = {}
        found = routes[key] = _route(state, rule, structure, error, index, shape, e_shape, dtype, device)
    route, feedback, needed = found
    if state.learns and (error.state.name, index) not in state.shapes:
        _alike(state, rule, index, error.state.label, needed)
    state.shapes[error.state.name, index] = needed
    state.structures[error.state.name, index] = structure
    state.kept_as[error.state.name, index] = dtype, device
    return route, feedback


def _alike(state: LayerState, rule: DirectRule, index: int, output: str, needed: tuple[int, ...]) -> None:
    """B of all output layers are learned together, so they have to be of one kind."""
    for (other, i), shape in state.shapes.items():
        if i == index and (len(shape) > 2) != (len(needed) > 2):
            kinds = "every element of an image", "every channel"
            this, that = kinds if len(needed) > 2 else kinds[::-1]
            raise PassError(
                f"layer {state.label}: {rule!r} learns B of all output layers together, but for the error of {output} "
                f"it has a value for {this}, and for that of {other!r} one for {that}: use feedback='channel', in "
                "convert or as an option of the rule"
            )


def plan(
    state: LayerState, rule: DirectRule, error: OutputError, shape: torch.Size, e_shape: torch.Size, structure: str
) -> Route:
    """The way from a signal of ``e_shape`` to an input of ``shape``."""
    above = error.state.rule
    return route_to(
        tuple(shape),
        state.kind.axis(len(shape)),
        tuple(e_shape),
        error.axis,
        structure=structure,
        layout=rule.layout,
        e_layout=above.layout if isinstance(above, DirectRule) else rule.layout,
        seen=state.order,
        stacked=state.stacked,
        hint=state.layout,
    )


def _route(
    state: LayerState,
    rule: DirectRule,
    structure: Structure,
    error: OutputError,
    index: int,
    shape: torch.Size,
    e_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Way:
    wiring = state.wiring
    try:
        route = plan(state, rule, error, shape, e_shape, structure.routing)
    except RoutingError as problem:
        raise _none(state, error.state, str(problem)) from None
    if route.reading is not None:
        state.reading = route.reading
        wiring.readings.add(route.reading)
        for other in wiring.layers.values():  # what one layer shows may decide what another's shapes mean
            other.last = None
    if route.ambiguous is not None:
        _say_guess(state, error.state, f"its input of shape {tuple(shape)}", e_shape, route)
    needed = route.feedback_shape
    # All shapes of x that need the same B share it: a short last batch, another sequence length.
    key = (structure, error.state.name, index, needed, dtype, device)
    made = state.made  # of the scale as it is: another thread may take in a measured one, and begin anew
    feedback = made.get(key)
    if feedback is None:
        feedback = keep(state, made, key)
    if isinstance(feedback, Feedback) and feedback.width != needed[0]:
        route = plan(state, rule, error, shape, heard(feedback, e_shape, error.axis), structure.routing)
    return route, feedback, needed


def lead_to(state: LayerState, above: LayerState, lead: tuple[int, ...], e: Tensor) -> Tensor:
    """``e`` of the output layer ``above``, with a row for each of the rows ``lead`` of a tensor on the way to a layer.

    Raises:
        RoutingError: if there is no way to that tensor.
    """
    axis, rule, over = above.kind.axis(e.dim()), state.rule, above.rule
    layout = rule.layout if isinstance(rule, DirectRule) else None
    n = e.shape[axis]
    try:
        route = route_to(
            (*lead, n),
            -1,
            tuple(e.shape),
            axis,
            structure="channel",
            layout=layout,
            e_layout=over.layout if isinstance(over, DirectRule) else layout,
            seen=state.order,
            hint=state.layout,
        )
    except RoutingError as problem:
        how = f"its rows are put, by an index, into a tensor with {tuple(lead)} rows, and for those there is"
        raise _none(state, above, f"{how} {problem}") from None
    if route.ambiguous is not None:
        _say_guess(state, above, f"what its rows are put into by an index, {tuple(lead)} rows", e.shape, route)
    return route.through(e, lambda rows: rows)


def _none(state: LayerState, above: LayerState, problem: str) -> RoutingError:
    """There is no way from an output layer to a layer."""
    return RoutingError(
        f"layer {state.label} (output layer {above.label}): {problem}. Keep the layer on backprop or a "
        f"local rule, layers={{{state.name!r}: 'bp'}}, or feed back a larger unit that has the batch in "
        "front, blocks=[...]"
    )


def _say_guess(state: LayerState, above: LayerState, what: str, e_shape: torch.Size, route: Route) -> None:
    """Shapes fit more than one way."""
    make = f"{type(state.rule).__name__}(layout='sequence_first')"
    others = _AND_OTHERS if route.common else ""
    state.guess = f"{what} is {route.ambiguous}: a guess"
    way_out = (
        f"or, if it is neither, put that layer and those below it under a local rule, layers={{{state.name!r}: 'fa'}}"
        if route.common
        else f"or keep the layer on backprop, layers={{{state.name!r}: 'bp'}}"
    )
    state.wiring.warn_once(
        f"layout:{above.name}:below:{route.kind}" if route.common else f"layout:{state.name}",
        f"layer {state.label}{others}: {what}, for an output error of shape "
        f"{tuple(e_shape)}, is {route.ambiguous}. Say which it is with the rule's layout, 'batch_first' or "
        f"'sequence_first': convert(model, {make}), or layers={{{state.name!r}: {make}}}; {way_out}",
    )


def heard(feedback: Tensor | Feedback, e_shape: torch.Size, axis: int) -> torch.Size:
    """Shape of what ``feedback`` multiplies in place of a signal of ``e_shape``, whose features are at ``axis``."""
    if isinstance(feedback, Tensor):
        return e_shape
    features = axis % len(e_shape)
    return torch.Size([*e_shape[:features], feedback.width, *e_shape[features + 1 :]])
