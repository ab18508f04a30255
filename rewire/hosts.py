"""Layers whose weight another module uses directly, as in ``F.linear(x, self.qkv.weight)``.

Their own forward never runs there, and such a layer's rule would be dead without a word. So modules are watched
in the first passes: while a *host*'s forward runs, every operation that is given a layer's own weight, or a view
of it, is run as a call of that layer (:mod:`rewire.uses`). What cannot be run so is warned about, by name.

After the first pass a host watches for no more than the weights it was seen using and, for a few calls more, for
children that have not run yet; one with nothing left to watch for loses its hooks. So only modules that do use
another's weight go on paying. ``nn.MultiheadAttention`` always does, and is watched by way of its class
(:mod:`rewire.attention`).
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from rewire import attention, traced, uses
from rewire.errors import PassError
from rewire.joined import Joined, apart, joined
from rewire.nodes import Node
from rewire.passes import backward_id
from rewire.state import STATE, LayerState
from rewire.steady import steady_projection
from rewire.ties import note_ties, tie
from rewire.uses import Owned

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ATTRIBUTE = "_rewire_host"
_LOOK_UPS = frozenset({F.embedding, F.embedding_bag, torch.embedding})
_KEY = "rewire"
_PATIENCE = 8  # calls of a host, after the first pass, in which it waits for children that have not run yet


class Host:
    """The layers to watch for while one module's forward runs.

    Attributes:
        below: relative name and state of each layer anywhere below: watched for in the first pass.
        inside: the states of all of them, for good.
        children: those of them whose nearest module, containers aside, this is.
        used: those of them whose weight this module was seen using.
        makes: it made another tensor of a weight before it used that.
        handles: of hooks on weights that nobody was seen using in the first pass.
        patience: calls left in which it waits for children that have not run.
    """

    def __init__(self) -> None:
        self.below: list[tuple[str, LayerState]] = []
        self.inside: list[LayerState] = []
        self.children: list[tuple[str, LayerState]] = []
        self.used: list[tuple[str, LayerState]] = []
        self.makes = False
        self.handles: list[Any] = []
        self.patience = _PATIENCE

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": []}

    def unseen(self, module: nn.Module) -> None:
        """After a first forward: should a weight that nobody was seen using get a gradient, say so."""
        for name, state in self.below:
            layer = _held(module, name, state)
            weight = None if layer is None else state.kind.own(layer)
            if weight is None or not weight.requires_grad or state.ran or state.functional:
                continue
            if state.shared:  # the other modules that have it may give it a gradient: the graph is asked instead
                state.wiring.note_weight(state, weight)
            else:
                hook: Any = weight.register_hook
                self.handles.append(hook(partial(_unseen, state)))

    def left(self) -> list[tuple[str, LayerState]]:
        """What to watch for in the call that begins."""
        while self.handles:
            self.handles.pop().remove()
        if self.below:
            wiring = self.below[0][1].wiring
            if wiring.unsettled and backward_id() == -1:
                wiring.settle()
            if not wiring.looked:
                return self.below
        self.below = []
        waiting = [entry for entry in self.children if not _ran(entry[1]) and entry not in self.used]
        if waiting and self.patience:
            self.patience -= 1
            return [*self.used, *waiting]
        self.children = []
        return self.used


def enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a host."""
    # Without gradients nothing is watched: PyTorch's fast paths stay as they are.
    if not torch.is_grad_enabled():
        return
    host: Host = module.__dict__[_ATTRIBUTE]
    if torch.compiler.is_compiling():
        if traced.exports(module.training):
            return
        if host.used:
            raise PassError(
                f"{type(module).__name__} uses the weight of layer {host.used[0][1].label} itself, which a compiled "
                "graph would hide from the layer's rule: keep that module out with torch.compiler.disable, or the "
                f"layer on backprop, layers={{{host.used[0][1].name!r}: 'bp'}}"
            )
        return
    if traced.in_jit(module.training):
        return
    layers = host.left()
    if not layers:
        remove(module)
        return
    watch = _active.get()
    if watch is None:
        watch = Watch()
        mode: Any = watch
        mode.__enter__()
        _active.set(watch)
    watch.add(module, host, layers)


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a host; called after an exception too."""
    if torch.compiler.is_compiling():
        return
    watch = _active.get()
    if watch is not None and watch.drop(module):
        _active.set(None)
        mode: Any = watch
        mode.__exit__(None, None, None)
        module.__dict__[_ATTRIBUTE].unseen(module)


def _held(module: nn.Module, name: str, state: LayerState) -> nn.Module | None:
    """What stands at ``name`` below ``module``: the layer of ``state``, or what was put around it (an adapter).

    Returns:
        None if the layer was taken out since its conversion. A warning says so if something else with weights is there
        and the layer, still held by somebody, does not say so itself.
    """
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    if not name or layer.__dict__.get(STATE) is state:
        return layer
    from rewire.swap import states_of  # imports this module

    if any(state in states_of(inside) for inside in layer.modules()):
        return layer
    if not state.gone and next(layer.parameters(), None) is not None:
        state.wiring.warn_once(
            f"replaced:{state.name}",
            f"layer {state.label} was replaced since it was converted: the {type(layer).__name__} in its place has no "
            "rule and keeps backprop. Convert again to give it one",
        )
    return None


def _ran(state: LayerState) -> bool:
    """Whether it ran, or a layer that has its weight: what that does with the weight is no use by another module."""
    return state.ran or any(twin.ran for twin in state.twins)


def _unseen(state: LayerState, gradient: Tensor) -> None:
    if state.ran or state.functional:  # since the module's forward: a head that the training loop applies
        return
    state.dead("another module uses its weight where nobody can see it")
    state.unseen = True


def plan(model: nn.Module, states: dict[nn.Module, list[LayerState]]) -> list[tuple[nn.Module, Host]]:
    """The hosts there have to be: of every module above a layer that is more than a container.

    Args:
        states: of the layers to be converted, which are noted there.
    """
    note_ties(model, states)
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    by_name = {name: module for module, name in names.items()}
    hosts: dict[str, Host] = {}
    for layer, parts in states.items():
        above = name = names[layer]
        nearest = True
        while above:
            above = above.rpartition(".")[0]
            module = by_name[above]
            if type(module) in _CONTAINERS or module in states:
                nearest = nearest and module not in states  # an attention looks after its own
                continue
            host = hosts.setdefault(above, Host())
            for state in parts:
                if not state.kind.local:
                    continue  # a block is called like any module
                state.watched = True
                entry = (name[len(above) + 1 if above else 0 :], state)
                host.below.append(entry)
                host.inside.append(state)
                if nearest and not _calls_children(module):
                    host.children.append(entry)
            nearest = False
    # PyTorch's own modules take their fast path only where no hooks are attached.
    return [(by_name[n], host) for n, host in hosts.items() if host.below and not _calls_children(by_name[n])]


def attach(planned: list[tuple[nn.Module, Host]]) -> None:
    """Have the modules of a :func:`plan` watch their layers."""
    for module, host in planned:
        _hook(module, host)


def register() -> None:
    """Tell Dynamo that watching is none of its business outside of a graph."""
    for watching in (enter, leave, Watch.__torch_function__):
        traced.never_alone(watching, within=False)


def _calls_children(module: nn.Module) -> bool:
    """Whether the forward is one of PyTorch's own, which call the layers they are made of."""
    made_in = type(module).forward.__module__
    # What torch.fx generates is from no module.
    return isinstance(made_in, str) and made_in.startswith("torch.nn.modules.")


