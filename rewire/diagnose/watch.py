"""Watching one pass of a model from outside: what each layer was given, and what came back.

Ordinary hooks, and nothing of the library's own machinery: a layer is given a clone of its input, whose gradient
is then exactly what the layer hands back, and its output is cloned too, so that it has a place of its own on the
graph. The watched pass can be run backwards again with other gradients put in the place of what was handed back.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from rewire.arguments import check_loss
from rewire.diagnose.match import Match
from rewire.errors import ConversionError
from rewire.kept import Hidden
from rewire.nodes import Node
from rewire.passes import backward_id
from rewire.picks import Later, Pick, Unclear, pick_below, pick_of
from rewire.preview import call as call_model
from rewire.rules.base import LearnedDirect
from rewire.state import LayerState
from rewire.swap import states_of

Gradients = dict[str, Tensor | None]
Edge = torch.autograd.graph.GradientEdge
Again = Callable[[Tensor], Callable[[Tensor], Any]]
"""weight -> (x -> y): a use of a weight by another module, with another weight."""


@dataclass(frozen=True)
class Layer:
    """A converted layer. An attention's module may hold several."""

    module: nn.Module
    state: LayerState


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """All converted layers by qualified name."""
    return {
        ".".join(filter(None, (name, state.kind.part))): Layer(module, state)
        for name, module in model.named_modules()
        for state in states_of(module)
    }


class Randomness:
    """The random numbers a pass may draw: PyTorch's on every device, Python's and NumPy's."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        initialised: Callable[[], bool] = torch.cuda.is_initialized
        self.cuda = torch.cuda.get_rng_state_all() if initialised() else []
        self.python = random.getstate()
        self.numpy = np.random.get_state()

    def put_back(self) -> None:
        """Everything draws the same numbers again."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Results of earlier passes that a module keeps (an auxiliary loss, say) are copied as values."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = {name: value for name, value in vars(module).items() if name != "_modules"}
        for value in tree_leaves(kept):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module raises that is not made to be copied
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ConversionError(
            f"this works on a copy, and {type(model).__name__} cannot be copied: {said}. Measure an unsharded model "
            "that is converted alike and has these weights"
        ) from error


def bare(model: nn.Module) -> nn.Module:
    """The model inside wrappers that change where or how it runs: compiled, DistributedDataParallel, DataParallel.

    What is measured is this process's own pass. A wrapper would wait for other processes, which may not be asked.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled parts of a model run as they are written: a graph has no places to watch."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Buffers:
    """What a model keeps from pass to pass, to be put back before each: buffers, and plain attributes of its modules.

    The latter are tensors, numbers, and tuples and lists of such: a recurrent model may carry its state there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.attributes = {id(module): dict(_attributes(module)) for module in model.modules()}
        self.copies = {
            id(module): {name: tree_map(_copied, value) for name, value in self.attributes[id(module)].items()}
            for module in model.modules()
        }

    def put_back(self) -> None:
        """Undo what passes did to them."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                kept = self.kept.get(name)
                if kept is not None and kept.shape == buffer.shape:
                    buffer.copy_(kept)
        for module in self.model.modules():
            copies = self.copies.get(id(module), {})
            for name, value in _attributes(module):
                if name not in copies:
                    delattr(module, name)
                elif not _unchanged(value, self.attributes[id(module)][name], copies[name]):
                    setattr(module, name, tree_map(_copied, copies[name]))
            for name in copies.keys() - vars(module).keys():
                setattr(module, name, tree_map(_copied, copies[name]))


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module has in plain attributes: tensors and numbers, alone or together."""
    plain = (Tensor, bool, int, float, str, type(None))
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and all(type(leaf) in plain for leaf in tree_leaves(value))
    ]


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _unchanged(value: Any, before: Any, copy: Any) -> bool:
    """Whether an attribute is the object that it was, with the values that it had."""
    return value is before and all(map(_equal, tree_leaves(value), tree_leaves(copy)))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


