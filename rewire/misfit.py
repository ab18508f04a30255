"""What keeps a saved configuration from fitting a model: all of it, in words, before anything is changed."""

from __future__ import annotations

import glob
from collections.abc import Mapping

from torch import nn

from rewire.ask import states_in
from rewire.derivative import DerivativeState
from rewire.errors import ConversionError, nearest
from rewire.saved import Saved
from rewire.select import select
from rewire.state import STATE, LayerState
from rewire.wiring import Wiring

_MOST = 12  # differences listed


def against_plain(model: nn.Module, saved: Saved) -> list[str]:
    """What keeps the configuration from fitting a model that is not converted."""
    problems = []
    names = dict(model.named_modules())
    blocks = [name for name, layer in saved.layers.items() if layer.weight is None]
    lost = [name for name in blocks if name not in names]
    problems += [f"block {name!r}: the model has none of that name{nearest(name, names)}" for name in lost]
    for name in saved.derivative:
        if name not in names:
            problems.append(f"derivative: the model has no module {name!r}{nearest(name, names)}")
    found = select(model, "bp", None, [glob.escape(name) for name in blocks if name not in lost])
    theirs = {c.name: (c.kind.title, tuple(c.kind.look(c.module).shape) if c.kind.local else None) for c in found}
    taken = {choice.module for choice in found}
    problems += [
        f"derivative: {name!r} is a layer itself" for name in saved.derivative if name in names and names[name] in taken
    ]
    return problems + _layers_differ(saved, theirs)


def against_converted(model: nn.Module, saved: Saved) -> list[str]:
    """What is different about a converted model's conversion."""
    states = states_in(model)
    wiring = only_one(model, [state for _, state in states])
    theirs = {
        state.name: (state.kind.title, tuple(state.kind.look(module).shape) if state.kind.local else None)
        for module, state in states
    }
    problems = _layers_differ(saved, theirs)
    for _, state in states:
        layer = saved.layers.get(state.name)
        if layer is not None and repr(layer.rule) != repr(state.given):
            problems.append(
                f"layer {state.name!r}: rule {layer.rule!r} in the configuration, {state.given!r} in the model"
            )
    derivative = {state.name: state.derivative for state in derivatives(model)}
    for name in {**saved.derivative, **derivative}:
        ours, here = saved.derivative.get(name), derivative.get(name)
        if ours is None or ours[1] is not here:
            said = "none" if ours is None else ours[0]
            problems.append(f"derivative of {name!r}: {said} in the configuration, {here or 'none'} in the model")
    for what, mine, its in (
        ("seed", saved.seed, wiring.seed),
        ("skip", saved.skip, wiring.skip),
        ("feedback", saved.structure, wiring.structure),
        ("output", saved.asked, wiring.asked),
        ("scale", saved.scale, dict(wiring.scale) if isinstance(wiring.scale, Mapping) else wiring.scale),
    ):
        if mine != its:
            problems.append(f"{what}: {mine!r} in the configuration, {its!r} in the model")
    if problems:
        problems.append("rewire.restore(model) first, to convert it as the configuration says")
    return problems


def _layers_differ(saved: Saved, theirs: Mapping[str, tuple[str, tuple[int, ...] | None]]) -> list[str]:
    problems = []
    for name, layer in saved.layers.items():
        if name not in theirs:
            if layer.weight is not None:
                problems.append(f"layer {name!r}: the model has none of that name{nearest(name, theirs)}")
            continue
        kind, weight = theirs[name]
        if weight != layer.weight:
            problems.append(f"layer {name!r}: weight {layer.weight} in the configuration, {weight} in the model")
        elif kind != layer.kind:
            problems.append(f"layer {name!r}: {layer.kind} in the configuration, {kind} in the model")
    problems += [f"layer {name!r}: not in the configuration" for name in theirs if name not in saved.layers]
    return problems


def only_one(model: nn.Module, states: list[LayerState]) -> Wiring:
    """The conversion that all of ``model`` is of."""
    wirings = {id(state.wiring): state.wiring for state in states}
    if len(wirings) > 1:
        raise ConversionError(f"{type(model).__name__} holds {len(wirings)} conversions: take each part for itself")
    (wiring,) = wirings.values()
    if len(states) < len(wiring.layers):
        raise ConversionError(
            f"{type(model).__name__} is a part of what was converted ({len(states)} of {len(wiring.layers)} layers): "
            "give the whole model"
        )
    return wiring


def derivatives(model: nn.Module) -> list[DerivativeState]:
    """Of the activations that were given another one."""
    found = [module.__dict__.get(STATE) for module in model.modules()]
    return [state for state in found if isinstance(state, DerivativeState)]


def listed(what: str, items: list[str]) -> str:
    """What is wrong, and where, a line each."""
    more = [f"... {len(items) - _MOST} more"] if len(items) > _MOST else []
    return "\n  ".join([f"{what}:", *items[:_MOST], *more])
