"""``convert`` and its inverse, and what can be asked of a converted model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from rewire import hosts, structures
from rewire.derivative import DerivativeState, surrogate_class
from rewire.errors import ConversionError, nearest
from rewire.layers.own_forward import OwnForward
from rewire.rules import DirectRule, LocalRule, Rule, resolve
from rewire.select import Choice, Layers, Pattern, RuleLike, check_rule, select
from rewire.swap import STATE, Parts, attention_class, is_swapped, rewired_class, states_of, swap_in, swap_out
from rewire.wiring import LayerState, Role, Wiring, weight_scale

M = TypeVar("M", bound=nn.Module)


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
            ``"ternary"``, ``"sparse"``, ``"lowrank"``, ``"shared"``, ``"seeded"``, or an object from
            :mod:`rewire.structures`, such as ``LowRank(rank=64)``. A rule object may carry one of its own
            (``DFA(feedback="lowrank")``), which goes before.
        scale: standard deviation of the feedback's entries. ``"auto"``: for local rules the standard deviation
            of the layer's weight now; for direct rules it is measured: the first training pass is exact
            backprop, and each layer's feedback is scaled to what the layer handed back there (RMS). A number
            is used as it is, from the first step. A dict gives one per layer name, for instance the
            :func:`scales` of an earlier conversion.
        seed: of all random feedback.
        derivative: ``{activation type: f'}``: f'(a), of a's shape, replaces the activation's own derivative in
            the backward pass.

    Returns:
        ``model``, the same object.

    Raises:
        ConversionError: for any argument that cannot be used. The model is then as it was.

    Example:
        >>> model = rewire.convert(torchvision.models.resnet18(), "dfa", layers={"fc": "bp"})
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert needs a torch.nn.Module, not {type(model).__name__}")
    structure = structures.resolve(feedback)
    _check_options(skip, scale, seed)
    earlier = _take_off(model)
    try:
        choices = select(model, rule, layers, blocks)
        wiring = Wiring(
            seed=seed,
            skip=skip,
            structure=structure,
            scale=scale,
            asked=_output_names(choices, output),
        )
        scale_of = _scales_given(choices, scale)
        states = [_state(choice, wiring, scale_of(choice)) for choice in choices]
        surrogates = _surrogates(model, derivative or {}, choices)
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
    for module, surrogate_cls, surrogate in surrogates:
        swap_in(module, surrogate_cls, surrogate)
    for module in model.modules():
        hosts.remove(module)
    hosts.attach(model, {choice.module: states_of(choice.module) for choice in choices})
    return model


def restore(model: M) -> M:
    """Give every module its original class back. Weights are kept; nothing else is left behind.

    Returns:
        ``model``, the same object. A model that is not converted is left alone.

    Raises:
        ConversionError: if something put a class of its own on top of a converted layer (a parametrization,
            ``fully_shard``): that has to come off first.
    """
    _take_off(model)
    for module in model.modules():
        hosts.remove(module)
    return model


def feedback(model: nn.Module) -> dict[str, Tensor]:
    """The feedback actually used, by layer name.

    Returns:
        For local rules the backward weight, of the weight's shape (``brsf``: the newest draw). For direct
        rules B, of shape ``(n, *input without batch)`` when every element has its own values and
        ``(n, features)`` when positions share them, n being the number of outputs; known once the layer took
        part in a backward pass. With several output layers the keys of direct rules are ``"layer@output"``.
        Layers on ``bp``, and direct ones with nothing to hand back, are absent. Tensors are detached; changing them in
        place changes the feedback of ``fa``, and of direct rules where all of B is kept
        (:class:`rewire.structures.Dense`). For other structures this is the equivalent B, made for the caller.
    """
    found: dict[str, Tensor] = {}
    for module, state in _states(model):
        rule = state.rule
        if isinstance(rule, LocalRule):
            weight = state.kind.look(module) if state.used is None else state.used
            not_run = state.std is None or (rule.uses_weight and state.used is None)
            if weight.is_meta or (not_run and isinstance(state.kind, OwnForward)):
                continue
            scale = state.local_scale(weight)
            draw = state.draws if rule.redraw else 0
            random = state.random(rule, weight.shape, weight.dtype, weight.device, draw) if rule.random else None
            found[state.name] = rule.backward_weight(weight, random, scale).detach()
        elif isinstance(rule, DirectRule) and not rule.silent:
            several = len({output for output, _ in state.shapes}) > 1
            for (output, index), tensor in state.direct_feedbacks(module).items():
                name = state.name if index == 0 else f"{state.name}#{index}"
                found[f"{name}@{output}" if several else name] = tensor
    return found


def output_error(model: nn.Module) -> Tensor | dict[str, Tensor] | None:
    """The global output-error buffer: e = dL/dy at the output layer in the newest pass.

    Returns:
        e, of the output's shape and dtype, detached; None before a backward has reached the output layer in
        the newest pass. With several output layers a dict by layer name.
    """
    wiring = _wiring(model)
    if len(wiring.outputs) > 1:
        return dict(wiring.errors) or None
    return next(iter(wiring.errors.values()), None)


def scales(model: nn.Module) -> dict[str, float]:
    """Standard deviation of the feedback's entries, by layer name, as far as it is known.

    For ``scale="auto"`` these are the measured values; give them to ``convert(..., scale=...)`` to get the
    same feedback again without a measuring pass, for instance when training is resumed.
    """
    found: dict[str, float] = {}
    for _, state in _states(model):
        value = state.scale if isinstance(state.rule, DirectRule) else state.std
        if value is not None:
            found[state.name] = value
    return found


@contextmanager
def use_rule(model: M, rule: RuleLike) -> Iterator[M]:
    """All converted layers use ``rule`` in forwards inside the block; afterwards each has its own again.

    The backward of such a forward follows ``rule`` wherever it is run.

    Args:
        model: a converted model.
        rule: a name or a rule.

    Example:
        >>> with rewire.use_rule(model, "bp"):
        ...     loss_fn(model(x), y).backward()
    """
    chosen = resolve(rule)
    _check_structure(chosen)
    states = [state for _, state in _states(model)]
    for state in states:
        check_rule(state.name, state.kind, chosen)
    before = [state.rule for state in states]
    try:
        for state in states:
            state.rule = chosen
            state.refresh()
        yield model
    finally:
        for state, old in zip(states, before, strict=True):
            state.rule = old
            state.refresh()


# -- parts -------------------------------------------------------------------------------------------


def _check_options(skip: object, scale: object, seed: object) -> None:
    if skip not in ("keep", "cut"):
        raise ConversionError(f"skip is 'keep' or 'cut', not {skip!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConversionError(f"seed is an int, not {seed!r}")
    values = scale.values() if isinstance(scale, Mapping) else () if scale == "auto" else (scale,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ConversionError(
                f"scale is 'auto' or a positive number (or a dict of them by layer name), not {value!r}"
            )


def _check_structure(rule: Rule) -> None:
    if isinstance(rule, DirectRule) and rule.feedback is not None:
        structures.resolve(rule.feedback)


def _output_names(choices: list[Choice], output: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if output is None:
        return None
    asked = (output,) if isinstance(output, str) else tuple(output)
    known = {name: choice.name for choice in choices for name in choice.names}
    if not asked:
        raise ConversionError("output is a layer's name, or several, or None to have it found")
    for name in asked:
        if name not in known:
            hint = nearest(name, known) if isinstance(name, str) else ""
            raise ConversionError(f"output: no layer is named {name!r}{hint}; layers: {_some(known)}")
    return tuple(dict.fromkeys(known[name] for name in asked))


def _some(names: Mapping[str, Any], most: int = 12) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")


def _scales_given(choices: list[Choice], scale: str | float | Mapping[str, float]) -> Callable[[Choice], float | None]:
    if isinstance(scale, Mapping):
        known = {choice.name for choice in choices}
        for name in scale:
            if name not in known:
                raise ConversionError(f"scale: no layer is named {name!r}{nearest(name, known)}")
        return lambda choice: scale.get(choice.name)
    if isinstance(scale, str):
        return lambda choice: None
    return lambda choice: float(scale)


def _state(choice: Choice, wiring: Wiring, given: float | None) -> LayerState:
    _check_structure(choice.rule)
    state = LayerState(choice.name, choice.kind, choice.rule, wiring, scale=given, std=given)
    if given is None and isinstance(choice.rule, LocalRule) and not isinstance(choice.kind, OwnForward):
        weight = choice.kind.look(choice.module)
        if not weight.is_meta:
            state.std, state.std_note = weight_scale(weight)
    if wiring.asked is not None and choice.name in wiring.asked:
        state.role = Role.OUTPUT
    if choice.part or choice.within is not None:
        state.functional = True  # given to the attention's function
    state.refresh()
    return state


def _surrogates(
    model: nn.Module, derivative: Mapping[type[nn.Module], Callable[[Tensor], Tensor]], choices: list[Choice]
) -> list[tuple[nn.Module, type[nn.Module], DerivativeState]]:
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


def _take_off(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module], object]]:
    """Restore all modules; returns what :func:`_put_back` needs."""
    converted = [(name, m) for name, m in model.named_modules() if STATE in m.__dict__]
    for name, module in converted:
        if not is_swapped(module):
            raise ConversionError(
                f"layer {name!r} was given another class after conversion ({type(module).__name__}): remove that "
                "first, or convert after it"
            )
    taken = [(module, type(module), module.__dict__[STATE]) for _, module in converted]
    for module, _, _ in taken:
        swap_out(module)
    return taken


def _put_back(taken: list[tuple[nn.Module, type[nn.Module], object]]) -> None:
    for module, cls, state in taken:
        swap_in(module, cls, state)


def _states(model: nn.Module) -> list[tuple[nn.Module, LayerState]]:
    found = [(module, state) for module in model.modules() for state in states_of(module)]
    if not found:
        raise ConversionError(f"{type(model).__name__} is not converted: call rewire.convert(model, ...) first")
    for wiring in {id(state.wiring): state.wiring for _, state in found}.values():
        wiring.settle_if_alone()
    return found


def _wiring(model: nn.Module) -> Wiring:
    return _states(model)[0][1].wiring