@dataclass(eq=False)
class Place:
    """One input of one call that gets a gradient.

    Attributes:
        leaf: which of the call's flattened arguments it is.
        index: which of those that need a gradient.
        x: its value; of a pass that keeps no values, a tensor like it without any (:func:`outline`).
        node: its graph node.
        shared: the same for places whose gradient is one tensor's (``skip="cut"``); else the place itself.
        handed: what came back in the newest backward, unless that was given to somebody else.
        whole: the gradient of the tensor that was given, of which ``handed`` is this layer's part; if asked for.
    """

    leaf: int
    index: int
    x: Tensor
    node: Node | None
    shared: object
    handed: Tensor | None = None
    whole: Tensor | None = None

    def keep(self, gradient: Tensor | None) -> None:
        """What a backward does with what comes back, unless it is told something else."""
        self.handed = None if gradient is None else gradient.detach().clone()  # a node may hand back nothing

    @property
    def at_input(self) -> Tensor | None:
        """The whole gradient of the tensor that was given, if it was asked for."""
        return self.whole if self.shared is self else self.handed

    def note(self, gradient: Tensor | None) -> None:
        """Hook of the tensor that was given."""
        self.whole = None if gradient is None else gradient.detach().clone()


@dataclass(eq=False)
class Seen:
    """One call of one layer.

    Attributes:
        name: of the layer.
        args: (args, kwargs) it was given, detached; None in a pass that keeps no values.
        places: its inputs that get a gradient.
        outputs: its outputs that have a gradient; of a pass that keeps no values, outlines of them.
        ends: where on the graph these are.
        deltas: the gradients there in the newest backward, unless these were given to somebody else.
        walled: inputs that are walls, while it runs.
        first: number of the first of its inputs, among those that have a feedback of their own.
        again: for a weight that another module uses directly, how.
        plain: the weight used is the layer's own, not something made of it.
        pick: how the rows of its input were picked from the batch, if they were.
        draw: number of the redraw its rule made, for rules that redraw.
        expected: how what was handed back compares to what a local rule says, by argument; empty if that is not known.
    """

    name: str
    state: LayerState
    args: Any
    places: list[Place] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    ends: list[Edge] = field(default_factory=list)
    deltas: list[Tensor | None] = field(default_factory=list)
    walled: list[Tensor] = field(default_factory=list)
    first: int = 0
    again: Again | None = None
    plain: bool = True
    pick: Pick | None = None
    draw: int = 0
    expected: dict[int, Match] = field(default_factory=dict)

    @property
    def delta(self) -> Tensor | None:
        """The gradient at its (first) output."""
        return next((delta for delta in self.deltas if delta is not None), None)

    @property
    def takes_part(self) -> bool:
        """Whether anything about it needed a gradient. The reference gives frozen weights one, to see their uses."""
        return bool(self.places or self.outputs)

    @property
    def sources(self) -> list[Node]:
        """Graph nodes of its inputs."""
        return [place.node for place in self.places if place.node is not None]


AtPlace = Callable[[Place, Tensor | None], Tensor | None]
AtOutput = Callable[[Seen, int, Tensor | None], None]


@dataclass(eq=False)
class _Ears:
    """Who is told what arrives in the backward that runs. Apart from the pass, so that the graph does not hold that."""

    place: AtPlace | None = None
    output: AtOutput | None = None

    def at_place(self, place: Place, gradient: Tensor | None) -> Tensor | None:
        if self.place is not None:
            return self.place(place, gradient)
        place.keep(gradient)
        return None

    def at_output(self, call: Seen, index: int, gradient: Tensor | None) -> None:
        if self.output is not None:
            self.output(call, index, gradient)
        else:
            call.deltas[index] = None if gradient is None else gradient.detach().clone()


