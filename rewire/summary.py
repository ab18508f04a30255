"""``summary``: every layer, its rule, and why others keep backprop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rewire.arguments import check_model
from rewire.buffers import memory_of
from rewire.layers.registry import kind_of, why_not
from rewire.layers.stand_in import StandIn
from rewire.preview import Preview, preview
from rewire.roles import Role
from rewire.rules.base import DirectRule, LearnedDirect, LearnedLocal, LocalRule
from rewire.state import LayerState
from rewire.structures import Dense, Structure
from rewire.swap import states_of


@dataclass(frozen=True)
class Row:
    """One module with parameters.

    Attributes:
        name: qualified name.
        type: its class, as before conversion.
        rule: name of its rule; "bp" for what is not converted.
        role: ``output``, ``hidden``, ``not seen yet`` (before the first training pass), or ``-``.
        feedback_shape: of its feedback; None where there is none, or not known before the first pass.
        feedback_bytes: memory of the feedback kept, and of what a rule that learns keeps besides; 0 where it is made on
            the fly.
        scale: standard deviation of the feedback's entries, if known.
        note: why it is as it is.
        converted: whether it was swapped.
    """

    name: str
    type: str
    rule: str
    role: str
    feedback_shape: tuple[int, ...] | None
    feedback_bytes: int
    scale: float | None
    note: str
    converted: bool


@dataclass(frozen=True)
class Summary:
    """All modules with parameters of their own, in registration order. ``str()`` is a table.

    Attributes:
        common_bytes: memory of what the layers' feedback has in common, kept once.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    common_bytes: int = 0

    @property
    def feedback_bytes(self) -> int:
        """Memory of all feedback kept, in bytes."""
        return self.common_bytes + sum(row.feedback_bytes for row in self.rows)

    def __rich__(self) -> Table:
        converted = sum(row.converted for row in self.rows)
        table = Table(
            title=Text(self.title),
            caption=f"{converted} layers converted, {len(self.rows) - converted} modules left alone; "
            f"feedback {_bytes(self.feedback_bytes)}"
            + (f", {_bytes(self.common_bytes)} of it common to layers" if self.common_bytes else ""),
        )
        for column in ("layer", "type", "rule", "role", "feedback", "memory", "scale", "note"):
            table.add_column(column, overflow="fold", justify="right" if column in ("memory", "scale") else "left")
        for row in self.rows:
            cells = (
                row.name or "(model)",
                row.type,
                row.rule,
                row.role,
                "×".join(map(str, row.feedback_shape)) if row.feedback_shape else "-",
                _bytes(row.feedback_bytes) if row.feedback_bytes else "-",
                f"{row.scale:.3g}" if row.scale is not None else "-",
                row.note,
            )
            table.add_row(*map(Text, cells))  # names may hold what reads as markup
        return table

    def __str__(self) -> str:
        console = Console(width=140, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def summary(model: nn.Module, inputs: Any = None) -> Summary:
    """Every module of ``model`` that has parameters of its own, and what conversion did with it.

    Works on converted and unconverted models; for the latter it says what :func:`rewire.convert` would do.
    Shapes of direct feedback are known once the first training pass has shown the inputs' shapes.

    Args:
        inputs: a tensor, tuple or dict for the model. With it, one forward without a backward (in eval mode,
            leaving no trace) shows what direct feedback will cost before any of it is allocated.
    """
    check_model(model, "summary")
    for wiring in {id(state.wiring): state.wiring for m in model.modules() for state in states_of(m)}.values():
        wiring.settle_if_alone()
    expected = preview(model, inputs) if inputs is not None else None
    rows: list[Row] = []
    whole: list[str] = []  # blocks and modules that use their children's weights themselves
    whole_note: dict[str, str] = {}
    stood_for: dict[str, str] = {}  # layers that a wrapper stands for
    for name, module in model.named_modules():
        states = states_of(module)
        for state in states:
            rows.append(_converted(module, ".".join(filter(None, (name, state.kind.part))), state, expected))
            if state.kind.whole:
                whole.append(name)
                what = "block " if not state.kind.local else ""
                whole_note[name] = f"inside {what}{name!r}: exact backprop"
                if isinstance(state.kind, StandIn):
                    wrapped = f"{name}.{state.kind.path}" if name else state.kind.path
                    stood_for[wrapped] = f"inside {name!r}, which stands for it and has its rule"
        if states or next(module.parameters(recurse=False), None) is None:
            continue
        if name in stood_for:
            rows.append(Row(name, type(module).__name__, "bp", "-", None, 0, None, stood_for[name], converted=False))
            continue
        owner = next((w for w in whole if w != name and name.startswith(f"{w}." if w else "")), None)
        if owner is not None:
            note = whole_note[owner]
        elif kind_of(module) is not None:
            note = "can be converted"
        else:
            note = why_not(module)
        rows.append(Row(name, type(module).__name__, "bp", "-", None, 0, None, note, converted=False))
    return Summary(type(model).__name__, rows, _common(model, expected))


Shapes = dict[tuple[str, int], tuple[int, ...]]  # of B, by (output layer, input)

# Whose shape says all: not worth a note.
_PLAIN = (Dense(), Dense(per="channel"))
_FIRST = "first layer: nothing to hand back to"


def _element(module: nn.Module) -> int:
    """Bytes of one number of the layer's input, as far as its parameters tell."""
    return next((p.element_size() for p in module.parameters()), 4)


def _size(rule: DirectRule, structure: Structure, shape: tuple[int, ...], module: nn.Module) -> int:
    """Bytes kept for one B; what learns is kept in more than 16 bits, beside what is used."""
    size = (structure.learned_size if rule.learns else structure.size)(shape, _element(module))
    own = next((p.dtype for p in module.parameters()), torch.float32)
    wide = torch.promote_types(own, torch.float32)
    if not rule.learns or wide is (structure.dtype or own):
        return size
    return size + math.prod(structure.own_shape(shape)) * wide.itemsize


def _memory(state: LayerState, rule: LearnedDirect, shapes: Shapes, module: nn.Module) -> int:
    """Bytes that the rule keeps besides B: what there is of it, or what there will be."""
    wide = torch.promote_types(next((p.dtype for p in module.parameters()), torch.float32), torch.float32)
    size = 0
    for index in dict.fromkeys(index for _, index in shapes):
        kept = memory_of(state, index).values()
        size += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        if not kept:
            of_input = {output: shape for (output, i), shape in shapes.items() if i == index}
            n = sum(state.structures.get((o, index), state.structure()).heard(s) for o, s in of_input.items())
            _, features, *grid = next(iter(of_input.values()))
            will = rule.remembers(n, features, features * math.prod(grid) if grid else None)
            size += sum(map(math.prod, will.values())) * wide.itemsize
    return size


def _common(model: nn.Module, expected: Preview | None) -> int:
    """Bytes that structures of feedback keep once for several layers."""
    needed: dict[tuple[int, Structure, str, int], list[tuple[int, ...]]] = {}
    for module, state in ((m, state) for m in model.modules() for state in states_of(m)):
        if not isinstance(state.rule, DirectRule) or state.rule.silent:
            continue
        shapes = state.shapes or _expected(expected, state)
        for (output, index), shape in shapes.items():
            structure = state.structures.get((output, index), state.structure())
            if state.rule.learns and structure.joint is not None:
                continue
            key = (id(state.wiring), structure, output, _element(module))
            needed.setdefault(key, []).append(shape)
    return sum(structure.common_size(shapes, element) for (_, structure, _, element), shapes in needed.items())


def _expected(preview: Preview | None, state: LayerState) -> Shapes:
    return {} if preview is None else preview.shapes.get(state.name, {})


def _hands_back(state: LayerState, expected: Preview | None) -> bool:
    """Whether a layer under a local rule has something to hand back to, as far as is known. If not, R is never made."""
    if state.fed or state.random_as is not None:
        return True
    if expected is not None and state.name in expected.ran:
        return state.name not in expected.first
    looked = state.role is Role.HIDDEN or (state.role is Role.OUTPUT and state.wiring.asked is None)
    return not (state.ran and looked)


def _converted(module: nn.Module, name: str, state: LayerState, expected: Preview | None) -> Row:
    kind = getattr(type(module), "_rewired_from", type(module)).__name__
    rule = state.rule
    shape: tuple[int, ...] | None = None
    size, scale, notes = 0, None, []
    if state.idle:
        notes.append("neither it nor anything below it trains: costs nothing")
    elif isinstance(rule, LearnedLocal) and state.learner is not None:
        shape, size, scale = state.learner.form.shape, state.learner.size(module), state.std
        notes.append(state.learner.describe(module))
        if state.std_note:
            notes.append(state.std_note)
    elif isinstance(rule, LocalRule) and not _hands_back(state, expected):
        notes.append(_FIRST)
    elif isinstance(rule, LocalRule):
        weight = state.kind.look(module)
        shape = tuple(weight.shape)
        size = weight.numel() * weight.element_size() if rule.random and not rule.redraw else 0
        scale = state.std
        if rule.redraw:
            notes.append("drawn anew in each backward")
        if not rule.random:
            notes.append("made from the weight in each backward")
        if state.std_note:
            notes.append(state.std_note)
    elif isinstance(rule, DirectRule):
        scale = state.scale
        if rule.silent:
            notes.append("hands back zeros")
        elif shapes := state.shapes or _expected(expected, state):
            shapes = dict(sorted(shapes.items(), key=lambda item: item[0][1]))  # the first input's first
            shape = next(iter(shapes.values()))
            structures = [state.structures.get(place, state.structure()) for place in shapes]
            size = sum(_size(rule, s, shape, module) for s, shape in zip(structures, shapes.values(), strict=True))
            if isinstance(rule, LearnedDirect):
                size += _memory(state, rule, shapes, module)
            if structures[0] not in _PLAIN:
                notes.append(repr(structures[0]))
            if not state.shapes:
                notes.append("expected")
            if state.scale_note and state.scale_note not in ("given", "measured"):
                notes.append(state.scale_note)
        elif expected is None and (state.role is Role.UNKNOWN or not state.ran):
            notes.append("feedback shape known after the first training pass")
        elif expected is not None and not state.ran and state.name not in expected.ran:
            notes.append("does not run in eval mode on these inputs: feedback shape known once it has")
        elif expected is not None and state.name in expected.stuck:
            notes.append("no defined way from the output error to its input")
        else:
            notes.append(_FIRST)
    elif state.role is Role.OUTPUT:
        notes.append("exact gradient")
    else:
        notes.append("kept on backprop")
    if isinstance(rule, LearnedDirect):
        notes.extend(_price(rule))
    if rule is not state.given:
        notes.append(f"by {state.given!r}")
    if isinstance(state.kind, StandIn):
        notes.append(f"one layer with what is beside its {state.kind.path!r}")
    if state.lost:
        notes.append(f"NOT under its rule: {state.lost}")
    elif state.active and not state.ran and any(other.ran for other in state.wiring.layers.values()):
        notes.append("its forward has not run")
    if not any(p.requires_grad for p in module.parameters()):
        notes.append("frozen")
    return Row(name, kind, repr(rule), state.role.value, shape, size, scale, "; ".join(notes), converted=True)


def _price(rule: LearnedDirect) -> list[str]:
    """What learning costs besides the rule's own passes, as its first 1000 show it."""
    exact = sum(rule.exact(passes, 0) for passes in range(1000))
    probes = sum(rule.probe_number(passes) is not None for passes in range(1000)) if rule.probes else 0
    said = [f"exact in {exact / 10:g} % of passes"] if exact else []
    return said + ([f"a forward-mode probe before {probes / 10:g} % of passes"] if probes else [])


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
