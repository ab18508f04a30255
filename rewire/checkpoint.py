"""A conversion as JSON, beside any checkpoint, and back.

A checkpoint holds parameters and buffers; what is needed besides to go on as if nothing had happened is small: each
layer's rule and options, seed, structures, scales, roles and counters. Feedback itself is not stored. It is made again
from its seed, and a fingerprint (:mod:`rewire.fingerprint`) shows whether that gives what it gave.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy
import torch
from torch import nn

from rewire import fingerprint
from rewire.arguments import check_model, path_of
from rewire.ask import states_in
from rewire.convert import convert
from rewire.derivative import DerivativeState, surrogate_class
from rewire.errors import ConversionError
from rewire.feedback import streams
from rewire.importable import name_of
from rewire.layer_feedback import changed_feedback
from rewire.misfit import against_converted, against_plain, derivatives, listed, only_one
from rewire.roles import certain
from rewire.rules import LocalRule, resolve
from rewire.saved import COUNTED, FORMAT, KEPT, Saved, source_of, structure_of, version
from rewire.state import LayerState
from rewire.structures import Structure
from rewire.swap import states_of, swap_in
from rewire.wiring import Wiring

M = TypeVar("M", bound=nn.Module)
Config = dict[str, Any]


def config(model: nn.Module) -> Config:
    """What is needed to rebuild ``model``'s conversion: a dict of plain values, for JSON or ``torch.save``.

    It holds, for each layer, its rule with all options, its role, its scale (measured ones too), structure and shape
    of its feedback with a fingerprint, and how often that was redrawn; and seed, ``skip``, ``output``, structure,
    ``on_nonfinite``, derivatives by name, and the versions of rewire, PyTorch and NumPy. It holds no weights, and no
    feedback: that is made again from the seed. Learned feedback is in ``model.state_dict()``. Take it between steps,
    not inside :func:`rewire.use_rule`, which changes what the layers' rules are.

    Args:
        model: a converted model; what wraps one (DistributedDataParallel, ``torch.compile``) will do.

    Raises:
        ConversionError: if the model is not converted, or is only a part of what was; if a rule, structure or
            derivative could not be found by its name in another process (rules: :func:`rewire.register_rule`); if
            fixed feedback was changed in place, so that no seed gives it.
    """
    states = [state for _, state in states_in(model)]
    wiring = only_one(model, states)
    _check_untouched(wiring)
    common: dict[Hashable, Any] = {}
    return {
        "format": FORMAT,
        "versions": {"rewire": version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        "seed": wiring.seed,
        "skip": wiring.skip,
        "scale": dict(wiring.scale) if isinstance(wiring.scale, Mapping) else wiring.scale,
        "structure": _written_structure(wiring.structure),
        "output": None if wiring.asked is None else list(wiring.asked),
        "derivative": {state.name: _derivative_name(state) for state in derivatives(model)},
        "outputs": list(wiring.outputs),
        "readings": sorted([list(reading) for reading in wiring.readings]),
        "unsettled": wiring.unsettled,
        "passed": wiring.passed,
        **{name: getattr(wiring, name) for name in COUNTED},
        "on_nonfinite": None if wiring.guard is None else wiring.guard.recorded(),
        "layers": {state.name: _layer(module, state, common) for module, state in states_in(model)},
    }


def save_config(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`config` to ``path``, as JSON. The file is complete or not there.

    Example:
        >>> torch.save(model.state_dict(), "model.pt")
        >>> rewire.save_config(model, "model.json")
    """
    target = path_of(path, "save_config")
    text = json.dumps(config(model), indent=1, allow_nan=False, ensure_ascii=False)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def load_config(model: M, source: str | os.PathLike[str] | Mapping[str, Any]) -> M:
    """Convert ``model`` as a saved configuration says, and go on where that was saved.

    With parameters, buffers, optimizer and random number generators loaded too, training continues bit by bit as it
    would have. A model that is converted already has to be converted in the same way, and is brought to the same point.

    Args:
        model: of the architecture that the configuration was saved from, not wrapped yet.
        source: a file written by :func:`save_config`, or what :func:`config` returned. Modules that its derivatives
            come from are imported: use files that you trust.

    Returns:
        ``model``, the same object.

    Raises:
        ConversionError: if the configuration cannot be read; if it is of another conversion, with all that differs
            (layers, shapes of weights, rules, seed); if its seed gives other feedback here, with the layers' names.
            The model is then as it was.
        OSError: if the file cannot be read.

    Example:
        >>> model = rewire.load_config(Net(), "model.json")
        >>> model.load_state_dict(torch.load("model.pt"))
    """
    check_model(model, "load_config")
    saved = Saved.read(source_of(source))
    converted = any(states_of(module) for module in model.modules())
    problems = against_converted(model, saved) if converted else against_plain(model, saved)
    if problems:
        raise ConversionError(listed("the configuration does not fit the model; nothing was changed", problems))
    wrong = saved.other_feedback()
    if wrong:
        raise ConversionError(
            listed(
                "feedback made from the configuration's seed is not what it was when that was saved (by rewire "
                f"{saved.versions.get('rewire')}, NumPy {saved.versions.get('numpy')}; here {version()}, "
                f"{numpy.__version__}); nothing was changed",
                [f"layer {name!r}" for name in wrong],
            )
        )
    if not converted:
        _convert(model, saved)
    _bring_to(only_one(model, [state for _, state in states_in(model)]), saved)
    return model


