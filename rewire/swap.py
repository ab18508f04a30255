"""Changing what a module's forward does by changing its class, in place, as parametrizations do.

Everything else about the object stays: parameters, buffers, hooks, attributes, identity. The new class is
a subclass of the old one, so ``isinstance`` holds, and setting the old class again undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewire import buffers, hosts, kernels, learned, traced, traced_attention
from rewire.run import run
from rewire.state import STATE, LayerState
from rewire.steady import STEADY

# Looked up once: these run in every call of every layer.
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_compiler = traced.compiler

OWNER = "_rewire_owner"  # beside the state


Builder = Callable[[type[nn.Module]], type[nn.Module]]
_classes: dict[tuple[Any, type], type[nn.Module]] = {}


def derive(base: type[nn.Module], builder: Builder, body: dict[str, Any]) -> type[nn.Module]:
    """A subclass of ``base`` with ``body``, named after it.

    Args:
        builder: the module-level function that asked. The class is made at run time, so pickles of its
            objects name ``builder`` and ``base`` instead of it.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        getstate: Callable[[], Any] = self.__getstate__  # a class that refuses to be pickled does so here
        return _empty, (builder, base), getstate()

    common = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_rewired_from": base,
    }
    return type(f"Rewired{base.__name__}", (base,), common | body)


def _empty(builder: Builder, base: type[nn.Module]) -> nn.Module:
    cls = builder(base)
    return cls.__new__(cls)


def rewired_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward runs under a rule. One per class, made when first needed."""
    key = (rewired_class, base)
    if key in _classes:
        return _classes[key]

    traced.register()
    hosts.register()
    parent: Any = base
    fast = kernels.forward_for(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _grad_enabled():
            probe = self.__dict__[STATE].probe
            if probe is not None:
                return probe.call(self.__dict__[STATE], self, parent.forward, args, kwargs)
            return parent.forward(self, *args, **kwargs)
        state: LayerState = self.__dict__[STATE]
        if _compiling():
            if traced.exports(self.training):
                return parent.forward(self, *args, **kwargs)
            ready = traced.prepare(state.wiring.key, state.wiring.unsettled) and state.in_graph
            if ready and not traced.lacks(state, args, kwargs):
                return traced.call(state, self, parent.forward, args, kwargs)
            return _outside_of_compile(state, self, parent.forward, args, kwargs)
        if _compiler() is not None:  # what calls it was left out
            return _outside_of_compile(state, self, parent.forward, args, kwargs)
        steady = state.steady
        if steady and len(args) == 1 and not kwargs:
            return STEADY[steady](state, self, parent.forward, fast or parent.forward, args[0])
        return run(state, self, parent.forward, args, kwargs)

    traced.never_alone(forward)

    def _slow_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What nn.Module calls in place of forward while torch.jit traces: so no other call has to ask whether it does.
        with traced.as_it_was(self.__dict__[STATE], self.training):
            return parent._slow_forward(self, *args, **kwargs)

    def extra_repr(self: nn.Module) -> str:
        plain: str = parent.extra_repr(self)
        rule = f"rule={self.__dict__[STATE].rule!r}"
        return f"{plain}, {rule}" if plain else rule

    body = {
        "forward": forward,
        "_slow_forward": _slow_forward,
        "extra_repr": extra_repr,
        kernels.FAST: fast and staticmethod(fast),
        **_keeping(parent),
    }
    cls = _classes[key] = derive(base, rewired_class, body)
    return cls


def _keeping(parent: Any) -> dict[str, Any]:
    """Methods of a converted layer that see to feedback that learns (:mod:`rewire.learned`)."""

    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        parent._apply(self, *args, **kwargs)  # .to(), .half(): buffers are other tensors afterwards
        for state in states_of(self):
            buffers.relink(state, self)
        return self

    def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        states = states_of(self)
        tags = [state.tag for state in states if state.saves and state.learner is None]
        learned.load(self, parent, tags, state_dict, prefix, *rest)
        wrong = [buffers.other_seed(state, state_dict, prefix) for state in states if state.saves]
        rest[-1].extend(filter(None, wrong))  # what load_state_dict raises
        for state in states:
            buffers.relink(state, self)
            if state.learner is not None:
                state.learner.loaded(self, any(key.startswith(prefix + state.tag) for key in state_dict))

    def _save_to_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        for state in states_of(self):
            if state.saves or state.learner is not None:
                state.wiring.settle_if_alone()  # what the last pass has shown is a part of what was learned
                buffers.save(state, self)
        parent._save_to_state_dict(self, *args, **kwargs)

    return {
        "_apply": _apply,
        "_load_from_state_dict": _load_from_state_dict,
        "_save_to_state_dict": _save_to_state_dict,
    }


class Parts:
    """The states of an attention's own projections, in place of one layer's state."""

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states


def attention_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an ``nn.MultiheadAttention`` whose projections run under their rules."""
    key = (attention_class, base)
    if key in _classes:
        return _classes[key]

    traced.register()
    traced_attention.register()
    parent: Any = base

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _grad_enabled():
            return parent.forward(self, *args, **kwargs)
        states: list[LayerState] = self.__dict__[STATE].states
        output = state_of(self.out_proj)
        if _compiling():
            if traced.exports(self.training):
                return parent.forward(self, *args, **kwargs)
            wiring = states[0].wiring
            layers = states if output is None else [*states, output]
            ready = traced.prepare(wiring.key, wiring.unsettled) and all([s.in_graph and s.seated for s in layers])
            lacking = any([traced.lacks(s, args, kwargs) for s in states])
            if output is not None:  # its input is made of all of that
                lacking = lacking or traced.lacks(output, (*args, *self._parameters.values()), kwargs)
            if ready and not lacking:
                return traced_attention.call(self, states, output, args, kwargs)
            return _attend_outside_of_compile(self, states, output, parent.forward, args, kwargs)
        if _compiler() is not None:
            return _attend_outside_of_compile(self, states, output, parent.forward, args, kwargs)
        if traced.in_jit(self.training):
            return parent.forward(self, *args, **kwargs)
        return hosts.attend(self, states, output, parent.forward, args, kwargs)

    traced.never_alone(forward)
    cls = _classes[key] = derive(base, attention_class, {"forward": forward, **_keeping(parent)})
    return cls


