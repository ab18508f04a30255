"""What a layer under a direct rule hands back: e B, for each output error that arrived.

Runs in the backward of every call, so these are methods of :class:`~rewire.state.LayerState`, not functions it calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire import learning
from rewire.routing import Route
from rewire.rules.base import DirectRule
from rewire.structures import Feedback
from rewire.structures.base import Cache
from rewire.ways import find

if TYPE_CHECKING:
    from rewire.passes import OutputError
    from rewire.picks import Pick
    from rewire.state import LayerState

_HELD = 2**18  # numbers that all layers' feedback may have where all of it is made at once: what a cache holds


def hand_back(
    state: LayerState,
    rule: DirectRule,
    errors: list[OutputError],
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    pick: Pick | None = None,
    seen: Tensor | None = None,
) -> Tensor | None:
    """Feedback of all errors that arrived in this backward pass: a gradient for input ``index``.

    Args:
        pick: how the rows of the input were picked from the batch, if they were.
        seen: what a rule whose feedback learns looked at in the forward.
    """
    if pick is not None:
        pick = pick.found()
    if seen is not None:
        return learning.hand_back(state, rule, errors, index, shape, dtype, device, pick, seen)
    if len(errors) == 1:  # nearly every pass: no other output could have run this port
        error = errors[0]
        if error.error is None:
            return None
        if pick is None and error.pick is None:
            fed = project(state, rule, error, error.signal(rule), index, shape, dtype, device)
        else:
            fed = _picked(state, rule, error, index, shape, dtype, device, pick)
        error.used()
        return fed
    total: Tensor | None = None
    for error in errors:
        if error.here() and error.error is not None:
            fed = _picked(state, rule, error, index, shape, dtype, device, pick)
            total = fed if total is None else total + fed
            error.used()
    return total


def _picked(
    state: LayerState,
    rule: DirectRule,
    error: OutputError,
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    pick: Pick | None,
) -> Tensor:
    """Feedback where rows of the input, or of e, may have been picked from the batch."""
    if pick is None:
        return project(state, rule, error, error.whole(rule), index, shape, dtype, device)
    if error.pick is not None and pick.same(error.pick):  # the same rows: nothing lies between
        return project(state, rule, error, error.signal(rule), index, shape, dtype, device)
    return pick(project(state, rule, error, error.whole(rule), index, pick.whole(shape), dtype, device))


def project(
    state: LayerState,
    rule: DirectRule,
    error: OutputError,
    signal: Tensor,
    index: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    shared: Cache | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """``signal B`` as a tensor of ``shape`` and ``dtype``.

    Args:
        shared: what layers have made of the signal in this pass; None: ``error``'s own.
        given: another B in place of the layer's own, of its shape.
    """
    if rule.silent:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Nearly every call is like the one before it.
    key = (rule, error.state, index, shape, signal.shape, dtype, device)
    last = state.last
    if last is not None and last[0] == key:
        _, route, feedback = last
    else:
        made = state.made
        route, feedback = find(state, rule, error, index, shape, signal.shape, dtype, device)
        if type(feedback) is Tensor and feedback.is_contiguous():  # so that it is a view, and sees B change
            feedback = feedback.flatten(1)
        current = state.made is made  # another thread may have taken in a measured scale meanwhile
        state.last = (key, route, feedback) if current else None
        state.mirror, state.repeats = None, route.repeats
        if current and (route.plain or route.repeats) and len(state.wiring.outputs) == 1 and type(feedback) is Tensor:
            state.mirror = feedback
            wiring, columns = state.wiring, feedback.shape[1]
            wiring.held += columns - state.held
            wiring.held_rows, state.held = _HELD // max(wiring.held, 1), columns
    if given is not None:
        fed = route(signal, given)
    elif type(feedback) is Tensor:
        fed = route(signal, feedback)
    else:
        fed = through(route, feedback, signal, error.axis, error.shared if shared is None else shared)
    return fed if fed.dtype is dtype else fed.to(dtype)


def through(route: Route, feedback: Tensor | Feedback, signal: Tensor, axis: int, cache: Cache) -> Tensor:
    """``signal``, with its features at ``axis``, on its way through whatever kind of B it is."""
    if isinstance(feedback, Tensor):
        return route(signal, feedback)
    return route.through(feedback.prepare(signal, axis, cache), feedback)


def done(state: LayerState, errors: list[OutputError]) -> None:
    """The layer will not ask for the errors of this pass any more."""
    for error in errors:
        if error.here() and error.error is not None:
            error.used()