# -- a model described ---------------------------------------------------------------------------------


def _check_untouched(wiring: Wiring) -> None:
    names = [state.name for state in wiring.layers.values() if any(changed_feedback(state))]
    if names:
        raise ConversionError(
            listed("fixed feedback was changed in place, so no seed gives it again", [f"layer {n!r}" for n in names])
        )


def _written_structure(structure: Structure) -> str:
    text = repr(structure)
    try:
        same = structure_of(text) == structure
    except ConversionError:
        same = False
    if not same:
        raise ConversionError(
            f"structure {text} is not from rewire.structures: another process could not make it again"
        )
    return text


def _written_rule(state: LayerState) -> str:
    text = repr(state.given)
    try:
        found = resolve(text)
        same = type(found) is type(state.given) and repr(found) == text
    except ConversionError:
        same = False
    if not same:
        raise ConversionError(
            f"layer {state.label}: another process could not make its rule {text} by that name: "
            "@rewire.register_rule('name') on its class gives it one"
        )
    return text


def _derivative_name(state: DerivativeState) -> str:
    try:
        return name_of(state.derivative)
    except ConversionError as problem:
        raise ConversionError(f"derivative of {state.name!r}: {problem}") from None


def _layer(module: nn.Module, state: LayerState, common: dict[Hashable, Any]) -> Config:
    wiring, rule = state.wiring, state.rule
    entry: Config = {
        "kind": state.kind.title,
        "weight": list(state.kind.look(module).shape) if state.kind.local else None,
        "rule": _written_rule(state),
        "role": state.role.value,
        **{name: getattr(state, name) for name in KEPT},
        "reading": None if state.reading is None else list(state.reading),
        "sums": None if state.sums is None else list(state.sums),
        "feedback": [],
    }
    if isinstance(rule, LocalRule) and rule.random:
        shape = entry["weight"]
        made = fingerprint.local(wiring.seed, state.name, shape, redraw=rule.redraw)
        entry["feedback"] = [{"shape": shape, "fingerprint": made}]
    for (output, index), needed in state.shapes.items():
        structure = state.structures[output, index]
        names = streams(state.name, index, output, wiring.outputs)
        made = fingerprint.direct(structure, wiring.seed, *names, needed, common)
        entry["feedback"].append(
            {
                "output": output,
                "input": index,
                "shape": list(needed),
                "structure": _written_structure(structure),
                "fingerprint": made,
            }
        )
    return entry


def _convert(model: nn.Module, saved: Saved) -> None:
    convert(
        model,
        "bp",
        layers=lambda name, _: saved.layers[name].rule,
        blocks=[glob.escape(name) for name, layer in saved.layers.items() if layer.weight is None] or None,
        output=saved.asked,
        skip=saved.skip,
        feedback=saved.structure,
        scale=saved.scale,
        seed=saved.seed,
    )
    modules = dict(model.named_modules())
    for name, (_, function) in saved.derivative.items():
        swap_in(modules[name], surrogate_class(type(modules[name])), DerivativeState(name, function))


def _bring_to(wiring: Wiring, saved: Saved) -> None:
    """Let all layers know what passes had shown. Uses of weights by other modules are looked for once more."""
    wiring.outputs = list(saved.outputs)
    wiring.readings = set(saved.readings)
    wiring.errors = {}
    wiring.guard = saved.guard
    for what, count in saved.counted.items():
        setattr(wiring, what, count)
    wiring.unsettled = wiring.news = saved.unsettled
    wiring.passed = saved.passed
    for name, state in wiring.layers.items():
        layer = saved.layers[name]
        state.forget()
        for what, value in layer.kept.items():
            setattr(state, what, value)
        state.role, state.reading, state.sums = layer.role, layer.reading, layer.sums
        for fed in layer.feedback:
            if fed.output is not None and fed.structure is not None:
                state.shapes[fed.output, fed.index] = fed.shape
                state.structures[fed.output, fed.index] = fed.structure
        state.turn()
    wiring.certain = certain(wiring)
    wiring.refresh()
