"""``verify``: run one pass and show, layer by layer, that its rule is what happened.

Everything is measured from outside, on copies of the model (:mod:`rewire.diagnose.watch`):

1. The converted model runs one pass; what each layer hands back, and the gradients of all parameters, are kept. A
   second pass that nobody watches has to give the same gradients.
2. The same model with every rule switched to backprop runs one forward, and its graph is used several times.
   Backwards as it is: what backprop hands back, the output error, and (against an unconverted copy) that this
   is plain backprop. Backwards again, with what the layers of 1 handed back put in place of their gradients: every
   parameter's gradient, and the gradient at each layer's output, has to be that of 1.
3. What was handed back is compared with the rule's formula (:mod:`rewire.diagnose.formula`), from the gradient at
   the output or the output errors, and ``feedback(model)``.
4. With every sample's error multiplied by a number of its own, backprop shows which sample each row of an
   input belongs to; the error that was fed back to it has to be that sample's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from rewire.arguments import check_model
from rewire.ask import feedback
from rewire.convert import restore
from rewire.derivative import own_derivatives
from rewire.diagnose.formula import Local, context, fed_back, follows, signal
from rewire.diagnose.graph import Flow, may_be_outputs
from rewire.diagnose.match import Match, alike, all_close, cosine, largest
from rewire.diagnose.samples import Samples, weighted
from rewire.diagnose.watch import (
    Buffers,
    Gradients,
    Layer,
    Pass,
    Place,
    Randomness,
    Seen,
    bare,
    copy_of,
    eagerly,
    gradients_of,
    layers_of,
    outline,
    settle,
    take_gradients,
)
from rewire.errors import ConversionError, RoutingError, some
from rewire.layer_feedback import all_made, changed_feedback
from rewire.layers.registry import kind_of
from rewire.learned import names as learned_names
from rewire.rules.base import BP, DirectRule, LearnedDirect, LocalRule
from rewire.state import LayerState

LIVE = "live"
DEAD = "dead"
NOT_RUN = "not run"
ON_BACKPROP = "on backprop"
FIRST = "first layer"
FROZEN = "frozen"
UNROUTED = "unrouted"
WRONG = "wrong"


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in the pass.

    Attributes:
        name: qualified name.
        type: class, before conversion.
        rule: name of its rule.
        status: ``live``; ``first layer`` (nothing to hand back to); ``frozen`` (as is all below it: no gradient is
            needed there); ``on backprop``; ``not run`` (its forward did not run and its parameters got no gradient, or
            its input was empty); ``dead`` (its parameters were used, its forward did not run: the rule has no effect);
            ``unrouted`` (the output error has no way to it); ``wrong``.
        formula: cosine between what was handed back and the rule's formula; None where there is none.
        backprop: cosine between what was handed back and what plain backprop hands back there.
        weight_exact: whether its parameters got exactly the gradient that follows, by plain autograd, from what
            the layers handed back; None if not checked.
        note: why, in words.
    """

    name: str
    type: str
    rule: str
    status: str
    formula: float | None = None
    backprop: float | None = None
    weight_exact: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """All converted layers. ``str()`` is a table.

    Attributes:
        title: class of the model.
        layers: one report each, in registration order.
        problems: what is wrong with no layer in particular.
    """

    title: str
    layers: list[LayerReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No layer is dead, unrouted or wrong, and there is no other problem."""
        return not self.problems and not any(layer.status in (DEAD, UNROUTED, WRONG) for layer in self.layers)

    def __rich__(self) -> Table:
        counts = {status: sum(layer.status == status for layer in self.layers) for status in _COLOURS}
        found = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        table = Table(
            title=Text(f"{self.title}: {'ok' if self.ok else 'NOT ok'}"),
            caption=Text("\n".join([found, *self.problems])),
        )
        for column in ("layer", "type", "rule", "status", "cos to formula", "cos to backprop", "own gradients", "note"):
            table.add_column(column, justify="right" if column.startswith("cos") else "left")
        for layer in self.layers:
            exact = {True: "exact", False: "WRONG", None: "-"}[layer.weight_exact]
            names = map(Text, (layer.name or "(model)", layer.type, layer.rule))  # they may hold what reads as markup
            cosines = [_show(layer.formula), _show(layer.backprop)]
            table.add_row(*names, Text(layer.status, _COLOURS[layer.status]), *cosines, exact, Text(layer.note))
        return table

    def __str__(self) -> str:
        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


_COLOURS = {
    LIVE: "green",
    FIRST: "green",
    FROZEN: "green",
    ON_BACKPROP: "yellow",
    NOT_RUN: "yellow",
    DEAD: "red",
    UNROUTED: "red",
    WRONG: "red",
}


def verify(model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> Verification:
    """Run one pass and prove, for each converted layer, what happened in it.

    Works on deep copies (one at a time) with the random state put back afterwards, so that parameters, gradients,
    buffers, scales and random numbers of ``model`` are as before. A model that has not been trained yet is given
    the first, measuring pass on the copy. At its peak there are, besides the model, one copy of it, two sets of
    gradients, the graph of a training step and what its layers handed back and were handed. It takes the time of ten
    steps.

    Args:
        model: a converted model.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss_fn: from the model's output to a scalar loss. Rules that read targets find them as in training:
            ``with rewire.targets(y): rewire.verify(...)``.

    Returns:
        A :class:`Verification`: ``.ok``, ``.layers``, and ``str()`` or rich to read it.

    Raises:
        ConversionError: if ``model`` is not converted.
        PassError: what such a pass raises in training too.

    Example:
        >>> print(rewire.verify(model, x, lambda out: F.cross_entropy(out, y)))
    """
    check_model(model, "verify")
    model = bare(model)
    if not layers_of(model):
        raise ConversionError(f"{type(model).__name__} is not converted: call rewire.convert(model, ...) first")
    random = Randomness()
    try:
        with torch.enable_grad(), eagerly():
            return _Verify(model, inputs, loss_fn, random).result()
    finally:
        random.put_back()


class _Verify:
    """The passes, one after the other, and what each showed."""

    def __init__(self, model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], random: Randomness) -> None:
        self.model, self.inputs, self.loss_fn, self.random = model, inputs, loss_fn, random
        # Feedback that is a Parameter is not a part of plain backprop: its gradient has a check of its own.
        ours = {id(m._parameters.get(name)) for m in model.modules() for name in learned_names(m)}
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
        self.wrong: dict[str, str] = {}  # what is wrong, by layer
        self.inexact: set[str] = set()  # layers whose parameters did not get their gradient
        self.problems: list[str] = []
        self._newest: tuple[str | None, dict[str, Tensor]] = (None, {})
        self.twins: dict[Place, Place] = {}  # of a place of the converted model, the same in the reference
        self.plain: dict[Place, Match] = {}  # how what was handed back compares to backprop's
        self.formula: dict[Place, Match | None] = {}  # and to what a direct rule says

    def result(self) -> Verification:
        """Run everything."""
        title = type(self.model).__name__
        layers = layers_of(self.model)
        lost = {name for name, layer in layers.items() if not hasattr(type(layer.module), "_rewired_from")}
        if lost:
            self.layers = layers
            return Verification(title, [self._lost(name, name in lost) for name in layers])
        try:
            self.ours, gradients = self._as_converted()
        except RoutingError as problem:
            return Verification(title, self._unrouted(problem))
        bad = sorted(name for name, g in gradients.items() if g is not None and not bool(g.isfinite().all()))
        if bad:
            what = f"{some(bad, 6)}: gradients of this pass are not finite, so nothing could be compared"
            return Verification(title, [self._report(name, NOT_RUN, "not compared") for name in self.layers], [what])
        self._against_backprop(gradients)
        shown = [y for call in self.ours for y in call.outputs]
        if shown and not any(y.numel() for y in shown):
            self.problems.append("nothing was proved: the batch is empty, and so is what every layer made of it")
        return Verification(title, [*self._reports()], self.problems)

    # -- passes --------------------------------------------------------------------------------------

    def _as_converted(self) -> tuple[Pass, Gradients]:
        model = self._copy()
        take_gradients(model)
        self.layers = layers_of(model)
        self.states = states = {name: layer.state for name, layer in self.layers.items()}
        self.cut = {n for n, s in states.items() if s.wiring.skip == "cut" and isinstance(s.rule, DirectRule)}
        buffers = Buffers(model)
        settle(states.values(), lambda: self._plainly(model, buffers))
        draws = {state: state.draws for state in states.values()}
        self._again(buffers)
        ours = Pass(model, self.layers, self.inputs, self.loss_fn, self.cut, lean=True)
        gradients = ours.backward(last=True)
        for state, draw in draws.items():
            state.draws = draw
        off = self._differ(gradients, self._plainly(model, buffers))
        self._blame(off, "its parameters get other gradients when nobody watches")
        self._check_followed(gradients)
        _share(model, self.model)
        return ours, gradients

    def _copy(self) -> nn.Module:
        """A copy whose local feedback stays as it is."""
        model = copy_of(self.model)
        for layer in layers_of(model).values():
            layer.state.wiring.still = True
        return model

    def _check_followed(self, gradients: Gradients) -> None:
        """Feedback that is a Parameter got the gradient that follows from its weight's."""
        for name, layer in self.layers.items():
            kind = layer.state.kind
            prefix = name.removesuffix(kind.part)
            prefix = prefix if kind.part or not name else f"{name}."
            gradient = gradients.get(f"{prefix}{kind.parameter}")
            if gradient is None:
                continue
            wanted = follows(layer, gradient)
            if not all(alike(gradients.get(prefix + full), g) for full, g in wanted.items()):
                self.wrong.setdefault(name, "its feedback did not get the gradient that follows from its weight's")

    def _used(self, name: str) -> dict[str, Tensor]:
        """``feedback(model)`` of one layer. Of the newest alone: all of it, dense, may be more than the model."""
        if self._newest[0] != name:
            self._newest = name, feedback(self.layers[name].module)
        return self._newest[1]

    def _again(self, buffers: Buffers | None = None) -> None:
        """Before each pass: all passes start from the same."""
        self.random.put_back()
        if buffers is not None:
            buffers.put_back()

    def _plainly(self, model: nn.Module, buffers: Buffers | None = None) -> Gradients:
        """A pass without anybody watching."""
        self._again(buffers)
        return gradients_of(model, self.inputs, self.loss_fn)

    def _against_backprop(self, gradients: Gradients) -> None:
        model = self._copy()
        take_gradients(model)
        layers = layers_of(model)
        for name, (module, state) in ((name, (layer.module, layer.state)) for name, layer in layers.items()):
            state.wiring.warned_like(self.states[name].wiring)
            state.use(BP())
            if state.kind.local:
                for parameter in module.parameters():
                    parameter.requires_grad_()  # or the graph would not show what uses it
        self._again()
        local = Local(self.ours.calls, self._used)
        theirs = Pass(model, layers, self.inputs, self.loss_fn, self.cut, local.before, lean=True)
        self.shown = local.shown
        del local
        self._pair(theirs)

        plain = self._plain_backward(theirs)
        weights = {name: weights_of(layer) for name, layer in layers.items() if layer.state.kind.local}
        self.flow = Flow(theirs, weights, self._starts)
        errors = {output: list(output.deltas) for output in self.flow.outputs}
        # Their own, because the layers of another conversion may lie between an output layer and the loss; that they
        # are what follows from what was handed back is shown below.
        self.errors = {other: list(call.deltas) for call, other in self.calls.items() if other in self.flow.outputs}
        self._check_formula()

        off = self._differ(gradients, self._replaced_backward(theirs))
        self.inexact = self._blame(off, "its parameters did not get the gradient of their own operation")
        gradients.clear()
        self.samples = Samples(theirs, self.flow, errors)
        take_gradients(model)
        theirs.end()
        _empty(model)
        del model, layers, theirs, weights

        model = copy_of(self.model)
        try:
            with own_derivatives(model):  # which stay another's, as in the pass of plain backprop
                restore(model)
        except ConversionError:  # a class of somebody else's on top, of a parametrization for instance
            return
        take_gradients(model)
        off = self._differ(plain, self._plainly(model))
        _empty(model)
        self._blame(off, "switched to 'bp', its parameters do not get plain backprop's gradient")

    def _plain_backward(self, theirs: Pass) -> Gradients:
        """Backprop as it is: which calls it reaches, and how what was handed back compares to it."""
        back = {other: place for place, other in self.twins.items()}
        outputs = may_be_outputs(theirs, self._starts)

        def at_place(other: Place, gradient: Tensor | None) -> None:
            if (place := back.pop(other, None)) is not None:
                self.plain[place] = Match.of(
                    _filled(place), torch.zeros_like(place.x) if gradient is None else gradient
                )

        def at_output(other: Seen, index: int, gradient: Tensor | None) -> None:
            # Of all others it only matters whether a gradient came.
            keep: Callable[[Tensor], Tensor] = torch.clone if other in outputs else outline
            other.deltas[index] = None if gradient is None else keep(gradient.detach())

        gradients = theirs.backward(at_place=at_place, at_output=at_output)
        for other in list(back):
            at_place(other, None)
        self.reached = {call: other.delta is not None for call, other in self.calls.items()}
        return gradients

    def _check_formula(self) -> None:
        """How what was handed back compares to what direct rules say."""
        for name, state in self.states.items():
            if isinstance(state.rule, DirectRule) and state.active and state.settled:
                for call in self.ours.calls[name]:
                    for place in call.places if call.delta is not None else ():
                        wanted = self._expected(call, place)
                        self.formula[place] = None if wanted is None else Match.of(_filled(place), wanted)

    def _replaced_backward(self, theirs: Pass) -> Gradients:
        """What the layers handed back in the place of backprop's own. Nothing of it, nor of deltas, is kept."""
        back = {other: place for place, other in self.twins.items()}
        ours = {other: call for call, other in self.calls.items() if call.takes_part}
        left = {(other, i) for other, call in ours.items() for i in range(len(call.deltas))}
        astray: set[str] = set()

        def at_place(other: Place, gradient: Tensor | None) -> Tensor | None:
            place = back.get(other)
            if place is None:
                return None
            handed, place.handed = _filled(place), None
            return handed

        def at_output(other: Seen, index: int, gradient: Tensor | None) -> None:
            if (other, index) in left:
                left.remove((other, index))
                deltas = ours[other].deltas
                delta = deltas[index]
                if not alike(delta, gradient):
                    astray.add(other.name)
                deltas[index] = None if delta is None else outline(delta)

        gradients = theirs.backward(at_place=at_place, at_output=at_output)
        for other, index in list(left):
            at_output(other, index, None)
        for name, calls in self.ours.calls.items():
            others = theirs.calls[name]
            if len(calls) != len(others):
                self.wrong.setdefault(name, "runs another number of times under 'bp'")
            elif name in astray or any(
                len(a.deltas) != len(b.deltas) for a, b in zip(calls, others, strict=True) if a.takes_part
            ):
                self.wrong.setdefault(name, "the gradient at its output is not what plain autograd brings there")
        return gradients

    def _starts(self, call: Seen) -> bool:
        """Whether a call's layer may be an output layer."""
        state = self.states[call.name]
        asked = state.wiring.asked
        return asked is None or state.active or state.name in asked

    def _pair(self, theirs: Pass) -> None:
        self.calls: dict[Seen, Seen] = {}
        for name, calls in self.ours.calls.items():
            for call, other in zip(calls, theirs.calls[name], strict=False):
                self.calls[call] = other
                leaves = {place.leaf: place for place in other.places}
                self.twins.update({place: leaves[place.leaf] for place in call.places if place.leaf in leaves})

    def _differ(self, a: Gradients, b: Gradients) -> set[str]:
        """Names of parameters that are trained and have different gradients."""
        # Sums that cancel (a key's bias, which softmax does not feel) are as exact as the module's others are large.
        sizes: dict[str, float] = {}
        for name, gradient in b.items():
            if gradient is not None and gradient.numel():
                owner = name.rpartition(".")[0]
                sizes[owner] = max(sizes.get(owner, 0.0), largest(gradient))
        return {
            name
            for name in self.trained
            if not alike(a.get(name), b.get(name), sizes.get(name.rpartition(".")[0], 0.0))
        }

    def _owns(self, name: str, parameter: str) -> bool:
        kind = self.states[name].kind
        if kind.part:
            return parameter == f"{name.removesuffix(kind.part)}{kind.parameter}"
        return parameter.startswith(f"{name}." if name else "")

    def _blame(self, parameters: set[str], why: str) -> set[str]:
        """Say ``why`` of the layers that ``parameters`` belong to; their names."""
        blamed = {name for name in self.layers for p in parameters if self._owns(name, p)}
        rest = {p for p in parameters if not any(self._owns(name, p) for name in blamed)}
        for name in blamed:
            self.wrong.setdefault(name, why)
        if rest:
            named = some(sorted(rest), 6)
            self.problems.append(f"{named}: {why.replace('its parameters', 'these parameters')}")
        return blamed

    # -- reports -------------------------------------------------------------------------------------

    def _unrouted(self, problem: RoutingError) -> list[LayerReport]:
        reports = []
        for name in self.layers:
            here = str(problem).startswith(f"layer {self.states[name].label} ")
            status, note = (UNROUTED, str(problem)) if here else (NOT_RUN, "the pass broke off")
            reports.append(self._report(name, status, note))
        return reports

    def _lost(self, name: str, lost: bool) -> LayerReport:
        gone = f"its class is {type(self.layers[name].module).__name__} again: something took the rule off"
        return self._report(name, *((WRONG, gone) if lost else (NOT_RUN, "no pass was run")))

    def _report(self, name: str, status: str, why: str, **more: Any) -> LayerReport:
        layer = self.layers[name]
        cls: type = getattr(type(layer.module), "_rewired_from", type(layer.module))
        return LayerReport(name, cls.__name__, repr(layer.state.rule), status, note=why, **more)

    def _reports(self) -> Iterator[LayerReport]:
        inside = tuple(f"{name}." for name, state in self.states.items() if state.kind.whole)
        by_module: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            by_module.setdefault(name.removesuffix(layer.state.kind.part).removesuffix("."), []).append(name)
        for name, module in self.model.named_modules():
            for layer_name in by_module.get(name, []):
                yield self._layer(layer_name)
            if name not in by_module and kind_of(module) is not None and not name.startswith(inside):
                yield LayerReport(name, type(module).__name__, "bp", ON_BACKPROP, note="not converted")

    def _layer(self, name: str) -> LayerReport:
        state, calls = self.states[name], self.ours.calls[name]
        module = self.layers[name].module
        own = any(p.requires_grad for p in module.parameters()) and any(c.delta is not None for c in calls)
        exact = name not in self.inexact if own else None

        def say(verdict: tuple[str, str], cosines: dict[str, float | None] | None = None) -> LayerReport:
            status, note = verdict
            return self._report(name, status, note, weight_exact=exact, **(cosines or {}))

        wrong = self.wrong.get(name)
        used = name in self.flow.uses
        ran = [call for call in calls if call.delta is not None]
        if state.lost and state.active:
            return say((DEAD, state.lost))
        if not calls and used:
            unknown = "its weight is used by another module in a way that is not known; its forward never ran"
            return say((DEAD if state.active else ON_BACKPROP, unknown))
        if calls and state.idle and not any(call.takes_part for call in calls):
            # The reference gives frozen weights gradients, to see what uses them.
            return say((WRONG, wrong) if wrong else (FROZEN, "neither it nor anything below it trains"))
        if any(call.delta is None and self.reached.get(call) for call in calls):
            return say((UNROUTED, "backprop brings its output a gradient, and under the rules none came"))
        if not ran and not used:
            why = "ran, but the loss does not depend on it" if calls else "did not run in this pass"
            return say((WRONG, wrong) if wrong else (NOT_RUN, why))
        if used and state.active:
            return say((WRONG, "another module uses its weight directly as well, and there the rule has no effect"))
        if wrong:
            return say((WRONG, wrong), self._cosines(ran))
        if not state.active:
            return say(self._on_backprop(ran))
        pairs = [(call, place) for call in ran for place in call.places if place.x.numel()]
        if not pairs and any(call.places for call in ran):
            return say((NOT_RUN, "its input is empty in this pass"))
        if not pairs:
            return say((FIRST, "nothing to hand back to"))
        if not state.settled:
            somewhere = any(e is not None and bool(e.any()) for errors in self.errors.values() for e in errors)
            # Where skips are cut, the gradient at an input is the sum for all layers that are fed with it.
            alone = [place for _, place in pairs if place.shared is place]
            nothing = not self._error_arrives(pairs) and all(self._nothing(place) for place in alone)
            if somewhere and nothing:
                return say((NOT_RUN, "the output error is zero here, and its scale was not measured yet"))
            return say((WRONG, "its scale could not be measured: so far it hands back what backprop does"))
        return say(self._verdict(state, name, pairs), self._cosines(ran))

    def _on_backprop(self, ran: list[Seen]) -> tuple[str, str]:
        for call in ran:
            for place in call.places:
                wanted = call.expected.get(place.leaf)
                if wanted is not None and not wanted.close():
                    return WRONG, "what was handed back is not backprop's gradient"
        output = any(self.calls.get(call) in self.errors for call in ran)
        return ON_BACKPROP, "output layer, exact gradient" if output else "kept on backprop"

    def _cosines(self, ran: list[Seen]) -> dict[str, float | None]:
        pairs = [(call, place) for call in ran for place in call.places]
        wanted = [self._match(call, place) for call, place in pairs] if ran and ran[0].state.active else []
        return {
            "formula": cosine(wanted) if wanted else None,
            "backprop": cosine([self.plain.get(place) for _, place in pairs]) if pairs else None,
        }

    def _match(self, call: Seen, place: Place) -> Match | None:
        """How what was handed back at ``place`` compares to what the rule says; None if that is not known."""
        return self.formula.get(place) if isinstance(call.state.rule, DirectRule) else call.expected.get(place.leaf)

    def _nothing(self, place: Place) -> bool:
        """Whether zeros were handed back, or nothing was."""
        match = self.plain.get(place)
        return not bool(_filled(place).any()) if match is None else match.nothing

    def _verdict(self, state: LayerState, name: str, pairs: list[tuple[Seen, Place]]) -> tuple[str, str]:
        """Status and note of a layer that had something to hand back."""
        silence = all(self._nothing(place) for _, place in pairs)
        as_backprop = all_close([self.plain.get(place) for _, place in pairs]) and not silence
        matches = [self._match(call, place) for call, place in pairs]
        rule = state.rule
        direct = isinstance(rule, DirectRule)
        if any(match is None for match in matches):
            if silence:
                return UNROUTED if direct else WRONG, "nothing was handed back"
            if as_backprop:
                return WRONG, f"what was handed back is {_BACKPROP}"
            if direct:
                return WRONG, "feedback(model) does not fit the output error that comes here"
            return LIVE, "formula not recomputed: an operation that is not known"
        if not all_close(matches, _coarsest(state)):
            if silence:
                return UNROUTED if direct else WRONG, "nothing was handed back"
            return WRONG, f"what was handed back is {_BACKPROP if as_backprop else _NOT_THE_RULE}"
        if as_backprop and type(state.rule).__module__.startswith("rewire.rules."):
            set_so = isinstance(rule, LocalRule) and not rule.random
            if set_so or rule.learns or any(changed_feedback(state)):
                return LIVE, "the rule comes to the same as backprop here"
            return WRONG, f"what was handed back is {_BACKPROP}"
        if not direct:
            shown = self.shown.get(name)
            if shown is None:  # an operation that is not known
                shown = state.name in self._used(name)
            if not shown:
                return WRONG, "feedback(model) does not show the backward weight that the rule says"
        elif any(self._astray(call, place) for call, place in pairs):
            return WRONG, (
                "rows of its input get the feedback of other samples' errors than their own: name the layout, "
                "feed back a larger unit (blocks=), or use a local rule here"
            )
        if silence:
            if isinstance(rule, DirectRule) and not rule.silent and self._error_arrives(pairs):
                return UNROUTED, "nothing was handed back, though there is an output error"
            return LIVE, "zeros, as the rule says"
        return LIVE, "hands back what backprop does" if as_backprop else state.guess

    def _expected(self, call: Seen, place: Place) -> Tensor | None:
        """What a direct rule says comes back at ``place``; None where it cannot be computed again."""
        total: Tensor | None = None
        for sharing, at in self._sharing(call, place):
            fed = self._fed(sharing, at)
            if fed is None:
                return None
            total = fed if total is None else total + fed
        return total

    def _sharing(self, call: Seen, place: Place) -> list[tuple[Seen, Place]]:
        """All calls whose feedback the gradient at ``place`` is the sum of: one, unless skips are cut."""
        if place.shared is place:
            return [(call, place)]
        return [(c, p) for c in self.ours for p in c.places if p.shared == place.shared and c.delta is not None]

    def _fed(self, call: Seen, place: Place, dim: int | None = None) -> Tensor | None:
        """B e over the output calls downstream; with each sample's error weighted along ``dim``, if given."""
        state, total = call.state, torch.zeros_like(place.x)
        rule = state.rule
        assert isinstance(rule, DirectRule)
        other = self.calls.get(call)
        if rule.silent or other is None:
            return total
        used = self._used(call.name)
        number = call.first + place.index
        name = state.name if number == 0 else f"{state.name}#{number}"
        for output in self.flow.downstream(other):
            B = used.get(f"{name}@{output.state.name}", used.get(name))
            for e in self.errors.get(output, []):
                if e is None:
                    continue
                axis = output.state.kind.axis(e.dim())
                sent = signal(rule, e, axis)
                if dim is not None:
                    sent = weighted(sent, axis, dim)
                pick = other.pick
                if output.pick is not None and pick is not None and pick.same(output.pick):
                    pick = None  # the same rows: e's and the input's
                elif output.pick is not None:
                    sent = output.pick.put(sent)
                if (rows := self.flow.rows(other, output)) is not None:
                    sent = rows(sent)
                shape = place.x.shape
                whole = shape if pick is None else pick.whole(shape)
                above = self.states[output.name]
                fed = None if B is None else fed_back(state, rule, whole, above, sent, B)
                if fed is None:  # another call had another shape, and so a B of its own
                    ways = (fed_back(state, rule, whole, above, sent, B) for B in all_made(state, above.name, number))
                    fed = next((way for way in ways if way is not None), None)
                if fed is None:
                    return None
                total = total + (fed if pick is None else pick(fed)).to(total.dtype)
        if isinstance(rule, LearnedDirect) and rule.context:
            return self._with_context(total, call, place, number, dim)
        return total

    def _with_context(self, fed: Tensor, call: Seen, place: Place, number: int, dim: int | None) -> Tensor | None:
        """``fed`` and what the layer's own input adds to it, where a rule looks at that."""
        total = fed
        for output in self.flow.downstream(self.calls[call]):
            for e in self.errors.get(output, []):
                if e is None or output.pick is not None:
                    return None
                axis = output.state.kind.axis(e.dim())
                sees = signal(call.state.rule, e, axis)  # type: ignore[arg-type]
                sees = sees if dim is None else weighted(sees, axis, dim)
                rows = self.flow.rows(self.calls[call], output)
                seen = sees if rows is None else rows(sees)
                added = context(call.state, number, place.x, (seen, axis), output.state.name)
                if added is None:
                    return None
                total = total + added.to(fed.dtype)
        return total

    def _astray(self, call: Seen, place: Place) -> bool:
        """Whether a row got the feedback of another sample's error."""
        other = self.twins.get(place)
        if other not in self.samples.factors or place.shared is not place:
            return False
        fed = self._fed(call, place)
        if fed is None:
            return False
        weighted_too = {f.dim: self._fed(call, place, f.dim) for f in self.samples.factors.get(other, [])}
        known = {dim: t for dim, t in weighted_too.items() if t is not None}
        kept = _coarsest(call.state)
        coarse = kept is not None and kept.itemsize <= 2
        return self.samples.disagree(other, call.state.kind.axis(place.x.dim()), fed, known, coarse)

    def _error_arrives(self, pairs: list[tuple[Seen, Place]]) -> bool:
        outputs = [o for call, _ in pairs if call in self.calls for o in self.flow.downstream(self.calls[call])]
        return any(e is not None and bool(e.any()) for output in outputs for e in self.errors.get(output, []))


_BACKPROP = "backprop's own gradient"
_NOT_THE_RULE = "not what the rule says"


# -- parts -------------------------------------------------------------------------------------------


def _empty(copy: nn.Module) -> None:
    """Let the parameters of a copy go that has had its day: layers refer to each other, so nothing else would soon."""
    for p in copy.parameters():
        if type(p.data) is Tensor:
            p.data = p.data.new_empty(0)


def _share(copy: nn.Module, model: nn.Module) -> None:
    """Let a copy that no pass is run on any more have its parameters in common with the model, where they are equal."""
    for p, q in zip(copy.parameters(), model.parameters(), strict=True):
        if type(p.data) is type(q.data) is Tensor and p.shape == q.shape and torch.equal(p, q):
            p.data = q.data


def weights_of(layer: Layer) -> list[Tensor]:
    """What the layer's operation multiplies by: its weight, or what that is made of."""
    if layer.state.kind.part:
        return [getattr(layer.module, layer.state.kind.parameter)]
    ours = learned_names(layer.module)
    return [p for name, p in layer.module.named_parameters() if p.dim() > 1 and name not in ours]


def _filled(place: Place) -> Tensor:
    """What came back, zeros if nothing did."""
    return torch.zeros_like(place.x) if place.handed is None else place.handed


def _coarsest(state: LayerState) -> torch.dtype | None:
    """The dtype of a direct rule's feedback, if that is not the layer's own."""
    kept = state.structure().dtype if isinstance(state.rule, DirectRule) else None
    return kept if kept is not None and kept.is_floating_point else None


def _show(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.3f}"
