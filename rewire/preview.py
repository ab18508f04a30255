"""What feedback would cost, found by a forward without a backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rewire.errors import RoutingError
from rewire.routing import plan
from rewire.rules.base import BP, DirectRule, LearnedDirect
from rewire.state import LayerState
from rewire.swap import states_of

Shapes = dict[str, dict[tuple[str, int], tuple[int, ...]]]  # {layer: {(output layer, input): shape}}


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@dataclass(frozen=True)
class Preview:
    """What a forward has shown.

    Attributes:
        shapes: of the direct feedback that the inputs would need.
        ran: names of the layers that ran.
        stuck: of those among them with an input that has no route.
        first: of those among them whose inputs need no gradient: they have nothing to hand back to.
    """

    shapes: Shapes
    ran: set[str]
    stuck: set[str]
    first: set[str]


def preview(model: nn.Module, inputs: Any) -> Preview:
    """What ``inputs`` would need.

    One forward in eval mode. Nothing about the model changes: no batch statistics, no roles, no gradients, no
    random state. Where the output layer is not known yet, the last layer to run is taken for it.
    """
    every = [(module, state) for module in model.modules() for state in states_of(module)]
    states = [state for _, state in every]
    seen: list[tuple[str, list[tuple[int, ...]]]] = []
    outputs: dict[str, tuple[tuple[int, ...], int]] = {}

    def note(state: LayerState, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        fed = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.requires_grad]
        seen.append((state.name, [tuple(x.shape) for x in fed]))
        first = next((y for y in tree_flatten(output)[0] if isinstance(y, Tensor)), None)
        if first is not None:
            outputs[state.name] = (tuple(first.shape), state.kind.axis(first.dim()))

    rules = {state: (state.rule, state.ran, state.steady, state.steady_use) for state in states}
    errors = {id(state.wiring): (state.wiring, dict(state.wiring.errors)) for state in states}
    modes = [(module, module.training) for module in model.modules()]
    called = [(module, state) for module, state in every if not state.kind.part]
    hooks = [module.register_forward_hook(partial(note, state), with_kwargs=True) for module, state in called]
    try:
        for state in states:
            state.observer = (_given, note)  # for weights that another module uses directly
            state.rule = BP()  # plain PyTorch: what flows forward is the same under every rule
            state.steady = state.steady_use = ""  # the short ways are the other rule's
        model.eval()
        with torch.enable_grad(), torch.random.fork_rng():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for state in states:
            state.observer = None
        for module, mode in modes:
            module.training = mode
        for state, (rule, ran, steady, steady_use) in rules.items():
            state.rule, state.ran, state.steady, state.steady_use = rule, ran, steady, steady_use
        for wiring, kept in errors.values():
            wiring.errors = kept

    shapes: Shapes = {}
    stuck: set[str] = set()
    by_name = {state.name: state for state in states}
    for name, inputs_seen in seen:
        state = by_name[name]
        if not isinstance(state.rule, DirectRule) or state.rule.silent:
            continue
        targets = [o for o in state.wiring.outputs if o in outputs] or [seen[-1][0]]
        for output in targets:
            e_shape, e_axis = outputs[output]
            e_shape = _signal_shape(state.rule, e_shape, e_axis)
            for index, x_shape in enumerate(inputs_seen):
                try:
                    axis = state.kind.axis(len(x_shape))
                    route = plan(
                        x_shape, axis, e_shape, e_axis, structure=state.structure().routing, layout=state.rule.layout
                    )
                except RoutingError:
                    stuck.add(name)
                    continue
                shapes.setdefault(name, {})[output, index] = route.feedback_shape
    called_names = {name for name, _ in seen}
    fed = {name for name, inputs_seen in seen if inputs_seen}
    return Preview(shapes, called_names, stuck, called_names - fed)


def _signal_shape(rule: DirectRule, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Shape of what a rule makes of an e of ``shape``. One that learns may sum its outputs up to fewer numbers."""
    if not isinstance(rule, LearnedDirect) or rule.needs_targets:
        return shape
    features = axis % len(shape)
    like = torch.zeros([size if i == features else 1 for i, size in enumerate(shape)])
    heard = rule.signal(like, None, axis).shape[features]
    return (*shape[:features], heard, *shape[features + 1 :])


def _given(state: LayerState, module: nn.Module, args: Any, kwargs: Any, *_: Any) -> tuple[Any, Any]:
    return args, kwargs
