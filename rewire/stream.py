"""Gradients of a direct rule with the activation memory of one layer.

Backpropagation keeps every layer's input until the error comes back to it. A direct rule needs no error to come
back: what a layer hands back depends on e alone. So: run forward once without keeping anything, find e; run forward
again, and whenever a layer is called, its input's gradient is known, and the piece of graph above it
(:mod:`rewire.pieces`) is back-propagated and freed before the next one grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from rewire.arguments import check_loss, check_model
from rewire.edges import alias, port, wall_at
from rewire.errors import ConversionError, PassError
from rewire.layers.kinds import Forward
from rewire.learning import look
from rewire.marks import finish
from rewire.passes import OutputError, backward_id
from rewire.pieces import Edge, Plan, SeenCall, SeenWall, Step, plan
from rewire.preview import call as call_model
from rewire.replay import Before
from rewire.roles import Role
from rewire.rules.base import DirectRule, parts_of
from rewire.state import LayerState
from rewire.stepper import Stepper, check_optimizer
from rewire.streaming import Stream, streaming
from rewire.swap import states_of
from rewire.wiring import Wiring

_TWICE = "the second forward of a streamed pass"


def backward_streamed(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    optimizer: Optimizer | None = None,
) -> tuple[Tensor, Any]:
    """Forward and backward of a direct rule that hold the activations of one layer at a time.

    In place of ``loss = loss_fn(model(inputs)); loss.backward()``. ``.grad`` of every parameter is afterwards as after
    that, for a model converted with direct rules and ``skip="cut"``: gradients add to what is there, dropout draws the
    same mask, batch statistics are updated once, and random number generators end where they would.

    The forward runs twice, and so do ``loss_fn`` and hooks of modules; the arithmetic is that of backpropagation
    (two forwards and the weight gradients; no gradient goes through the weights). Activation memory is that of the
    largest *piece* between tensors that are fed back. In chains, residual networks and post-norm transformers that is
    a layer or two. The residual stream of a pre-norm transformer is not fed back itself, and what hangs on it (norms,
    the inputs of projections into it) is kept to the end; with ``blocks=`` it is fed back, and memory is flat. Layers
    on ``bp`` or a local rule are parts of the piece they are in.

    As long as scales and output layers are not known (the first pass, with ``scale="auto"``), and whenever a layer
    turns up for which they are not, it runs one ordinary pass.

    Args:
        model: converted with ``skip="cut"``, at least one layer under a direct rule. Not wrapped for distributed
            training.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Not changed in place.
        loss_fn: from the model's output to a scalar.
        optimizer: apply it to each parameter as soon as its gradient is complete, and set that gradient to None: then
            gradients need the memory of one piece too. The result is that of ``optimizer.step()`` and
            ``zero_grad()`` after the backward, as all of PyTorch's optimizers but LBFGS treat each parameter by
            itself; its hooks run once for each piece. Parameters used in several places are held until all are
            done. What looks at all gradients together (clipping by global norm, a gradient scaler) cannot work
            with it; and a parameter must not be used later in the forward where no gradient sees it.

    Returns:
        The loss and the model's outputs, detached.

    Raises:
        ConversionError: if the model is not converted with ``skip="cut"`` and a direct rule, or ``optimizer`` cannot be
            used.
        PassError: if the two forwards do not call the same layers, or the model changes its input in place.

    After an error buffers are as they were, nothing is left behind in the model, and gradients of pieces that were
    done stay added.

    Hooks on gradients see a piece at a time: a full backward hook on a module is not told of gradients that its output
    has not seen yet, and what it puts in the place of its input's goes nowhere. A tensor that a layer was fed with is
    cut off there: it can be hooked before, not after.

    Example:
        >>> rewire.convert(model, "dfa", skip="cut")
        >>> for x, y in batches:
        ...     optimizer.zero_grad()
        ...     loss, out = rewire.backward_streamed(model, x, lambda out: F.cross_entropy(out, y))
        ...     optimizer.step()
    """
    wiring = _wiring(model)
    check_optimizer(optimizer)
    if torch.is_inference_mode_enabled() or backward_id() != -1 or torch._C._are_functorch_transforms_active():
        raise PassError("backward_streamed makes graphs of its own: not in inference mode, a backward or torch.func")
    if wiring.unsettled:
        wiring.settle()

    def forward() -> tuple[Any, Tensor]:
        outputs = call_model(model, inputs)
        loss = loss_fn(outputs)
        check_loss(loss)
        return outputs, loss

    with torch.enable_grad():
        found = None
        if any(state.settled and isinstance(state.rule, DirectRule) for state in wiring.layers.values()):
            before = Before(model, inputs, wiring.layers.values())
            try:
                found = _first(wiring, forward)
                before.put_back()
                if found is not None:
                    with _one_pass(wiring):
                        return _second(wiring, found, forward, optimizer)
            except BaseException:
                before.put_back_buffers()
                raise
        return _ordinary(forward, optimizer)


def _ordinary(forward: Callable[[], tuple[Any, Tensor]], optimizer: Optimizer | None) -> tuple[Tensor, Any]:
    outputs, loss = forward()
    with _no_autocast():
        loss.backward()  # type: ignore[no-untyped-call]
    if optimizer is not None:
        Stepper(optimizer).rest()
    return loss.detach(), _detached(outputs)


def _first(wiring: Wiring, forward: Callable[[], tuple[Any, Tensor]]) -> Plan | None:
    """Find e and the pieces; None if something is not known yet. No activation outlives this."""
    survey = _Survey(wiring)
    with _as(survey), saved_tensors_hooks(survey.saving.pack, survey.saving.unpack):
        _, loss = forward()
    if not survey.find_errors(loss):
        return None
    return plan(survey.calls, survey.walls, loss)


def _second(
    wiring: Wiring, found: Plan, forward: Callable[[], tuple[Any, Tensor]], optimizer: Optimizer | None
) -> tuple[Tensor, Any]:
    """Back-propagate each piece as soon as it is complete."""
    pieces = _Pieces(wiring, found, None if optimizer is None else Stepper(optimizer))
    with _as(pieces):
        outputs, loss = forward()
    pieces.finish(loss)
    return loss.detach(), _detached(outputs)


class _Saving:
    """What nodes save for the backward, dropped until it is to be kept.

    The garbage collector cannot look into graph nodes, so what they hold must not lead back to them, or the graph would
    never be freed: these hooks are of an object of their own, and keep of a tensor no more than its numbers.
    """

    def __init__(self) -> None:
        self.keep = False

    def pack(self, saved: Tensor) -> Tensor | None:
        """Hook for what a node saves."""
        return saved.detach() if self.keep else None

    def unpack(self, saved: Tensor | None) -> Tensor:
        """Hook for what a node wants back."""
        if saved is None:
            raise PassError(
                "a gradient is asked for inside the forward of a streamed pass, which keeps no activations: use "
                "loss.backward() for this model"
            )
        return saved


def _ticket() -> Tensor:
    """In place of those of ports: keeps the graph in one piece where layers are frozen, in both forwards alike."""
    return torch.zeros((), requires_grad=True)


class _Survey(Stream):
    """The first forward: which layers are called, with what, and what the loss sees.

    Its graph is complete, and empty: up to the first output layer, tensors that nodes want to save for the backward
    are dropped. What follows is kept, since e is found through it.
    """

    joins = True

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.calls: list[SeenCall] = []
        self._start: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.walls: dict[Edge, SeenWall] = {}
        self.saving = _Saving()
        self._outputs: list[tuple[OutputError, GradientEdge]] = []
        self._ticket = _ticket()

    def direct(
        self,
        state: LayerState,
        rule: DirectRule,
        module: nn.Module,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
    ) -> Any:
        """Note the call; run the operation cut off from its inputs."""
        if _checkpointed():
            raise PassError(
                f"layer {state.label} runs under activation checkpointing, which would run it again in the backward of "
                "each piece: a streamed pass needs none, switch it off (or use loss.backward())"
            )
        errors: list[OutputError] = []
        call = SeenCall(state, errors, [])
        sources = []
        leaves, spec = _flattened(args, kwargs)
        for place, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad:
                if x.grad_fn is not None:
                    sources.append(x.grad_fn)
                call.inputs.append((place, self._place(x)))
                leaves[place] = x.detach()
        self.calls.append(call)
        args, kwargs = _unflattened(leaves, spec)
        tickets = [self._ticket] if call.inputs else []
        return finish(state, forward(module, *args, **kwargs), sources, tickets, errors, len(call.inputs))

    def has_cut(self, x: Tensor) -> bool:
        """Never: inputs stay as they are."""
        return False

    def _place(self, x: Tensor) -> Edge | Tensor:
        if x.grad_fn is None:
            return x
        edge = (x.grad_fn, x.output_nr)
        time = len(self.calls)
        wall = self.walls.get(edge)
        if wall is None:
            nodes: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            # What was there before this pass is not ours to cut off.
            ours = x.grad_fn._sequence_nr() >= self._start
            detachable = ours and type(x) is Tensor and not x._is_view()
            self.walls[edge] = SeenWall(len(self.walls), nodes, detachable, time)
        else:
            wall.last = time
            wall.uses += 1
        return edge

    def joined(self, error: OutputError, y: Tensor) -> None:
        """Note an output layer's output."""
        self._outputs.append((error, get_gradient_edge(y)))
        self.saving.keep = True

    def find_errors(self, loss: Tensor) -> bool:
        """Compute every e, as the joins of an ordinary backward do; False if a layer is not settled yet."""
        if not self._outputs:
            return True
        with _no_autocast():
            gradients = torch.autograd.grad(loss, [edge for _, edge in self._outputs], allow_unused=True)
        # An error further downstream decides whether those above it count, and is younger than they are.
        arrived = [(error, g) for (error, _), g in zip(self._outputs, gradients, strict=True) if g is not None][::-1]
        if any(error.state.role is Role.UNKNOWN for error, _ in arrived):
            return False
        seen = {error for error, _ in arrived}
        if any(call.inputs and not call.state.settled and not seen.isdisjoint(call.errors) for call in self.calls):
            return False
        guard = self.wiring.guard
        for error, gradient in arrived:
            if guard is not None:
                guard.look_first(error.state, gradient)
            self.wiring.error_reached(error.state, error, gradient)
            error.stand()
        return True


