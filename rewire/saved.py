"""A configuration as :func:`rewire.save_config` writes it, read and checked for form.

Whatever a file holds, this either gives what a conversion can be brought to or says what is wrong with it. Nothing here
knows a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rewire import fingerprint
from rewire.arguments import path_of
from rewire.derivative import Derivative
from rewire.errors import ConversionError
from rewire.feedback import streams
from rewire.guard import MODES, Guard, Start
from rewire.importable import find
from rewire.roles import Role
from rewire.rules import DirectRule, LocalRule, Rule, resolve
from rewire.rules.base import whose_turn
from rewire.structures import Structure

T = TypeVar("T")

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
    "stacked": (int,),
    "idle": (bool,),
    "fed": (bool,),
    "start": (float, int, type(None)),
    "lost": (str,),
    "layout": (str, type(None)),
}
# The same of the conversion.
COUNTED = ("passes", "sampled", "probed", "probe_count")


@dataclass(frozen=True)
class Fed:
    """Feedback of one layer. Of a local rule: no output."""

    output: str | None
    index: int
    shape: tuple[int, ...]
    structure: Structure | None
    fingerprint: list[float]


@dataclass(frozen=True)
class SavedLayer:
    """One layer: its rule (or schedule), and what passes have shown of it."""

    kind: str
    weight: tuple[int, ...] | None
    rule: Rule
    role: Role
    kept: dict[str, Any]
    reading: tuple[bool, bool] | None
    sums: tuple[float, float] | None
    feedback: list[Fed]


@dataclass(frozen=True)
class Saved:
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
    passed: bool
    counted: dict[str, int]
    guard: Guard | None
    derivative: dict[str, tuple[str, Derivative]]
    layers: dict[str, SavedLayer] = field(default_factory=dict)

    @staticmethod
    def read(raw: Any) -> Saved:
        top = _Entry(raw, "")
        if not isinstance(raw, Mapping) or "format" not in raw or "layers" not in raw:
            raise ConversionError("this is no configuration of rewire: it has no 'format' and 'layers'")
        written = top.take("format", int)
        if written != FORMAT:
            raise ConversionError(
                f"the configuration has format {written}, this is rewire {version()}, which reads format {FORMAT}"
            )
        versions = top.take("versions", dict)
        derivative = {}
        for module, name in top.take("derivative", dict).items():
            if not isinstance(name, str):
                raise ConversionError(f"the configuration: derivative of {module!r} is no name")
            derivative[module] = (name, find(name))
        asked = top.take("output", list, type(None))
        skip, scale = top.take("skip", str), top.take("scale", str, int, float, dict)
        saved = Saved(
            versions=versions,
            seed=top.take("seed", int),
            skip=skip,
            scale=scale,
            structure=structure_of(top.take("structure", str)),
            asked=None if asked is None else tuple(_strings(asked, "output")),
            outputs=_strings(top.take("outputs", list), "outputs"),
            readings={_pair(pair, bool) for pair in top.take("readings", list)},
            unsettled=top.take("unsettled", bool),
            passed=top.take("passed", bool),
            counted={name: top.take(name, int) for name in COUNTED},
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
                    rule = whose_turn(layer.rule, self.counted["passes"])
                    redraw = isinstance(rule, LocalRule) and rule.redraw
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


def _read_layer(entry: _Entry, rules: dict[str, Rule]) -> SavedLayer:
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
    return SavedLayer(
        kind=entry.take("kind", str),
        weight=None if weight is None else _shape(weight, entry.where),
        rule=rules[text],
        role=Role(role),
        kept=kept,
        reading=None if reading is None else _pair(reading, bool),
        sums=None if sums is None else _pair(sums, float),
        feedback=[_read_fed(_Entry(raw, entry.where)) for raw in entry.take("feedback", list)],
    )


def _read_fed(entry: _Entry) -> Fed:
    numbers = entry.take("fingerprint", list)
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        raise ConversionError(f"the configuration: {entry.where}a fingerprint is a list of numbers")
    shape = _shape(entry.take("shape", list), entry.where)
    if not shape:
        raise ConversionError(f"the configuration: {entry.where}feedback without a shape")
    if "output" not in entry.raw:
        return Fed(None, 0, shape, None, numbers)
    index = entry.take("input", int)
    return Fed(entry.take("output", str), index, shape, structure_of(entry.take("structure", str)), numbers)


def _shape(raw: list[Any], where: str) -> tuple[int, ...]:
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40 for n in raw):
        raise ConversionError(f"the configuration: {where}no shape is {raw!r}")
    return tuple(raw)


def _pair(raw: Any, kind: type[T]) -> tuple[T, T]:
    if not isinstance(raw, (list, tuple)) or len(raw) != 2 or not all(isinstance(x, kind) for x in raw):
        raise ConversionError(f"the configuration: two of {kind.__name__} are needed, not {raw!r}")
    return raw[0], raw[1]


def _strings(raw: list[Any], what: str) -> list[str]:
    if not all(isinstance(name, str) for name in raw):
        raise ConversionError(f"the configuration: {what!r} is a list of names")
    return list(raw)


def structure_of(text: str) -> Structure:
    """The structure that ``repr`` wrote."""
    rule = resolve(f"dfa(feedback={text})")
    if not isinstance(rule, DirectRule) or not isinstance(rule.feedback, Structure):
        raise ConversionError(f"{text!r} is no structure of feedback")
    return rule.feedback


def source_of(source: object) -> Any:
    """What a file holds, or the mapping given in its place."""
    if isinstance(source, Mapping):
        return source
    path = path_of(source, "load_config")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ConversionError(f"{str(path)!r} is no configuration of rewire: {problem}") from None


def version() -> str:
    """Of this rewire."""
    from rewire import __version__

    return __version__
