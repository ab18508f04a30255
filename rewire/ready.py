"""Whether calls of layers can be part of a compiled graph (:mod:`rewire.traced`), and what that is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rewire.layer_feedback import made_for
from rewire.roles import Role
from rewire.rules.base import DirectRule, LocalRule

if TYPE_CHECKING:
    from rewire.state import LayerState
    from rewire.wiring import Wiring


def prepare(wiring: Wiring) -> None:
    """Get all layers ready for a compiled graph."""
    wiring.compiled = wiring.prepared = True
    states = wiring.layers.values()
    for state in states:
        _prepare(state)
    running = [state for state in states if (state.ran or not wiring.looked) and not state.idle]
    direct = [state for state in running if isinstance(state.rule, DirectRule)]
    # The layers of a pass find each other on one graph: all of them are part of it, or none.
    wiring.unready = _unready(wiring, direct) if direct else ""
    for state in states:
        state.in_graph = state.traceable and state.plain and not (direct and (wiring.unready or wiring.apart))
        state.joins_traced = state.role is Role.OUTPUT and bool(direct)


def _unready(wiring: Wiring, direct: list[LayerState]) -> str:
    if not wiring.looked:
        return "no ordinary training pass has come before the first compiled one"
    for state in wiring.layers.values():
        if state.ran and state.picks:
            return f"rows of the input of layer {state.label} are picked from the batch, or added up, by an index"
    outputs = [state for state in wiring.layers.values() if state.ran and state.role is Role.OUTPUT]
    for state in dict.fromkeys([*direct, *outputs]):
        if not (state.traceable and state.plain):
            return (
                f"layer {state.label} cannot be part of a compiled graph under {state.rule!r}, or no ordinary "
                "training pass has been under that rule yet"
            )
    return ""


def part(wiring: Wiring) -> None:
    """A layer under a direct rule runs outside of a compiled graph: from now on all do.

    Not until the reason is gone: what was compiled meanwhile breaks at every layer, and goes on being used.
    """
    if wiring.apart:
        return
    wiring.apart = True
    for state in wiring.layers.values():
        state.in_graph = False
    why = wiring.unready or "what was compiled under another rule breaks at every layer"
    wiring.warn_once(
        "compile",
        f"torch.compile: {why}. So layers under direct rules run outside of compiled graphs from now on, each a "
        "graph break: gradients are right, but little time is saved. What can be compiled can be with "
        "fullgraph=True, after one ordinary training pass",
    )


def traceable(state: LayerState) -> bool:
    """Whether a call of the layer can be part of a compiled graph (:mod:`rewire.traced`)."""
    rule = state.rule
    if not state.wiring.looked or state.watched or state.counts:
        return False
    if state.wiring.guard is not None or state.learner is not None:
        return False
    if state.idle:
        return True
    if isinstance(rule, LocalRule):
        return state.kind.exchanges and not rule.redraw and state.std is not None
    if isinstance(rule, DirectRule):
        known = state.settled or (state.role is not Role.UNKNOWN and not state.shapes)  # nothing to hand back to
        return known and state.wiring.skip == "keep" and not rule.needs_targets
    return True


def _prepare(state: LayerState) -> None:
    """Put the feedback in order for a compiled graph: ``fixed``, for each input one B for each output layer."""
    rule = state.rule
    state.fixed, state.fixed_outputs, state.plain = (), (), True
    if isinstance(rule, DirectRule) and not rule.silent:
        structure = state.structure(rule)
        known = all(place in state.kept_as for place in state.shapes) and not (state.fed and not state.shapes)
        if not known or any(other != structure for other in state.structures.values()):
            state.plain = False  # no pass of this process has shown yet what B is to be like
            return
        Bs = {place: made_for(state, *place, shape) for place, shape in state.shapes.items()}
        state.fixed_outputs = tuple(dict.fromkeys(output for output, _ in Bs))
        places = [(output, index) for index in sorted({i for _, i in Bs}) for output in state.fixed_outputs]
        state.fixed = tuple(B for place in places if isinstance(B := Bs.get(place), Tensor))
        state.plain = len(state.fixed) == len(places)
    elif isinstance(rule, LocalRule) and rule.random and not rule.redraw:
        if state.random_as is not None:
            state.fixed = (state.random(rule, *state.random_as),)
        state.plain = bool(state.fixed) or not state.fed
