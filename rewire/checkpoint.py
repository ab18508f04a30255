"""A conversion as JSON, beside any checkpoint, and back.

A checkpoint holds parameters and buffers; what is needed besides to go on as if nothing had happened is small: each
layer's rule and options, seed, structures, scales, roles and counters. Feedback itself is not stored. It is made again
from its seed, and a fingerprint (:mod:`rewire.fingerprint`) shows whether that gives what it gave.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy
import torch
from torch import nn

from rewire import fingerprint
from rewire.arguments import check_model, path_of
from rewire.convert import _states, convert
from rewire.derivative import Derivative, DerivativeState, surrogate_class
from rewire.errors import ConversionError, nearest
from rewire.feedback import streams
from rewire.guard import MODES, Guard, Start
from rewire.importable import find, name_of
from rewire.rules import DirectRule, LocalRule, Rule, resolve
from rewire.select import select
from rewire.structures import Structure
from rewire.swap import STATE, states_of, swap_in
from rewire.wiring import LayerState, Role, Wiring

M = TypeVar("M", bound=nn.Module)
Config = dict[str, Any]

FORMAT = 1
# What passes have shown of a layer, as it is kept; with what JSON may have there.
KEPT: dict[str, tuple[type, ...]] = {
    "ran": (bool,),
    "seen": (bool,),
    "votes": (int,),
    "scale": (float, int, type(None)),
    "scale_note": (str,),
    "std": (float, int, type(None)),
    "std_note": (str,),
    "silent_passes": (int,),
    "draws": (int,),
    "functional": (bool,),
    "picks": (bool,),
    "rejoined": (bool,),
    "lost": (str,),
    "layout": (str, type(None)),
}
_MOST = 12  # differences listed


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
    states = [state for _, state in _states(model)]
    wiring = _only_one(model, states)
    _check_untouched(wiring)
    common: dict[Hashable, Any] = {}
    return {
        "format": FORMAT,
        "versions": {"rewire": _version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        "seed": wiring.seed,
        "skip": wiring.skip,
        "scale": dict(wiring.scale) if isinstance(wiring.scale, Mapping) else wiring.scale,
        "structure": _written_structure(wiring.structure),
        "output": None if wiring.asked is None else list(wiring.asked),
        "derivative": {state.name: _derivative_name(state) for state in _derivatives(model)},
        "outputs": list(wiring.outputs),
        "readings": sorted([list(reading) for reading in wiring.readings]),
        "unsettled": wiring.unsettled,
        "passes": wiring.passes,
        "on_nonfinite": None if wiring.guard is None else wiring.guard.recorded(),
        "layers": {state.name: _layer(module, state, common) for module, state in _states(model)},
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
    saved = _Saved.read(_source(source))
    converted = any(states_of(module) for module in model.modules())
    problems = _against_converted(model, saved) if converted else _against_plain(model, saved)
    if problems:
        raise ConversionError(_listed("the configuration does not fit the model; nothing was changed", problems))
    wrong = saved.other_feedback()
    if wrong:
        raise ConversionError(
            _listed(
                "feedback made from the configuration's seed is not what it was when that was saved (by rewire "
                f"{saved.versions.get('rewire')}, NumPy {saved.versions.get('numpy')}; here {_version()}, "
                f"{numpy.__version__}); nothing was changed",
                [f"layer {name!r}" for name in wrong],
            )
        )
    if not converted:
        _convert(model, saved)
    _bring_to(_only_one(model, [state for _, state in _states(model)]), saved)
    return model


# -- a model described ---------------------------------------------------------------------------------


def _version() -> str:
    from rewire import __version__

    return __version__


def _only_one(model: nn.Module, states: list[LayerState]) -> Wiring:
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


def _check_untouched(wiring: Wiring) -> None:
    names = [state.name for state in wiring.layers.values() if state.touched()]
    if names:
        raise ConversionError(
            _listed("fixed feedback was changed in place, so no seed gives it again", [f"layer {n!r}" for n in names])
        )


def _written_structure(structure: Structure) -> str:
    text = repr(structure)
    try:
        same = _structure(text) == structure
    except ConversionError:
        same = False
    if not same:
        raise ConversionError(
            f"structure {text} is not from rewire.structures: another process could not make it again"
        )
    return text


def _structure(text: str) -> Structure:
    """The structure that ``repr`` wrote."""
    rule = resolve(f"dfa(feedback={text})")
    if not isinstance(rule, DirectRule) or not isinstance(rule.feedback, Structure):
        raise ConversionError(f"{text!r} is no structure of feedback")
    return rule.feedback


def _written_rule(state: LayerState) -> str:
    text = repr(state.rule)
    try:
        found = resolve(text)
        same = type(found) is type(state.rule) and repr(found) == text
    except ConversionError:
        same = False
    if not same:
        raise ConversionError(
            f"layer {state.label}: another process could not make its rule {text} by that name: "
            "@rewire.register_rule('name') on its class gives it one"
        )
    return text


def _derivatives(model: nn.Module) -> list[DerivativeState]:
    found = [module.__dict__.get(STATE) for module in model.modules()]
    return [state for state in found if isinstance(state, DerivativeState)]


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


# -- a configuration read ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fed:
    """Feedback of one layer. Of a local rule: no output."""

    output: str | None
    index: int
    shape: tuple[int, ...]
    structure: Structure | None
    fingerprint: list[float]


@dataclass(frozen=True)
class _SavedLayer:
    kind: str
    weight: tuple[int, ...] | None
    rule: Rule
    role: Role
    kept: dict[str, Any]
    reading: tuple[bool, bool] | None
    sums: tuple[float, float] | None
    feedback: list[_Fed]


@dataclass(frozen=True)
class _Saved:
    """A configuration, checked for form: everything in it is what it has to be, and can be found here."""

    versions: Mapping[str, Any]
    seed: int
    skip: str
    scale: Any
    structure: Structure
    asked: tuple[str, ...] | None
    outputs: list[str]
    readings: set[tuple[bool, bool]]
    unsettled: bool
    passes: int
    guard: Guard | None
    derivative: dict[str, tuple[str, Derivative]]
    layers: dict[str, _SavedLayer] = field(default_factory=dict)

    @staticmethod
    def read(raw: Any) -> _Saved:
        top = _Entry(raw, "")
        if not isinstance(raw, Mapping) or "format" not in raw or "layers" not in raw:
            raise ConversionError("this is no configuration of rewire: it has no 'format' and 'layers'")
        written = top.take("format", int)
        if written != FORMAT:
            raise ConversionError(
                f"the configuration has format {written}, this is rewire {_version()}, which reads format {FORMAT}"
            )
        versions = top.take("versions", dict)
        derivative = {}
        for module, name in top.take("derivative", dict).items():
            if not isinstance(name, str):
                raise ConversionError(f"the configuration: derivative of {module!r} is no name")
            derivative[module] = (name, find(name))
        asked = top.take("output", list, type(None))
        skip, scale = top.take("skip", str), top.take("scale", str, int, float, dict)
        saved = _Saved(
            versions=versions,
            seed=top.take("seed", int),
            skip=skip,
            scale=scale,
            structure=_structure(top.take("structure", str)),
            asked=None if asked is None else tuple(_strings(asked, "output")),
            outputs=_strings(top.take("outputs", list), "outputs"),
            readings={_pair(pair, bool) for pair in top.take("readings", list)},
            unsettled=top.take("unsettled", bool),
            passes=top.take("passes", int),
            guard=_read_guard(top.take("on_nonfinite", dict, type(None))),
            derivative=derivative,
        )
        rules: dict[str, Rule] = {}  # layers that had the same rule have the same again: what it makes of e is shared
        for name, raw_layer in top.take("layers", dict).items():
            saved.layers[name] = _read_layer(_Entry(raw_layer, f"layer {name!r}: "), rules)
        for name in (*saved.outputs, *(saved.asked or ())):
            if name not in saved.layers:
                raise ConversionError(
                    f"the configuration: no layer is named {name!r}, which is said to be an output layer"
                )
        for name, layer in saved.layers.items():
            for fed in layer.feedback:
                if fed.output is not None and fed.output not in saved.layers:
                    raise ConversionError(f"the configuration: layer {name!r} has feedback of no layer, {fed.output!r}")
        return saved

    def other_feedback(self) -> list[str]:
        """Layers whose feedback, made again, is not what it was."""
        common: dict[Hashable, Any] = {}
        wrong = []
        for name, layer in self.layers.items():
            for fed in layer.feedback:
                if fed.output is None or fed.structure is None:
                    redraw = isinstance(layer.rule, LocalRule) and layer.rule.redraw
                    made = fingerprint.local(self.seed, name, fed.shape, redraw=redraw)
                else:
                    names = streams(name, fed.index, fed.output, self.outputs)
                    made = fingerprint.direct(fed.structure, self.seed, *names, fed.shape, common)
                if not fingerprint.same(made, fed.fingerprint):
                    wrong.append(name)
                    break
        return wrong


class _Entry:
    """A JSON object whose values are asked for by name and type."""

    def __init__(self, raw: Any, where: str) -> None:
        self.raw, self.where = raw, where

    def take(self, name: str, *kinds: type) -> Any:
        value = self.raw.get(name, self) if isinstance(self.raw, Mapping) else self
        if value is self:
            raise ConversionError(f"the configuration: {self.where}{name!r} is missing")
        fits = isinstance(value, Mapping) if dict in kinds else False
        if not (fits or isinstance(value, kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ConversionError(f"the configuration: {self.where}{name!r} cannot be {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"the configuration: {self.where}{name!r} is not finite")
        return value


def _read_guard(raw: Any) -> Guard | None:
    if raw is None:
        return None
    entry = _Entry(raw, "on_nonfinite: ")
    mode = entry.take("mode", str)
    if mode not in MODES:
        raise ConversionError(f"the configuration: on_nonfinite cannot be {mode!r}")
    sizes = {name: float(entry.take(name, float, int)) for name in ("size", "error", "gain")}
    return Guard(mode, Start(entry.take("passes", int), **sizes))


def _read_layer(entry: _Entry, rules: dict[str, Rule]) -> _SavedLayer:
    weight = entry.take("weight", list, type(None))
    text = entry.take("rule", str)
    if text not in rules:
        try:
            rules[text] = resolve(text)
        except ConversionError as problem:
            raise ConversionError(f"the configuration: {entry.where}{problem}") from None
    role = entry.take("role", str)
    if role not in {known.value for known in Role}:
        raise ConversionError(f"the configuration: {entry.where}no role is {role!r}")
    reading, sums = entry.take("reading", list, type(None)), entry.take("sums", list, type(None))
    kept = {name: entry.take(name, *kinds) for name, kinds in KEPT.items()}
    for name in ("scale", "std"):
        if kept[name] is not None and kept[name] <= 0:
            raise ConversionError(f"the configuration: {entry.where}{name!r} is a positive number")
    return _SavedLayer(
        kind=entry.take("kind", str),
        weight=None if weight is None else _shape(weight, entry.where),
        rule=rules[text],
        role=Role(role),
        kept=kept,
        reading=None if reading is None else _pair(reading, bool),
        sums=None if sums is None else _pair(sums, float),
        feedback=[_read_fed(_Entry(raw, entry.where)) for raw in entry.take("feedback", list)],
    )


def _read_fed(entry: _Entry) -> _Fed:
    numbers = entry.take("fingerprint", list)
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        raise ConversionError(f"the configuration: {entry.where}a fingerprint is a list of numbers")
    shape = _shape(entry.take("shape", list), entry.where)
    if not shape:
        raise ConversionError(f"the configuration: {entry.where}feedback without a shape")
    if "output" not in entry.raw:
        return _Fed(None, 0, shape, None, numbers)
    index = entry.take("input", int)
    return _Fed(entry.take("output", str), index, shape, _structure(entry.take("structure", str)), numbers)


def _shape(raw: list[Any], where: str) -> tuple[int, ...]:
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40 for n in raw):
        raise ConversionError(f"the configuration: {where}no shape is {raw!r}")
    return tuple(raw)


T = TypeVar("T")


def _pair(raw: Any, kind: type[T]) -> tuple[T, T]:
    if not isinstance(raw, (list, tuple)) or len(raw) != 2 or not all(isinstance(x, kind) for x in raw):
        raise ConversionError(f"the configuration: two of {kind.__name__} are needed, not {raw!r}")
    return raw[0], raw[1]


def _strings(raw: list[Any], what: str) -> list[str]:
    if not all(isinstance(name, str) for name in raw):
        raise ConversionError(f"the configuration: {what!r} is a list of names")
    return list(raw)


def _source(source: object) -> Any:
    if isinstance(source, Mapping):
        return source
    path = path_of(source, "load_config")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ConversionError(f"{str(path)!r} is no configuration of rewire: {problem}") from None


# -- a configuration and a model -----------------------------------------------------------------------


def _against_plain(model: nn.Module, saved: _Saved) -> list[str]:
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


def _against_converted(model: nn.Module, saved: _Saved) -> list[str]:
    """What is different about a converted model's conversion."""
    states = _states(model)
    wiring = _only_one(model, [state for _, state in states])
    theirs = {
        state.name: (state.kind.title, tuple(state.kind.look(module).shape) if state.kind.local else None)
        for module, state in states
    }
    problems = _layers_differ(saved, theirs)
    for _, state in states:
        layer = saved.layers.get(state.name)
        if layer is not None and repr(layer.rule) != repr(state.rule):
            problems.append(
                f"layer {state.name!r}: rule {layer.rule!r} in the configuration, {state.rule!r} in the model"
            )
    derivative = {state.name: state.derivative for state in _derivatives(model)}
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


def _layers_differ(saved: _Saved, theirs: Mapping[str, tuple[str, tuple[int, ...] | None]]) -> list[str]:
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


def _listed(what: str, items: list[str]) -> str:
    more = [f"... {len(items) - _MOST} more"] if len(items) > _MOST else []
    return "\n  ".join([f"{what}:", *items[:_MOST], *more])


def _convert(model: nn.Module, saved: _Saved) -> None:
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


def _bring_to(wiring: Wiring, saved: _Saved) -> None:
    """Let all layers know what passes had shown. Uses of weights by other modules are looked for once more."""
    wiring.outputs = list(saved.outputs)
    wiring.readings = set(saved.readings)
    wiring.errors = {}
    wiring.guard = saved.guard
    wiring.passes = saved.passes
    wiring.unsettled = wiring.news = saved.unsettled
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
    wiring.certain = all(state.role is not Role.UNKNOWN for state in wiring.layers.values())
    for state in wiring.layers.values():
        state.refresh()