# For what cannot be part of a compiled graph: each such layer is a graph break.
_disable: Callable[..., Any] = torch.compiler.disable
_why = (
    "rewire: this layer cannot be part of a compiled graph. With fullgraph=True, run one ordinary training step before "
    "the first compiled one: it finds the output layers and measures scales. Not compiled at all: feedback "
    "that learns or does not say of which tensors it is made, weights that other modules use, attention with a forward "
    "of its own, on_nonfinite. Once layers ran outside of a graph, compile a copy.deepcopy of the model"
)
_outside_of_compile: Callable[..., Any] = _disable(traced.outside, reason=_why)


def _attend_outside(
    module: nn.MultiheadAttention, states: list[LayerState], output: LayerState | None, *rest: Any
) -> Any:
    for state in (*states, output):
        if state is not None:
            traced.left_out(state)
    return hosts.attend(module, states, output, *rest)


_attend_outside_of_compile: Callable[..., Any] = _disable(_attend_outside, reason=_why)


class Owner:
    """Held by a module alone, so that its layers' states know when it goes (:meth:`LayerState.let_go`).

    Attributes:
        dismissed: the module was given its class back: it is converted no longer.
    """

    dismissed = False

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states

    def __del__(self) -> None:
        for state in self.__dict__.get("states", ()):  # none if somebody's copy of it failed half-way
            state.let_go(taken_out=not self.dismissed)


def swap_in(module: nn.Module, cls: type[nn.Module], state: object) -> None:
    """Give ``module`` the class ``cls``, with its state."""
    module.__dict__[STATE] = state
    module.__class__ = cls
    states = states_of(module)
    if states:
        module.__dict__[OWNER] = Owner(states)


Swapped = tuple[type[nn.Module], dict[str, Any], dict[str, Tensor | None]]


def swap_out(module: nn.Module) -> Swapped:
    """Give ``module`` the class it had before. No trace is left.

    Returns:
        What :func:`swap_back` needs: class, state, and feedback that learned.
    """
    cls = type(module)
    module.__class__ = vars(cls)["_rewired_from"]
    held = {key: module.__dict__.pop(key) for key in (STATE, OWNER) if key in module.__dict__}
    if OWNER in held:
        held[OWNER].dismissed = True
    return cls, held, learned.strip(module)


def swap_back(module: nn.Module, swapped: Swapped) -> None:
    """Undo :func:`swap_out`."""
    cls, held, feedback = swapped
    module.__dict__.update(held)
    if OWNER in held:
        held[OWNER].dismissed = False
    module.__class__ = cls
    learned.put_back(module, feedback)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's own class is one of ours, so that :func:`swap_out` applies."""
    return "_rewired_from" in vars(type(module))


def state_of(module: nn.Module) -> LayerState | None:
    """The state of a converted layer, or None. Sees through classes put on top of ours."""
    state = module.__dict__.get(STATE)
    return state if isinstance(state, LayerState) else None


def states_of(module: nn.Module) -> list[LayerState]:
    """The states of a converted layer, or of the layers an attention holds; none if it is not converted."""
    state = module.__dict__.get(STATE)
    if isinstance(state, Parts):
        return state.states
    return [state] if isinstance(state, LayerState) else []
