"""What can be asked of a converted model, and what can be done with its feedback."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from rewire.arguments import check_model
from rewire.errors import ConversionError
from rewire.layer_feedback import dense_feedback
from rewire.layers.own_forward import OwnForward
from rewire.rules import DirectRule, LearnedLocal, LocalRule
from rewire.state import LayerState
from rewire.swap import states_of
from rewire.wiring import Wiring

M = TypeVar("M", bound=nn.Module)


def feedback(model: nn.Module) -> dict[str, Tensor]:
    """The feedback in use, by layer name: what the next backward hands back by.

    Rules that learn, and those on a schedule, take in what a pass has shown as soon as it is asked for afterwards. So
    after ``backward()`` this shows the next pass's B: for the one that a backward will use, call it between forward and
    backward.

    Returns:
        For local rules the backward weight, of the weight's shape (``brsf``: the newest draw). For direct
        rules B, of shape ``(n, *input without batch)`` when every element has its own values and
        ``(n, features)`` when positions share them, n being the number of outputs; known once the layer took
        part in a backward pass. Of a layer that several output layers feed the keys are ``"layer@output"``.
        Layers on ``bp``, and direct ones with nothing to hand back, are absent. Tensors are detached; changing them in
        place changes the feedback of ``fa``, and of direct rules where all of B is kept
        (:class:`rewire.structures.Dense`): of this model, of copies and pickles of it, and on other devices and in
        other dtypes. No seed gives it again, so :func:`rewire.config` refuses, and ``state_dict`` never has fixed
        feedback. For other structures this is the equivalent B, made for the caller.
    """
    found: dict[str, Tensor] = {}
    for module, state in states_in(model):
        rule = state.rule
        if isinstance(rule, LearnedLocal):
            if state.learner is not None:
                found[state.name] = state.learner.feedback(module)
        elif isinstance(rule, LocalRule):
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
            for (output, index), tensor in dense_feedback(state, module).items():
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
    for _, state in states_in(model):
        value = state.scale if isinstance(state.rule, DirectRule) else state.std
        if value is not None:
            found[state.name] = value
    return found


def mirror(model: M, steps: int = 1000) -> dict[str, float]:
    """Run mirror steps on all layers under ``wm``, with the weights as they are.

    Each layer is given noise of its own, at one position, without bias and what follows it; no input is needed, and
    nothing but the feedback changes: gradients, batch statistics and random state are as before. To be called by every
    rank, or by none.

    Args:
        model: a converted model.
        steps: number of steps; about 5 / rate of them make B forget what it was.

    Returns:
        The angle between W and B in degrees, by layer name.

    Raises:
        ConversionError: if no layer is under ``wm``, or ``steps`` is no positive whole number.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConversionError(f"steps is a whole number of at least 1, not {steps!r}")
    found = [(m, s.learner) for m, s in states_in(model) if s.learner is not None and s.learner.rule.every is not None]
    if not found:
        raise ConversionError(f"no layer of {type(model).__name__} is under a rule that mirrors: convert(model, 'wm')")
    angles: dict[str, float] = {}
    for module, learner in found:
        learner.mirror(module, steps)
        angles[learner.state.name] = learner.angle(module)
    return angles


def states_in(model: nn.Module) -> list[tuple[nn.Module, LayerState]]:
    """All converted layers, with what the last pass showed taken in; an error if there are none."""
    check_model(model, "rewire")
    found = [(module, state) for module in model.modules() for state in states_of(module)]
    if not found:
        raise ConversionError(f"{type(model).__name__} is not converted: call rewire.convert(model, ...) first")
    for wiring in {id(state.wiring): state.wiring for _, state in found}.values():
        wiring.settle_if_alone()
    return found


def _wiring(model: nn.Module) -> Wiring:
    return states_in(model)[0][1].wiring