class _Pieces(Stream):
    """The second forward: each piece is back-propagated at the call that completes it."""

    joins = False

    def __init__(self, wiring: Wiring, found: Plan, stepper: Stepper | None) -> None:
        self.wiring = wiring
        self._walls = found.walls
        self._steps = found.steps
        self._time = -1
        self._stepper = stepper
        self._ticket = _ticket()
        self._tickets: dict[int, list[Tensor]] = {}
        self._cut: dict[int, Tensor] = {}  # what stands in for a tensor that is cut already
        self._left = [wall.uses for wall in found.walls]
        self._detached = WeakIdKeyDictionary()  # by tensor

    def direct(
        self,
        state: LayerState,
        rule: DirectRule,
        module: nn.Module,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
    ) -> Any:
        """Feed the inputs, back-propagate what that completes, and run the operation."""
        step = self._next(state)
        leaves, spec = _flattened(args, kwargs)
        for i, (place, number) in enumerate(step.inputs, index):
            x = leaves[place] if place < len(leaves) else None
            if not isinstance(x, Tensor):
                raise PassError(f"layer {state.label} got other arguments in {_TWICE} than in the first")
            if number is None:
                if x.requires_grad:
                    self._backward([port(x, (state, rule, step.errors, i, None, None, look(state, rule, x)))])
            else:
                self._feed(x, number, state, rule, step.errors, i)
            leaves[place] = x.detach()
        for piece in step.closes:
            self._backward(self._tickets.pop(piece, []))
        if self._stepper is not None and step.ready:
            self._stepper.step(step.ready)
        args, kwargs = _unflattened(leaves, spec)
        tickets = [self._ticket] if step.inputs else []
        return finish(state, forward(module, *args, **kwargs), [], tickets, step.errors, 0)

    def _next(self, state: LayerState) -> Step:
        self._time += 1
        if self._time < len(self._steps) and self._steps[self._time].state is state:
            return self._steps[self._time]
        planned = self._steps[self._time].state.label if self._time < len(self._steps) else "none"
        raise PassError(
            f"{_TWICE} called layer {state.label} where the first one called {planned}: what the model runs depends on "
            "something that is not put back in between (only random numbers and buffers are)"
        )

    def _feed(
        self, x: Tensor, number: int, state: LayerState, rule: DirectRule, errors: list[OutputError], index: int
    ) -> None:
        """Hang a port on x, and cut x off the piece above it."""
        wall = self._walls[number]
        self._left[number] -= 1
        more = self._left[number] > 0
        source = self._cut.get(number, x)
        if source.grad_fn is None:  # nothing above it has a gradient
            return
        if wall.detach and more and source is x:
            # For the layers still to come: takes x's place in the graph, and shares its memory.
            source = self._cut[number] = alias(x)
        feed = (state, rule, errors, index, wall_at(source) if wall.open else None, None, look(state, rule, x))
        self._tickets.setdefault(wall.piece, []).append(port(source, feed))
        if wall.detach:
            x.detach_()
            self._detached[x] = True
        if not more:
            self._cut.pop(number, None)

    def _backward(self, roots: list[Tensor]) -> None:
        if roots:
            with _no_autocast():
                torch.autograd.backward(roots)

    def has_cut(self, x: Tensor) -> bool:
        return x in self._detached

    def joined(self, error: OutputError, y: Tensor) -> None:
        """Never called."""

    def finish(self, loss: Tensor) -> None:
        """Back-propagate the last piece: what the loss sees, and what was tied to it."""
        if self._time + 1 != len(self._steps):
            raise PassError(f"{_TWICE} called {self._time + 1} layers, the first one {len(self._steps)}")
        self._cut.clear()
        roots = [ticket for tickets in self._tickets.values() for ticket in tickets]
        self._tickets.clear()
        self._backward([loss, *roots] if loss.requires_grad else roots)
        if self._stepper is not None:
            self._stepper.rest()


