"""Layers whose weight another module uses directly, as in ``F.linear(x, self.qkv.weight)``.

Their own forward never runs, and such a layer's rule would be dead without a word. So the module around each
layer, its *host*, is watched in the first passes: while the host's forward runs, linear operations and
convolutions that are given the layer's own weight are run as a call of that layer. A layer whose forward does
run is no longer watched for, and a host without anything left to watch for loses its hooks: afterwards only
hosts that do use a child's weight pay.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rewire.layers.own_forward import OPERATIONS, OwnForward
from rewire.run import run
from rewire.wiring import LayerState

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ATTRIBUTE = "_rewire_host"
_KEY = "rewire"


class Host:
    """The layers to watch for while one module's forward runs.

    Attributes:
        layers: relative name and state of each.
    """

    def __init__(self, layers: list[tuple[str, LayerState]]) -> None:
        self.layers = layers

    def left(self) -> list[tuple[str, LayerState]]:
        """Those whose own forward has not run (yet)."""
        return [(name, state) for name, state in self.layers if state.functional or not state.ran]


def enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a host."""
    host: Host = module.__dict__[_ATTRIBUTE]
    host.layers = host.left()
    if not host.layers:
        remove(module)
        return
    if torch.compiler.is_compiling():
        return
    watch = _active.get()
    if watch is None:
        watch = _Watch()
        mode: Any = watch
        mode.__enter__()
        _active.set(watch)
    watch.add(module, host)


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a host; called after an exception too."""
    watch = _active.get()
    if watch is not None and watch.drop(module):
        _active.set(None)
        mode: Any = watch
        mode.__exit__(None, None, None)


def attach(model: nn.Module, states: dict[nn.Module, LayerState]) -> None:
    """Make a host of the nearest module around each layer that is more than a container."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    by_name = {name: module for module, name in names.items()}
    hosts: dict[str, list[tuple[str, LayerState]]] = {}
    for layer, state in states.items():
        if not state.kind.local:
            continue  # a block is called like any module
        host = name = names[layer]
        while host:
            host = host.rpartition(".")[0]
            if type(by_name[host]) not in _CONTAINERS:
                hosts.setdefault(host, []).append((name[len(host) + 1 if host else 0 :], state))
                break
    for name, layers in hosts.items():
        module = by_name[name]
        if module in states:
            continue
        module.__dict__[_ATTRIBUTE] = Host(layers)
        # Under a key of our own: handles count per process, and would clash after unpickling in another.
        pre_hooks: Any = module._forward_pre_hooks
        pre_hooks[_KEY] = enter
        pre_hooks.move_to_end(_KEY, last=False)
        hooks: Any = module._forward_hooks
        hooks[_KEY] = leave
        always: Any = module._forward_hooks_always_called
        always[_KEY] = True


def remove(module: nn.Module) -> None:
    """Take a host's hooks off, if it has any."""
    module.__dict__.pop(_ATTRIBUTE, None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        table: Any = hooks
        table.pop(_KEY, None)


class _Watch(TorchFunctionMode):
    """Runs operations on a watched weight as calls of the layer it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[nn.Module, LayerState]] = {}
        self.stack: list[tuple[nn.Module, list[int]]] = []

    def add(self, module: nn.Module, host: Host) -> None:
        """Watch for ``host``'s layers until :meth:`drop`."""
        added: list[int] = []
        for name, state in host.layers:
            layer = module.get_submodule(name)
            weight = layer._parameters.get("weight")
            if weight is not None and id(weight) not in self.found:
                self.found[id(weight)] = (layer, state)
                added.append(id(weight))
        self.stack.append((module, added))

    def drop(self, module: nn.Module) -> bool:
        """Undo :meth:`add`; whether nothing is left."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place][0] is module:
                for key in self.stack.pop(place)[1]:
                    del self.found[key]
                break
        return not self.stack

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = OPERATIONS.get(func)
        if operation is not None and torch.is_grad_enabled():
            bound = operation[0].bind(*args, **kwargs)
            weight = bound.arguments["weight"]
            found = self.found.get(id(weight))
            if found is not None and found[0]._parameters.get("weight") is weight:
                layer, state = found
                if state.functional or not state.ran:
                    return _call(layer, state, func, bound.arguments)
        return func(*args, **kwargs)


_active: ContextVar[_Watch | None] = ContextVar("rewire_watch", default=None)


def _call(layer: nn.Module, state: LayerState, func: Any, arguments: dict[str, Any]) -> Any:
    """One functional use of a layer's weight, as a call of the layer."""
    state.functional = True
    if not isinstance(state.kind, OwnForward):
        state.kind = OwnForward(state.kind)
    rest = {name: value for name, value in arguments.items() if name != "input"}

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = func(x, **rest)
        return y

    args: tuple[Any, ...] = (arguments["input"],)
    kwargs: dict[str, Any] = {}
    if state.observer is None:
        return run(state, layer, forward, args, kwargs)
    before, after = state.observer
    args, kwargs = before(layer, args, kwargs)
    y = run(state, layer, forward, args, kwargs)
    after(layer, args, kwargs, y)
    return y