def _hook(module: nn.Module, host: Host) -> None:
    module.__dict__[_ATTRIBUTE] = host
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


class Watch(TorchFunctionMode):
    """Runs operations on a watched weight as calls of the layer it belongs to.

    Attributes:
        batch_first: of the attention that is being watched.
        last: its output projection.
        within: nodes of what its other projections have made, if its output can be of nothing else.
        owned: the watched weights, and what modules made of them, by the tensor's identity.
        joined: what modules made of several watched weights, by its identity.
        stack: the modules being watched, outermost first, their hosts, and the weights watched for on their behalf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch_first = False
        self.last: LayerState | None = None
        self.within: list[Node] | None = None
        self.owned: dict[int, Owned] = {}
        self.joined: dict[int, Joined] = {}
        self.stack: list[tuple[nn.Module, Host | None, list[Owned]]] = []

    def add(self, module: nn.Module, host: Host | None, layers: list[tuple[str, LayerState]]) -> None:
        """Watch for ``layers``, given by their name relative to ``module``, until :meth:`drop`."""
        added: list[Owned] = []
        for name, state in layers:
            layer = _held(module, name, state)
            weight = None if layer is None else state.kind.own(layer)
            if layer is None or weight is None:
                continue
            if id(weight) not in self.owned:
                owned = self.owned[id(weight)] = Owned(layer, state, name, weight, weight)
                added.append(owned)
            elif self.owned[id(weight)].state is not state:
                tie(state, self.owned[id(weight)].state)  # since conversion
        self.stack.append((module, host, added))

    def drop(self, module: nn.Module) -> bool:
        """Undo :meth:`add`; whether nothing is left."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place][0] is module:
                for owned in self.stack.pop(place)[2]:
                    del self.owned[id(owned.tensor)]
                break
        return not self.stack

    def owner(self, t: Tensor) -> Owned | None:
        """Whose weight ``t`` is, or is a view of; nobody's while that layer, or one that shares it, is running."""
        owned = self.owned.get(id(t))
        if owned is None and t._is_view():
            owned = self.owned.get(id(t._base))
        if owned is None or owned.state.running():
            return None
        return None if any(twin.running() for twin in owned.state.twins) else owned

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is attention.FUNCTION:
            return attention.attend(self.operation, args, kwargs, self.batch_first)
        return self.operation(func, args, kwargs)

    def operation(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seat: attention.Seat | None = None
    ) -> Any:
        """``func``, as a call of the layer whose weight it is given, if any."""
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if self.joined and seat is None:
            y = apart(self.operation, func, args, kwargs, self._joined)
            if y is not None:
                return y
        use = uses.find(func, args, kwargs, self.owner)
        if use is not None:
            self._note(use.owned)
            return uses.call(use, seat)
        result = func(*args, **kwargs)
        host = self.stack[-1][1]
        if host is not None and (host.below or host.makes):
            self._look(func, args, kwargs, result)
        return result

    def projection(self, func: Any, args: tuple[Any, ...], _: dict[str, Any], seat: attention.Seat) -> Any:
        """:meth:`operation` for ``F.linear`` inside an attention, whose own weights are all there is to find."""
        if not torch.is_grad_enabled():
            return func(*args)
        x, view, bias = args
        owned = self.owner(view)
        last = owned is not None and owned.state is self.last
        y: Any = None
        if owned is not None and owned.state.steady_use and _active.get() is None:
            y = steady_projection(owned.state, owned.weight, x, view, bias, seat, self.within if last else None)
        if y is None:
            use = uses.of_linear(self.owner, x, view, bias)
            y = func(*args) if use is None else uses.call(use, seat)
        if self.within is not None and not last and y.grad_fn is not None:
            self.within.append(y.grad_fn)
        return y

    def _note(self, owned: Owned) -> None:
        """Remember who used a weight: the innermost module around that the layer belongs to."""
        state = owned.state
        if not state.functional:
            state.functional = True
            state.changed()
        for _, host, _ in reversed(self.stack):
            if host is None:
                return
            if any(known is state for _, known in host.used):
                host.makes = host.makes or bool(self.joined)
                return
            mine = next((entry for entry in (*host.below, *host.children) if entry[1] is state), None)
            if mine is not None:
                host.used.append(mine)
                for inside in host.inside:
                    if not inside.hosted:
                        inside.hosted = True
                        inside.changed()
                host.makes = host.makes or bool(self.joined) or not isinstance(owned.tensor, nn.Parameter)
                return

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow a weight through what a module makes of it, and say where it is lost from sight."""
        if func in _LOOK_UPS or not isinstance(result, Tensor) or not result.requires_grad or result.dim() == 0:
            return  # rows looked up in a tied embedding, a shape, a copy without gradient, a penalty on the weight
        numbers = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point()]
        if self._joined(result) is not None:
            return  # a view
        together = joined(func, args, kwargs, result, self.owner)
        if together is not None:
            self.joined[id(result)] = together
            return
        for lost in filter(None, map(self._joined, numbers)):
            for part in filter(None, map(self.owner, lost.parts)):
                self._lost(part, func)
        for t in numbers:
            owned = self.owner(t)
            if owned is None or self.owner(result) is not None:
                continue
            others = [other for other in map(self.owner, numbers) if other is None or other.state is not owned.state]
            if not others or (result.shape == owned.tensor.shape and not any(n.grad_fn for n in numbers if n is not t)):
                # Scaled, masked, cast: still this layer's weight.
                made = self.owned[id(result)] = Owned(owned.layer, owned.state, owned.name, result, owned.weight)
                self.stack[0][2].append(made)
            else:
                self._lost(owned, func)
            return

    def _lost(self, owned: Owned, func: Any) -> None:
        user = type(self.stack[-1][0])
        where, name = getattr(user, "_rewired_from", user).__name__, getattr(func, "__name__", str(func))
        owned.state.dead(f"{where} gives its weight to {name!r}")

    def _joined(self, t: Tensor) -> Joined | None:
        """What ``t``, or what it is a view of, was made of, if that is several weights."""
        found = self.joined.get(id(t))
        return self.joined.get(id(t._base)) if found is None and self.joined and t._is_view() else found


def attend(
    module: nn.MultiheadAttention,
    states: list[LayerState],
    output: LayerState | None,
    forward: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run an attention's ``forward`` (unbound) with its projections under their rules.

    Args:
        states: of its own projections.
        output: of its output projection, a child.
    """
    layers = [("", state) for state in states]
    if output is not None:
        layers.append(("out_proj", output))
    given = (*args, *kwargs.values())
    if not any([isinstance(x, Tensor) and x.requires_grad for x in given]) and not any(
        p.requires_grad for p in module.parameters()
    ):
        for _, state in layers:
            state.ran = state.idle = True
        return forward(module, *args, **kwargs)  # PyTorch's fast path, if it takes it
    watch: Any = Watch()
    watch.batch_first, watch.last = module.batch_first, output
    watch.add(module, None, layers)
    if not states[0].seated:
        with watch:
            return forward(module, *args, **kwargs)
    token = _attending.set(watch)  # no mode, which is asked at every single operation
    try:
        return _forward(module, *args, **kwargs)
    finally:
        _attending.reset(token)


def _function(*args: Any, **kwargs: Any) -> Any:
    """In the place of ``F.multi_head_attention_forward``."""
    watch = _attending.get()
    assert watch is not None
    # Besides query, key and value: a mask, or a bias, that layers have made.
    if not any([isinstance(t, Tensor) and t.grad_fn is not None for t in (*args[3:], *kwargs.values())]):
        watch.within = []
    return attention.attend(watch.projection, args, kwargs, watch.batch_first)


_forward = attention.forward_with(_function)
_attending: ContextVar[Watch | None] = ContextVar("rewire_attention", default=None)


_active: ContextVar[Watch | None] = ContextVar("rewire_watch", default=None)