def _wiring(model: nn.Module) -> Wiring:
    """The model's conversion, if it can be streamed."""
    check_model(model, "backward_streamed")
    wirings = {id(s.wiring): s.wiring for m in model.modules() for s in states_of(m)}
    if not wirings:
        raise ConversionError(
            f"{type(model).__name__} is not converted: call rewire.convert(model, ..., skip='cut') first"
        )
    if len(wirings) > 1:
        raise ConversionError("parts of the model were converted separately: convert it as one to stream it")
    (wiring,) = wirings.values()
    if not any(isinstance(part, DirectRule) for state in wiring.layers.values() for part in parts_of(state.given)):
        raise ConversionError(
            "no layer is under a direct rule: backward_streamed is for rules such as 'dfa', whose feedback does not "
            "wait for the layers above"
        )
    if wiring.skip != "cut":
        raise ConversionError(
            f"the model was converted with skip={wiring.skip!r}; streaming cuts the graph at every tensor that is fed "
            "back: use rewire.convert(model, ..., skip='cut')"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConversionError(
            "DistributedDataParallel expects one forward and one backward: stream model.module, and average .grad "
            "over the ranks before the optimizer's step"
        )
    return wiring


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec | None]:
    """What a layer is called with as a list of leaves; nearly every layer is called with one tensor."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return [args[0]], None
    return tree_flatten((args, kwargs))


def _unflattened(leaves: list[Any], spec: TreeSpec | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if spec is None:
        return (leaves[0],), {}
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def _checkpointed() -> bool:
    """Whether what is saved now goes to ``torch.utils.checkpoint``."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


@contextmanager
def _one_pass(wiring: Wiring) -> Iterator[None]:
    """The second forward begins no other pass: what the first has shown is taken in by the next one."""
    shown, wiring.unsettled = wiring.unsettled, False
    try:
        yield
    finally:
        wiring.unsettled = wiring.unsettled or shown


@contextmanager
def _as(stream: Stream) -> Iterator[None]:
    token = streaming.set(stream)
    try:
        yield
    finally:
        streaming.reset(token)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Backward runs outside of autocast, as after an ordinary forward."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _detached(outputs: Any) -> Any:
    return tree_map(_detached_leaf, outputs)


def _detached_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    made = copy(leaf)
    for item in fields(leaf):
        object.__setattr__(made, item.name, _detached(getattr(leaf, item.name)))
    return made
