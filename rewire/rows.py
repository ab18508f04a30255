"""Whose rows a call's are: what is noted of picks, pours, stacks and turns while layers are new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from rewire.errors import PassError
from rewire.kept import Hidden
from rewire.nodes import Node, puts_behind, shape_of
from rewire.parts import parts_below
from rewire.passes import (
    CALL,
    Call,
    OutputError,
    PartialError,
    call_of,
    metadata,
    picked,
    upstream,
)
from rewire.picks import Later, Pick, Unclear, pick_below, pick_of
from rewire.poured import Poured
from rewire.pours import pours, pours_below
from rewire.roles import Role
from rewire.rules.base import DirectRule
from rewire.spread import spread_below, spreads
from rewire.stacks import stacked_below
from rewire.state import LayerState
from rewire.streaming import stream_of
from rewire.turns import turned_from


class _OfLayer(Protocol):
    @property
    def state(self) -> LayerState: ...


C = TypeVar("C", bound=_OfLayer)


def note_rows(state: LayerState, x: Tensor) -> Pick | None:
    """How the rows of x were picked from the batch, if they were."""
    if stream_of(state) is not None:  # whose first graph keeps no index
        refuse_picks(state)
        return None
    _note_stacks(state, x)
    _note_turn(state, x)
    try:
        pick = pick_of(x, picked)
    except Unclear:
        if isinstance(state.rule, DirectRule):
            state.wiring.unclear.add(state.name)
        return None
    except Hidden as hidden:
        assert x.grad_fn is not None
        pick = Later(partial(_look, state, x.grad_fn, x.shape[0]), hidden.args, hidden.whole)
        if hidden.whole:
            return pick  # for the sake of what is to be said of it
    if pick is not None and not (state.picks and state.wiring.picks):
        state.note_picks()
    return pick


def _look(state: LayerState, node: Node, count: int) -> Pick | None:
    """In the backward: how ``count`` rows that ``node`` gives were picked, which was hidden so far."""
    direct = isinstance(state.rule, DirectRule)
    try:
        return pick_below(node, count, picked, look=True)
    except Unclear:
        if direct:
            state.wiring.unclear.add(state.name)
    except Hidden:
        if direct:
            state.wiring.say_hidden(state)
    return None


def errors_below(call: Call, error: OutputError, y: Tensor) -> dict[Call, OutputError]:
    """The error for each call below that sees another than ``error``, of which ``y`` is the output.

    These are calls whose rows were added up by index, that feed only some of the rows, or that meet every sample.
    """
    wiring = call.state.wiring

    def sources(lower: Call) -> Sequence[Node]:
        return [] if lower.state.wiring is not wiring else lower.sources

    def below(chosen: bool) -> dict[Call, Callable[[Tensor], Tensor]]:
        return rows_below(call.sources, call.state, y.shape, chosen, call_of, sources, error.straight)

    error.straight = _is_straight(call)
    rows = below(call.pick is not None)
    if isinstance(call.pick, Later):
        rows = {lower: _either(error, rows.get(lower), of) for lower, of in below(False).items()}
    found: dict[Call, OutputError] = {}
    for lower, of in rows.items():
        state, pick = lower.state, lower.pick
        if state.wiring is not wiring or not isinstance(state.rule, DirectRule):
            continue
        if isinstance(pick, Later):
            found[lower] = PartialError(error, of, lower)
        if pick is not None:
            continue  # rows that were picked have the place they were picked from
        found[lower] = PartialError(error, of)
        wiring.pours = True
        wiring.unclear.discard(state.name)  # whatever they were picked from: it is known where they go
        if not (state.picks and wiring.picks):
            state.note_picks()
    return found


def _either(
    error: OutputError, picked: Callable[[Tensor], Tensor] | None, whole: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What becomes of an error of which the backward knows whether its rows were ``picked``."""

    def either(e: Tensor) -> Tensor:
        if error.pick is None:
            return whole(e)
        return e if picked is None else picked(e)

    return either


def _is_straight(call: Call) -> bool:
    """Whether nothing below puts rows behind one another, adds them up by index, or makes many of one.

    In the first passes every layer may be an output layer. What was found below one of them is not looked for again:
    such passes would cost the square of the number of layers.
    """
    stack = [*call.sources]
    visited = set(stack)
    while stack:
        node = stack.pop()
        lower = call_of(node)
        if lower is None:
            if puts_behind(node) or pours(node) or spreads(node):
                return False
            parents = [parent for parent, _ in node.next_functions if parent is not None]
        elif lower.own and not lower.own[0].straight:
            return False
        else:
            parents = [] if lower.own or lower.state.wiring is not call.state.wiring else [*lower.sources]
        stack += [parent for parent in parents if parent not in visited]
        visited.update(parents)
    return True


def rows_below(
    roots: Iterable[Node],
    output: LayerState,
    shape: tuple[int, ...],
    chosen: bool,
    call_at: Callable[[Node], C | None],
    sources_of: Callable[[C], Iterable[Node]],
    straight: bool = False,
) -> dict[C, Callable[[Tensor], Tensor]]:
    """The calls below an output that do not see its error row by row as it is: what makes of it what each sees.

    Args:
        roots: graph nodes of the output layer's inputs.
        output: the output layer.
        shape: of its output.
        chosen: its rows were picked from the batch.
        call_at: the call whose output a node is.
        sources_of: graph nodes of its inputs.
        straight: nothing below puts rows behind one another, adds them up by index, or makes many of one.
    """
    rows: dict[C, Callable[[Tensor], Tensor]] = {}
    if straight:
        return rows
    if not chosen and len(shape) > 1:
        rows.update(parts_below(roots, shape[0], call_at, sources_of))
    for lower, pour in pours_below(roots, call_at, sources_of).items():
        x = next(iter(sources_of(lower)), None)
        rows[lower] = Poured(pour, lower.state, output, () if x is None else shape_of(x))
    if not chosen and len(shape) in (2, 3) and output.kind.axis(len(shape)) == -1:
        rows = spread_below(roots, shape, call_at, sources_of) | rows
    return rows


def is_new(state: LayerState) -> bool:
    """Whether passes have yet to show what the layer is."""
    return state.role is Role.UNKNOWN or not state.wiring.looked


def _note_stacks(state: LayerState, x: Tensor) -> None:
    """Should x be all parts of what lies in several batches below, the layers down there have to know."""
    for node, count in stacked_below(x, _is_call).items():
        call: Call = metadata(node)[CALL]
        for lower in (call, *upstream(call.sources, state.wiring)):
            if lower.state.stacked != count:
                lower.state.stacked = count
                lower.state.changed()


def _note_turn(state: LayerState, x: Tensor) -> None:
    """Should x have been transposed since the layer below, what that shows of the order of dimensions is reversed."""
    if x.dim() < 3 or state.kind.axis(x.dim()) != -1:
        return
    turned, node = turned_from(x, _is_call)
    below = None if node is None else metadata(node)[CALL].state
    name = below.name if below is not None and below.wiring is state.wiring else ""
    state.turned, state.follows = (name, "") if turned else (None, name)


def _is_call(node: Node) -> bool:
    return CALL in metadata(node)


def refuse_picks(state: LayerState) -> None:
    """For a streamed pass, in which rows that are picked, added up or put in their places cannot be followed."""
    if state.picks:
        raise PassError(
            f"layer {state.label}: rows of its input are picked from the batch by an index, added up by one, put in "
            "their places by one, or expanded over the batch, which a streamed pass does not follow: use "
            "loss.backward()"
        )