class Pass:
    """One forward of a model, and as many backwards as wanted.

    Args:
        layers: the layers to watch, by name.
        cut: those whose inputs are walls (``skip="cut"``): watched without a clone, which would be behind the wall.
        beside: called as ``beside(call, layer)`` before the layer runs.
        whole: keep the whole gradient of every input too, not only what the layer hands back.
        lean: keep no values that layers were given or returned, but for rules that look at their input.

    Attributes:
        calls: by layer name, in the order of the forward.
        at: the graph nodes of their outputs, as each call left them.
        loss: what ``loss_fn`` gave.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        inputs: Any,
        loss_fn: Callable[[Any], Tensor],
        cut: Container[str] = (),
        beside: Callable[[Seen, Layer], None] | None = None,
        whole: bool = False,
        lean: bool = False,
    ) -> None:
        self.model = model
        self.calls: dict[str, list[Seen]] = {name: [] for name in layers}
        self._layers = {layer.state: (name, layer) for name, layer in layers.items()}
        self._running: list[Seen] = []
        self.at: dict[Node, Seen] = {}
        self._cut = cut
        self._beside = beside
        self._whole = whole
        self._lean = lean
        self._ears = _Ears()
        with self._watched(layers.values()):
            self.loss = loss_fn(call_model(model, inputs))
        check_loss(self.loss)

    def __iter__(self) -> Iterator[Seen]:
        return (call for calls in self.calls.values() for call in calls)

    def backward(
        self,
        roots: Iterable[Tensor | Edge] | None = None,
        gradients: Iterable[Tensor] | None = None,
        *,
        last: bool = False,
        leaves: Sequence[Tensor] | None = None,
        at_place: AtPlace | None = None,
        at_output: AtOutput | None = None,
    ) -> Gradients:
        """Run backwards, from the loss or from ``roots``; the parameters' gradients by name.

        Args:
            last: the graph is not needed again.
            leaves: what may get a ``.grad``; None: every leaf of the graph.
            at_place: given what each layer hands back, in place of it being kept; returns what to pass on in place
                of that, or None to leave it.
            at_output: given the gradient at each output of a call, in place of it being kept.
        """
        for call in self:
            call.deltas = [None] * len(call.outputs)
            for place in call.places:
                place.handed = place.whole = None
        self._ears.place, self._ears.output = at_place, at_output
        run: Callable[..., None] = torch.autograd.backward
        start = [self.loss] if roots is None else list(roots)
        try:
            run(start, gradients and list(gradients), retain_graph=not last, inputs=leaves)
        finally:
            self._ears.place = self._ears.output = None
        if last:
            self.end()
        return take_gradients(self.model)

    def end(self) -> None:
        """Let the graph go: its hooks hold what holds it, so nobody else would."""
        self.at = {}
        self.loss = self.loss.detach()
        for call in self:
            call.outputs = [y.detach() for y in call.outputs]
            call.ends = []
            for place in call.places:
                place.node = None

    # -- hooks ---------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self, layers: Iterable[Layer]) -> Iterator[None]:
        hooks: list[Any] = []
        states = [layer.state for layer in layers]
        for layer in layers:
            layer.state.observer = (self._before_use, self._after_use)  # for weights that another module uses directly
            if not layer.state.kind.part:
                # Last to see the input and first to see the output: whatever the user's own hooks do is outside.
                before, after = partial(self._before, layer.state), partial(self._after, layer.state, True)
                hooks.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(layer.module.register_forward_hook(after, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for state in states:
                state.observer = None

    def _pick(self, x: Tensor) -> Pick | None:
        def known(node: Node) -> Pick | None:
            return self.at[node].pick

        def later() -> Pick | None:
            with suppress(Unclear, Hidden):
                return None if x_node is None else pick_below(x_node, count, known, look=True)
            return None

        try:
            return pick_of(x, known)
        except Unclear:
            return None
        except Hidden as hidden:
            x_node, count = x.grad_fn, x.shape[0]
            return None if hidden.whole else Later(later, hidden.args)

    def _before_use(
        self, state: LayerState, module: nn.Module, args: Any, kwargs: Any, again: Again, first: int, plain: bool
    ) -> Any:
        def use(call: Seen) -> None:
            call.again, call.first, call.plain = again, first, plain

        return self._before(state, module, args, kwargs, use)

    def _after_use(self, state: LayerState, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._after(state, False, module, args, kwargs, output)

    def _before(
        self,
        state: LayerState,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        use: Callable[[Seen], None] | None = None,
    ) -> Any:
        if backward_id() != -1:
            return args, kwargs  # checkpointing: the same call once more
        name, layer = self._layers[state]
        leaves, spec = tree_flatten((args, kwargs))
        call = Seen(name, state, None)
        if use is not None:
            use(call)
        if leaves and isinstance(leaves[0], Tensor):
            call.pick = self._pick(leaves[0])
        kept: list[Any] = list(leaves)
        walls = name in self._cut
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor):
                continue
            kept[i] = x.detach()
            if not x.requires_grad or not torch.is_grad_enabled():
                continue
            place = Place(i, len(call.places), kept[i], x.grad_fn, None)
            place.shared = place
            if walls and x.grad_fn is not None:
                # Its whole gradient is what is fed back, to all layers that take it. Hooked after the layer ran, so
                # behind the wall, which is a hook too.
                place.shared = (id(x.grad_fn), x.output_nr)
                call.walled.append(x)
            else:
                if self._whole:
                    _hook(x, place.note)
                # The layer alone uses the clone, so its gradient is what the layer hands back.
                x = leaves[i] = x.clone()
                place.x = kept[i] = x.detach()
                place.node = x.grad_fn
                _hook(x, partial(self._ears.at_place, place))
            call.places.append(place)
        call.args = tree_unflatten(kept, spec)
        self._running.append(call)
        if self._beside is not None:
            self._beside(call, layer)
        if self._lean:
            call.args = None
            rule = state.rule
            if not (isinstance(rule, LearnedDirect) and rule.context):
                for place in call.places:
                    place.x = outline(place.x)
        return tree_unflatten(leaves, spec)

    def _after(self, state: LayerState, passed_on: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if backward_id() != -1:
            return output
        call = self._running.pop()
        while call.state is not state:
            call = self._running.pop()  # calls that an exception ended, which the model caught
        walled = [place for place in call.places if place.shared is not place]
        for place, x in zip(walled, call.walled, strict=True):
            _hook(x, partial(self._ears.at_place, place))
        call.walled = []
        call.draw = call.state.draws
        self.calls[call.name].append(call)
        leaves, spec = tree_flatten(output)
        for i, y in enumerate(leaves):
            if isinstance(y, Tensor) and y.requires_grad:
                if passed_on:
                    y = leaves[i] = y.clone()
                call.outputs.append(outline(y) if self._lean else y)
                call.ends.append(torch.autograd.graph.get_gradient_edge(y))
                if y.grad_fn is not None:
                    self.at[y.grad_fn] = call
                _hook_behind(y, partial(self._ears.at_output, call, len(call.outputs) - 1))
        call.deltas = [None] * len(call.outputs)
        return tree_unflatten(leaves, spec)


def outline(t: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that holds a single number."""
    return t.detach().new_zeros((1,) * t.dim()).expand(t.shape)


