"""``convert`` and its inverse, and another rule for a while."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rewire import attention, buffers, hosts, jvp, structures
from rewire.arguments import check_model
from rewire.ask import states_in
from rewire.derivative import DerivativeState, surrogate_class
from rewire.entered import Entered
from rewire.errors import ConversionError, RewireWarning, nearest, some
from rewire.guard import MODES, Guard
from rewire.layers.own_forward import OwnForward
from rewire.learnable import learner_for, shared_weights
from rewire.roles import Role
from rewire.rules import DirectRule, LearnedDirect, LearnedLocal, LocalRule, Rule, Schedule, resolve
from rewire.rules.base import parts_of
from rewire.scale import weight_scale
from rewire.select import Choice, Layers, Pattern, RuleLike, check_rule, select
from rewire.state import STATE, LayerState
from rewire.swap import (
    Parts,
    Swapped,
    attention_class,
    is_swapped,
    rewired_class,
    states_of,
    swap_back,
    swap_in,
    swap_out,
)
from rewire.wiring import Wiring

M = TypeVar("M", bound=nn.Module)
_LARGEST = sys.float_info.max


def convert(
    model: M,
    rule: RuleLike = "dfa",
    *,
    output: str | Sequence[str] | None = None,
    layers: Layers | None = None,
    blocks: Sequence[Pattern] | Pattern | None = None,
    skip: str = "keep",
    feedback: str | structures.Structure = "dense",
    scale: str | float | Mapping[str, float] = "auto",
    seed: int = 0,
    derivative: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] | None = None,
    on_nonfinite: str | None = None,
) -> M:
    """Change how errors travel backwards through ``model``, in place, and return it.

    Forward, parameters, buffers, ``state_dict`` and hooks stay as they are. Converting a converted model
    replaces the earlier conversion. :func:`restore` undoes it.

    Args:
        model: any module. Its Linear, Conv and ConvTranspose layers (1d to 3d), subclasses of them, and
            transformers' ``Conv1D``, and the projections of ``nn.MultiheadAttention`` are converted; everything else
            keeps its true derivative.
        rule: a name (see :func:`rewire.rules`) or a rule.
        output: qualified name of the output layer (or names, if the loss sees several). None: found in the
            first training pass. A given name is checked there.
        layers: ``{pattern or type: rule}``; patterns are matched against qualified names
            (:mod:`fnmatch`), later entries win. Or a callable ``(name, module) -> rule or None``.
        blocks: patterns or types of modules treated as one unit: fed back once at their input, with exact
            backprop inside. Direct rules only.
        skip: ``"keep"``: skip connections carry their own gradient. ``"cut"``: the gradient of every fed-back
            tensor is the feedback and nothing else (direct rules).
        feedback: structure of B for direct rules: ``"dense"``, ``"channel"`` (dense, with one value per channel of a
            convolution's input in place of one per element), ``"uniform"``, ``"orthogonal"``, ``"binary"``,
            ``"ternary"``, ``"sparse"``, ``"lowrank"``, ``"shared"``, ``"seeded"``, with options
            ``"lowrank(rank=64)"``; or an object from :mod:`rewire.structures`, such as ``LowRank(rank=64)``. A rule may
            carry one of its own, which goes before: ``DFA(feedback="lowrank")`` after
            ``from rewire.rules import DFA``, or ``"dfa(feedback=lowrank(rank=64))"``.
        scale: standard deviation of the feedback's entries. ``"auto"``: for local rules the standard deviation
            of the layer's weight now; for direct rules it is measured: the first training pass is exact
            backprop, and each layer's feedback is scaled to what the layer handed back there (RMS). A number
            is used as it is, from the first step. A dict gives one per layer name, for instance the
            :func:`scales` of an earlier conversion.
        seed: of all random feedback.
        derivative: ``{activation type: f'}``: f'(a), of a's shape, replaces the activation's own derivative in
            the backward pass.
        on_nonfinite: what to do when the gradient that arrives at a layer's output (at an output layer: e) is not
            finite, when e is all zeros, or when one is 1,000 times larger than any in the first ten passes.
            ``"warn"``: say so, once by layer name. ``"raise"``: :class:`PassError`, before it reaches the layer's
            parameters. ``"skip"``: drop it there, with a warning: parameters it would have reached keep the ``.grad``
            they had (None after ``zero_grad()``, so that an optimizer leaves them alone); 100 in a row are an error.
            None: do not look, at no cost. PyTorch's gradient scaler has to see what is not finite: None or
            ``"warn"`` with it. Looking costs a reduction for each layer and pass, and on a GPU a wait for its result.

    Returns:
        ``model``, the same object.

    Raises:
        ConversionError: for any argument that cannot be used. The model is then as it was.

    Example:
        >>> model = rewire.convert(torchvision.models.resnet18(), "dfa", layers={"fc": "bp"})
    """
    check_model(model, "convert")
    structure = structures.resolve(feedback)
    _check_options(skip, scale, seed, on_nonfinite)
    earlier = _take_off(model)
    try:
        choices = select(model, rule, layers, blocks)
        wiring = Wiring(
            seed=seed,
            skip=skip,
            structure=structure,
            scale=scale,
            asked=_output_names(choices, output),
            guard=None if on_nonfinite is None else Guard(on_nonfinite),
        )
        scale_of = _scales_given(choices, scale)
        states = [_state(choice, wiring, scale_of(choice)) for choice in choices]
        surrogates = _surrogates(model, {} if derivative is None else derivative, choices)
        shared = shared_weights(model)
        for choice, state in zip(choices, states, strict=True):
            for part in parts_of(choice.rule):
                state.learner = state.learner or learner_for(state, choice.module, part, shared)
            state.refresh()
        parts: dict[nn.Module, list[LayerState]] = {}
        for choice, state in zip(choices, states, strict=True):
            parts.setdefault(choice.module, []).append(state)
        planned = hosts.plan(model, parts)
        _say_idle(choices, structure, skip)
        classes = [(attention_class if choice.part else rewired_class)(type(choice.module)) for choice in choices]
    except BaseException:
        _put_back(earlier)
        raise
    for choice, cls, state in zip(choices, classes, states, strict=True):
        wiring.layers[choice.name] = state
        if not choice.part:
            swap_in(choice.module, cls, state)
        elif states_of(choice.module):
            states_of(choice.module).append(state)
        else:
            swap_in(choice.module, cls, Parts([state]))
    for choice, state in zip(choices, states, strict=True):
        if state.learner is not None:
            state.learner.begin(choice.module)
    for module, surrogate_cls, surrogate in surrogates:
        swap_in(module, surrogate_cls, surrogate)
    for module in model.modules():
        hosts.remove(module)
        jvp.remove(module)
    jvp.attach(model, [choice.rule for choice in choices], wiring)
    hosts.attach(planned)
    return model


def restore(model: M) -> M:
    """Give every module its original class back. Weights are kept; nothing else is left behind.

    Returns:
        ``model``, the same object. A model that is not converted is left alone.

    Raises:
        ConversionError: if something put a class of its own on top of a converted layer (a parametrization,
            ``fully_shard``): that has to come off first.
    """
    check_model(model, "restore")
    _take_off(model)
    for module in model.modules():
        hosts.remove(module)
        jvp.remove(module)
    return model


def use_rule(model: M, rule: RuleLike) -> AbstractContextManager[M]:
    """All converted layers use ``rule`` in forwards inside the block; afterwards each has its own again.

    The backward of such a forward follows ``rule`` wherever it is run. Passes inside the block do not count for
    schedules and feedback that learns outside of it, unless ``rule`` counts passes itself. Without ``with`` nothing
    happens, and a warning says so.

    Args:
        model: a converted model.
        rule: a name or a rule.

    Example:
        >>> with rewire.use_rule(model, "bp"):
        ...     loss_fn(model(x), y).backward()
    """
    return Entered(lambda: _using(model, rule), f"rewire.use_rule(model, {rule!r})")


@contextmanager
def _using(model: M, rule: RuleLike) -> Iterator[M]:
    chosen = resolve(rule)
    _check_structure(chosen)
    states = [state for _, state in states_in(model)]
    for state in states:
        check_rule(state.name, state.kind, chosen)
        _check_learns(state, chosen)
        for part in parts_of(chosen):
            if isinstance(part, LearnedLocal) and (state.learner is None or repr(state.learner.rule) != repr(part)):
                raise ConversionError(
                    f"layer {state.label} has no feedback that {part!r} could use: it learns, and is made by "
                    f"convert(model, {repr(part)!r})"
                )
    before = [state.given for state in states]
    wirings = dict.fromkeys(state.wiring for state in states)
    probed = jvp.attach(model, [chosen], states[0].wiring)
    try:
        for state in states:
            state.use(chosen)
        for wiring in wirings:
            wiring.refresh()
        yield model
    finally:
        for state, old in zip(states, before, strict=True):
            state.use(old)
        for wiring in wirings:
            wiring.refresh()
        if probed:
            jvp.remove(model)


# -- parts -------------------------------------------------------------------------------------------


def _check_options(skip: object, scale: object, seed: object, on_nonfinite: object) -> None:
    if not isinstance(skip, str) or skip not in ("keep", "cut"):
        raise ConversionError(f"skip is 'keep' or 'cut', not {skip!r}")
    if on_nonfinite is not None and not (isinstance(on_nonfinite, str) and on_nonfinite in MODES):
        hint = nearest(on_nonfinite, MODES) if isinstance(on_nonfinite, str) else ""
        raise ConversionError(f"on_nonfinite is {', '.join(map(repr, MODES))} or None, not {on_nonfinite!r}{hint}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConversionError(f"seed is an int, not {seed!r}")
    auto = isinstance(scale, str) and scale == "auto"
    for value in scale.values() if isinstance(scale, Mapping) else () if auto else (scale,):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise ConversionError(
                f"scale is 'auto' or a positive number (or a dict of them by layer name), not {value!r}"
            )


def _say_idle(choices: list[Choice], structure: structures.Structure, skip: str) -> None:
    """Arguments about direct rules where no layer is given one."""
    if any(isinstance(part, DirectRule) for choice in choices for part in parts_of(choice.rule)):
        return
    given = [f"feedback={structure!r}"] if structure != structures.resolve("dense") else []
    given += [f"skip={skip!r}"] if skip != "keep" else []
    if given:
        rules = some(list(dict.fromkeys(repr(choice.rule) for choice in choices)), 4)
        warnings.warn(
            f"{' and '.join(given)}: only direct rules (dfa, ...) read that, and no layer is under one ({rules}). It "
            "does nothing, unless rewire.use_rule gives them one",
            RewireWarning,
            stacklevel=3,
        )


def _check_structure(rule: Rule) -> None:
    for part in parts_of(rule):
        if part is not rule:
            _check_structure(part)
    if isinstance(rule, DirectRule) and rule.feedback is not None:
        structures.resolve(rule.feedback)


def _check_learns(state: LayerState, rule: Rule | None = None) -> None:
    """Feedback that learns has to keep something of its own."""
    for part in parts_of(state.given if rule is None else rule):
        structure = state.structure(part)
        if isinstance(part, LearnedDirect) and structure.fixed:
            able = ", ".join(repr(name) for name, other in structures.NAMES.items() if not other.fixed)
            raise ConversionError(
                f"layer {state.label}: {part!r} learns its feedback, and {structure!r} {structure.fixed}. Use one of "
                f"{able}"
            )


def _output_names(choices: list[Choice], output: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if output is None:
        return None
    if not isinstance(output, (str, Sequence)):
        raise ConversionError(f"output is a layer's name, or several, or None to have it found, not {output!r}")
    asked = (output,) if isinstance(output, str) else tuple(output)
    known = {name: choice.name for choice in choices for name in choice.names}
    if not asked:
        raise ConversionError("output is a layer's name, or several, or None to have it found")
    for name in asked:
        if not isinstance(name, str) or name not in known:
            hint = nearest(name, known) if isinstance(name, str) else ""
            raise ConversionError(f"output: no layer is named {name!r}{hint}; layers: {some([*map(repr, known)], 12)}")
    return tuple(dict.fromkeys(known[name] for name in asked))


def _scales_given(choices: list[Choice], scale: str | float | Mapping[str, float]) -> Callable[[Choice], float | None]:
    if isinstance(scale, Mapping):
        known = {choice.name for choice in choices}
        for name in scale:
            if name not in known:
                hint = nearest(name, known) if isinstance(name, str) else ""
                raise ConversionError(f"scale: no layer is named {name!r}{hint}")
        return lambda choice: scale.get(choice.name)
    if isinstance(scale, str):
        return lambda choice: None
    return lambda choice: float(scale)


def _state(choice: Choice, wiring: Wiring, given: float | None) -> LayerState:
    _check_structure(choice.rule)
    state = LayerState(choice.name, choice.kind, choice.rule, wiring, scale=given, std=given)
    local = any(isinstance(part, LocalRule) for part in parts_of(choice.rule))
    if given is None and local and not isinstance(choice.kind, OwnForward):
        weight = choice.kind.look(choice.module)
        if not weight.is_meta:
            state.std, state.std_note = weight_scale(weight)
    own = choice.kind.own(choice.module)
    if given is None and own is not None and not is_lazy(own) and own.numel() == 0:
        state.scale, state.scale_note = 1.0, "its weight has no numbers"  # nor will any pass show how large they are
    if wiring.asked is not None and choice.name in wiring.asked:
        state.role = Role.OUTPUT
    _check_learns(state)
    if choice.part or choice.within is not None:
        state.functional = True  # given to the attention's function
        state.seated = attention.plain(choice.module if choice.part else choice.within)
    if isinstance(choice.rule, Schedule):
        buffers.keep_count(state)
    state.refresh()
    return state


def _surrogates(
    model: nn.Module, derivative: Mapping[type[nn.Module], Callable[[Tensor], Tensor]], choices: list[Choice]
) -> list[tuple[nn.Module, type[nn.Module], DerivativeState]]:
    if not isinstance(derivative, Mapping):
        raise ConversionError(f"derivative: a dict {{module type: function of a}} is needed, not {derivative!r}")
    taken = {choice.module for choice in choices}
    found: list[tuple[nn.Module, type[nn.Module], DerivativeState]] = []
    for kind, function in derivative.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or not callable(function):
            raise ConversionError(
                f"derivative: {{module type: function of a}} is needed, not {{{kind!r}: {function!r}}}"
            )
        fitting = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
        if not fitting:
            raise ConversionError(
                f"derivative: the model has no {kind.__name__} module "
                "(functional calls such as F.relu cannot be replaced)"
            )
        for name, module in fitting:
            if module in taken:
                raise ConversionError(f"derivative: {name!r} is converted itself, or twice; give activations only")
            taken.add(module)
            found.append((module, surrogate_class(type(module)), DerivativeState(name, function)))
    return found


def _take_off(model: nn.Module) -> list[tuple[nn.Module, Swapped]]:
    """Restore all modules; returns what :func:`_put_back` needs."""
    converted = [(name, m) for name, m in model.named_modules() if STATE in m.__dict__]
    for name, module in converted:
        if not is_swapped(module):
            raise ConversionError(
                f"layer {name!r} was given another class after conversion ({type(module).__name__}): remove that "
                "first, or convert after it"
            )
    return [(module, swap_out(module)) for _, module in converted]


def _put_back(taken: list[tuple[nn.Module, Swapped]]) -> None:
    for module, swapped in taken:
        swap_back(module, swapped)
