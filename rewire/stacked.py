"""Several models of one architecture as one function, for ``torch.func.vmap``: many seeds trained together.

Under ``vmap`` a model runs once for all members of a stack, with parameters that have a dimension more. So do its
feedback tensors have to: each member keeps the feedback of its own seed. Feedback is otherwise something a layer makes
by itself; inside a :class:`Stack`'s call it is given from outside, through a context variable, so that no layer
remembers anything of it and other threads and later passes see nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rewire.errors import ConversionError
from rewire.layer_feedback import dense_feedback, keeps_tensors
from rewire.roles import Role
from rewire.rules.base import BP, DirectRule, LocalRule, Rule, Schedule

if TYPE_CHECKING:
    from rewire.state import LayerState

# What one call of a Stack was given, by the name that `_key` makes, and whose layers it is for.
_given: ContextVar[tuple[object, Mapping[str, Tensor]] | None] = ContextVar("rewire_given_feedback", default=None)


def _key(layer: str, output: str | None = None, index: int = 0) -> str:
    return layer if output is None else f"{layer}#{index}@{output}"


def given_local(state: LayerState) -> Tensor | None:
    """R and s of a local rule, flat in one tensor, if they are given from outside."""
    given = _given.get()
    return given[1].get(_key(state.name)) if given is not None and given[0] is state.wiring else None


def given_direct(state: LayerState, output: str, index: int) -> Tensor | None:
    """B of a direct rule for one output layer and input, if it is given from outside."""
    given = _given.get()
    return given[1].get(_key(state.name, output, index)) if given is not None and given[0] is state.wiring else None


class Stack:
    """Models of one architecture, converted in the same way or not at all, as one pure function.

    Calling it gives the output of one member, with parameters, buffers and feedback from outside; ``vmap`` over
    these runs all members at once, and ``grad`` inside gives each the gradients of its own rule and seed.

    Attributes:
        params: copies of the parameters, by name, each (members, *shape), detached.
        buffers: the same of the buffers.
        feedback: what each member's layers use, by a name of ours; (members, ...).

    Args:
        models: at least one. Each must have seen enough ordinary training passes for its output layers to be found
            and its scales measured (one, or two), unless it is not converted. The first one's modules are used by the
            calls; none of them is changed.

    Raises:
        ConversionError: the models differ; a rule learns its feedback, draws it anew or is on a schedule;
            ``skip="cut"``; feedback of a structure that is no plain tensor; a pass is still missing.

    Example:
        >>> stack = Stack(models)
        >>> def loss(params, buffers, feedback, x, y):
        ...     return loss_fn(stack(params, buffers, feedback, x), y)
        >>> gradients = vmap(grad(loss))(stack.params, stack.buffers, stack.feedback, xs, ys)
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        if not models:
            raise ConversionError("a stack needs at least one model")
        self.model = models[0]
        self.params = _stacked("parameter", [dict(model.named_parameters()) for model in models])
        self.buffers = _stacked("buffer", [dict(model.named_buffers()) for model in models])
        self.feedback = _stacked("feedback", [feedback_of(model) for model in models])
        self._wiring = next((state.wiring for _, state in _states(self.model)), None)
        written = [[(state.name, repr(state.rule), state.role) for _, state in _states(model)] for model in models]
        if any(each != written[0] for each in written):
            raise ConversionError("the models are converted in different ways")

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        feedback: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The output of one member; call it inside ``vmap``, ``grad`` or both."""
        token = _given.set((self._wiring, feedback))
        try:
            return functional_call(self.model, (dict(params), dict(buffers)), args, kwargs)
        finally:
            _given.reset(token)


def feedback_of(model: nn.Module) -> dict[str, Tensor]:
    """All that the rules of a converted model use beside its weights, as :class:`Stack` gives it to layers.

    Raises:
        ConversionError: see :class:`Stack`.
    """
    check_rules(model)
    found: dict[str, Tensor] = {}
    for module, state in _states(model):
        rule = state.rule
        if isinstance(rule, BP):
            continue
        if state.wiring.skip == "cut":
            raise ConversionError("skip='cut' does not work under torch.func transforms")
        if state.wiring.unsettled:
            state.wiring.settle()
        if isinstance(rule, DirectRule):
            found |= _direct(module, state, rule)
        elif isinstance(rule, LocalRule):
            found[_key(state.name)] = _local(module, state, rule)
    return found


def check_rules(model: nn.Module) -> None:
    """Raise :class:`ConversionError` where feedback would have to change while a stack is trained."""
    for _, state in _states(model):
        if why := _changes(state.given):
            raise ConversionError(f"rule {state.given!r} {why}, and a stack goes on with what it was given")


def _changes(rule: Rule) -> str:
    """How what ``rule`` hands back changes from step to step; "" if it does not, as a rule of one's own may not."""
    if isinstance(rule, Schedule):
        return "is another rule in some passes"
    if rule.learns:
        return "learns its feedback, which changes from step to step"
    if isinstance(rule, LocalRule) and rule.redraw:
        return "draws its feedback anew, so that it changes from step to step"
    return ""


def _local(module: nn.Module, state: LayerState, rule: LocalRule) -> Tensor:
    weight = state.kind.look(module)
    scale = weight.new_full((1,), state.local_scale(weight))
    if not rule.random:
        return scale
    return torch.cat([state.random(rule, weight.shape, weight.dtype, weight.device).flatten(), scale])


def _direct(module: nn.Module, state: LayerState, rule: DirectRule) -> dict[str, Tensor]:
    if rule.silent:
        return {}
    # A layer whose input needs no gradient, the first one usually, hands nothing back and is never measured.
    if state.role is Role.UNKNOWN or (state.shapes and not state.settled):
        raise ConversionError(f"layer {state.label} waits for a training pass to show its output layer and its scale")
    if not keeps_tensors(state):
        raise ConversionError(f"layer {state.label} has feedback that is no plain tensor, {state.structure()!r}")
    return {_key(state.name, *place): B for place, B in dense_feedback(state, module).items()}


def _stacked(what: str, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    first = members[0]
    for other in members:
        if list(other) != list(first) or any(other[name].shape != first[name].shape for name in first):
            raise ConversionError(f"the models differ in their {what}s")
    return {name: torch.stack([member[name].detach() for member in members]) for name in first}


def _states(model: nn.Module) -> list[tuple[nn.Module, LayerState]]:
    from rewire.swap import states_of  # imports what imports this module

    return [(module, state) for module in model.modules() for state in states_of(module)]
