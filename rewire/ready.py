"""Whether calls of layers can be part of a compiled graph (:mod:`rewire.traced`), and what that is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewire.layer_feedback import made_for
from rewire.roles import Role
from rewire.rules.base import DirectRule, LocalRule
from rewire.structures import Feedback, Structure

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
    wiring.unready = _unready(wiring, running) if direct else ""
    apart = bool(wiring.unready) or wiring.apart
    for state in states:
        state.in_graph = state.traceable and state.plain and not (direct and apart)
        state.joins_traced = state.role is Role.OUTPUT and bool(direct)


def _unready(wiring: Wiring, running: list[LayerState]) -> str:
    if not wiring.looked:
        return "no ordinary training pass has come before the first compiled one"
    for state in wiring.layers.values():
        if state.ran and state.picks:
            return f"rows of the input of layer {state.label} are picked from the batch, or added up, by an index"
    outputs = [state for state in wiring.layers.values() if state.ran and state.role is Role.OUTPUT]
    # Whatever its rule: a layer outside is a break of the graph, between layers that have to find each other on one.
    for state in dict.fromkeys([*running, *outputs]):
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
    say(wiring)


def say(wiring: Wiring) -> None:
    """Say why layers under direct rules run outside of a compiled graph."""
    why = wiring.unready or (
        "layers are called by what it leaves out, such as a container, or a loop, with something in it that cannot be "
        "compiled (or once could not, under another rule)"
    )
    wiring.warn_once(
        "compile",
        f"torch.compile: {why}. So layers under direct rules run outside of compiled graphs from now on, each a "
        "graph break: gradients are right, but little time is saved. What can be compiled can be with "
        "fullgraph=True, after one ordinary training pass: compile a copy.deepcopy of the model",
    )


def widen(state: LayerState, dtype: torch.dtype) -> None:
    """Give graphs no feedback in fewer bits than an input of ``dtype`` asks for: the last pass may have had others."""
    changed = False
    for place, (kept, device) in state.kept_as.items():
        wide = torch.promote_types(kept, dtype)
        if wide is not kept:
            state.kept_as[place] = wide, device
            changed = True
    if state.random_as is not None:
        shape, kept, device = state.random_as
        wide = torch.promote_types(kept, dtype)
        if wide is not kept:
            state.random_as = shape, wide, device
            changed = True
    if changed:
        _prepare(state)


def traceable(state: LayerState) -> bool:
    """Whether a call of the layer can be part of a compiled graph (:mod:`rewire.traced`)."""
    rule = state.rule
    if not state.wiring.looked or (state.watched and not state.seated) or state.counts:
        return False
    if state.wiring.guard is not None or state.learner is not None or state.hosted:
        return False
    if state.idle:
        return True
    if isinstance(rule, LocalRule):
        return (state.kind.exchanges or state.seated) and state.std is not None
    if isinstance(rule, DirectRule):
        known = state.settled or (state.role is not Role.UNKNOWN and not state.shapes)  # nothing to hand back to
        return known and rule.in_graph() is not None
    return True


def _made(state: LayerState, structure: Structure, output: str, index: int) -> Tensor | Feedback | None:
    """B as the last pass under a rule with this structure needed it."""
    like = state.kept_as.get((output, index))
    if like is None:
        return None
    if state.structures[output, index] == structure:
        return made_for(state, output, index, state.shapes[output, index])
    wanted = (structure, output, index)
    return next((B for key, B in reversed(state.made.items()) if key[:3] == wanted and key[4:] == like), None)


def parts(B: Tensor | Feedback) -> tuple[Tensor, ...] | None:
    """The tensors of which a graph can have B; None if it cannot."""
    return (B,) if isinstance(B, Tensor) else B.tensors()


def given(made: Iterable[Tensor | Feedback], tensors: Iterable[Tensor]) -> list[Tensor | Feedback]:
    """What was ``made``, of ``tensors`` in place of its own: those that stand for them in a graph."""
    those = iter(tensors)
    return [
        next(those) if isinstance(B, Tensor) else B.of(*itertools.islice(those, len(B.tensors() or ()))) for B in made
    ]


def _prepare(state: LayerState) -> None:
    """Put the feedback in order for a compiled graph: ``fixed``, for each input one B for each output layer."""
    rule = state.rule
    state.fixed, state.fixed_as, state.fixed_outputs, state.fixed_inputs, state.plain = (), (), (), (), True
    state.has_feedback = True
    if isinstance(rule, DirectRule) and not rule.silent:
        structure = state.structure(rule)
        found = {place: _made(state, structure, *place) for place in state.shapes}
        Bs = {place: B for place, B in found.items() if B is not None}
        state.has_feedback = bool(Bs)
        if len(Bs) < len(found) or (state.fed and not found):
            state.plain = False  # no pass of this process has shown yet what B is to be like
            return
        outputs = tuple(dict.fromkeys(output for output, _ in Bs))
        indices = tuple(sorted({i for _, i in Bs}))
        places = [(output, index) for index in indices for output in outputs]
        tensors = [parts(Bs[place]) if place in Bs else None for place in places]
        if None in tensors:
            state.plain = False
            return
        state.fixed_outputs, state.fixed_inputs = outputs, indices
        state.fixed_as = tuple(Bs[place] for place in places)
        state.fixed = tuple(t for of_one in tensors if of_one is not None for t in of_one)
    elif isinstance(rule, LocalRule) and rule.redraw:
        state.fixed = (state.counter(),)
    elif isinstance(rule, LocalRule) and rule.random:
        if state.random_as is not None:
            state.fixed = (state.random(rule, *state.random_as),)
        state.has_feedback = bool(state.fixed)
        state.plain = state.has_feedback or not state.fed