def _hook_behind(t: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    """Like :func:`_hook`, after all other hooks of t, also those to come: walls, and what stands in for them."""
    if t.grad_fn is None:
        _hook(t, hook)
        return
    number = t.output_nr
    t.grad_fn.register_prehook(lambda gradients: hook(gradients[number]))


def _hook(t: Tensor, hook: Callable[[Tensor | None], Tensor | None]) -> None:
    register: Callable[..., Any] = t.register_hook
    register(hook)


def gradients_of(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], leaves: Sequence[Tensor] | None = None
) -> Gradients:
    """The gradients of all parameters by name, from a pass that nobody watches."""
    run: Callable[..., None] = torch.autograd.backward
    loss = loss_fn(call_model(model, inputs))
    check_loss(loss)
    run([loss], inputs=leaves)
    return take_gradients(model)


def settle(states: Collection[LayerState], run: Callable[[], Any]) -> None:
    """Run as many passes as it takes until roles and scales are known: roles first, then scales.

    Feedback that learns stays as it is, once there is any, and rests afterwards.

    Args:
        states: of the converted layers of a copy.
        run: one pass, always with the same random numbers, so that the same layers run each time.
    """
    wirings = {state.wiring for state in states}
    for wiring in wirings:
        wiring.still = True
        if any(state.learned for state in wiring.layers.values()):
            wiring.rest()
    for _ in range(4):
        known = {state.name for state in states if state.settled}
        if all(state.ran and state.settled for state in states):
            break  # and no layer can come that has not run yet
        run()
        for state in states:
            state.wiring.settle_if_alone()
        if known and known == {state.name for state in states if state.settled}:
            break
    for wiring in wirings:
        wiring.rest()


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients of all parameters by name; the model's own are dropped."""
    found: Gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found
