"""``verify``: run one pass and show, layer by layer, that its rule is what happened.

Everything is measured from outside, with ordinary hooks on a copy of the model: each layer's input is
replaced by a clone, whose gradient is then exactly what the layer handed back. That is compared with the
rule's formula, computed again without autograd's help from the gradient at the output (or the output error)
and ``feedback(model)``; with what plain backprop hands back at the same place; and the gradients of the
layer's own parameters with those of its original operation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from rewire.convert import feedback, restore
from rewire.errors import ConversionError, RoutingError
from rewire.layers.own_forward import OwnForward
from rewire.passes import Call, call_at
from rewire.preview import call as call_model
from rewire.routing import plan
from rewire.rules.base import DirectRule, LocalRule
from rewire.swap import state_of
from rewire.wiring import LayerState, Role

LIVE = "live"
DEAD = "dead"
NOT_RUN = "not run"
ON_BACKPROP = "on backprop"
FIRST = "first layer"
UNROUTED = "unrouted"
WRONG = "wrong"


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in the pass.

    Attributes:
        name: qualified name.
        type: class, before conversion.
        rule: name of its rule.
        status: ``live``; ``first layer`` (nothing to hand back to); ``on backprop``; ``not run`` (its forward
            did not run and its parameters got no gradient); ``dead`` (its parameters were used, its forward did
            not run: the rule has no effect); ``unrouted`` (the output error has no way to it); ``wrong``.
        formula: cosine between what was handed back and the rule's formula; None where there is none.
        backprop: cosine between what was handed back and what plain backprop hands back there.
        weight_exact: whether its parameters got exactly the gradient of its own operation; None if not checked.
        note: why, in words.
    """

    name: str
    type: str
    rule: str
    status: str
    formula: float | None = None
    backprop: float | None = None
    weight_exact: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """All converted layers. ``str()`` is a table."""

    title: str
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No layer is dead, unrouted or wrong."""
        return not any(layer.status in (DEAD, UNROUTED, WRONG) for layer in self.layers)

    def __rich__(self) -> Table:
        counts = {status: sum(layer.status == status for layer in self.layers) for status in _COLOURS}
        table = Table(
            title=f"{self.title}: {'ok' if self.ok else 'NOT ok'}",
            caption=", ".join(f"{count} {status}" for status, count in counts.items() if count),
        )
        for column in ("layer", "type", "rule", "status", "cos to formula", "cos to backprop", "own gradients", "note"):
            table.add_column(column, justify="right" if column.startswith("cos") else "left")
        for layer in self.layers:
            exact = {True: "exact", False: "WRONG", None: "-"}[layer.weight_exact]
            status = f"[{_COLOURS[layer.status]}]{layer.status}[/]"
            cosines = [_show(layer.formula), _show(layer.backprop)]
            table.add_row(layer.name or "(model)", layer.type, layer.rule, status, *cosines, exact, layer.note)
        return table

    def __str__(self) -> str:
        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


_COLOURS = {
    LIVE: "green",
    FIRST: "green",
    ON_BACKPROP: "yellow",
    NOT_RUN: "yellow",
    DEAD: "red",
    UNROUTED: "red",
    WRONG: "red",
}


def verify(model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> Verification:
    """Run one pass and prove, for each converted layer, what happened in it.

    Works on a deep copy with the random state put back afterwards, so that parameters, gradients, buffers,
    scales and random numbers of ``model`` are as before. A model that has not been trained yet is given the
    first, measuring pass on the copy.

    Args:
        model: a converted model.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss_fn: from the model's output to a scalar loss.

    Returns:
        A :class:`Verification`: ``.ok``, ``.layers``, and ``str()`` or rich to read it.

    Raises:
        ConversionError: if ``model`` is not converted.

    Example:
        >>> print(rewire.verify(model, x, lambda out: F.cross_entropy(out, y)))
    """
    if not any(state_of(module) is not None for module in model.modules()):
        raise ConversionError(f"{type(model).__name__} is not converted: call rewire.convert(model, ...) first")
    with torch.random.fork_rng(), torch.enable_grad():
        random = torch.get_rng_state()
        twin = _copy(model)
        try:
            for _ in range(4):
                # The same random numbers each time: a layer that is dropped at random runs in all of these or in none.
                torch.set_rng_state(random)
                known = {s.name for s in _states(twin).values() if s.settled}
                seen = _watch(twin, inputs, loss_fn)
                feedback(twin)  # takes in what the pass has shown: roles, then scales
                if known == {s.name for s in _states(twin).values() if s.settled}:
                    break  # what was watched is what every later pass does
        except RoutingError as problem:
            return _unrouted(twin, problem)
        torch.set_rng_state(random)
        plain = restore(_copy(model))
        reference = _watch(plain, inputs, loss_fn, names={name for name, _ in _named(twin)})
        return Verification(type(model).__name__, _reports(twin, seen, reference))


# -- watching ----------------------------------------------------------------------------------------


@dataclass(eq=False)  # found again in lists by identity
class _Seen:
    """One call of one layer, as seen from outside."""

    args: Any  # clones of what it was given, detached
    inputs: list[Tensor]  # those of them that require a gradient
    handed: list[Tensor | None]  # what came back for each
    output: Tensor | None = None
    delta: Tensor | None = None  # gradient at its output
    note: Call | None = None  # what the library left on the graph: which output layers are downstream


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(state.name, module) for module, state in _states(model).items()]


def _states(model: nn.Module) -> dict[nn.Module, LayerState]:
    return {module: state for module in model.modules() if (state := state_of(module)) is not None}


def _watch(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], names: set[str] | None = None
) -> dict[str, list[_Seen]]:
    """One forward and backward of ``model``; every call of every converted layer (or of ``names``)."""
    watched = (
        {module: name for name, module in _named(model)}
        if names is None
        else {module: name for name, module in model.named_modules() if name in names}
    )
    seen: dict[str, list[_Seen]] = {name: [] for name in watched.values()}
    running: dict[nn.Module, list[_Seen]] = {module: [] for module in watched}

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        call = _Seen(None, [], [])
        kept: list[Any] = list(leaves)
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor):
                continue
            kept[i] = x.detach().clone()
            if x.requires_grad:
                leaves[i] = x.clone()  # its only user is this layer, so its gradient is what the layer hands back
                _hook(leaves[i], _put(call.handed, len(call.inputs)))
                call.inputs.append(kept[i])
                call.handed.append(None)
        call.args = tree_unflatten(kept, spec)
        running[module].append(call)
        return tree_unflatten(leaves, spec)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = running[module].pop()
        seen[watched[module]].append(call)
        y = next((t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad), None)
        if y is None:
            return
        call.output = y.detach()
        found: list[Tensor | None] = [None]
        _hook(y, _put(found, 0, call))
        call.note = call_at(y)

    states = [state for m in watched if (state := state_of(m)) is not None]
    for state in states:
        state.observer = (before, after)  # for weights that another module uses directly
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in watched]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in watched]
    try:
        model.zero_grad()
        _backward(loss_fn(call_model(model, inputs)))
    finally:
        for hook in hooks:
            hook.remove()
        for state in states:
            state.observer = None
    return seen


def _backward(loss: Tensor) -> None:
    run: Callable[[], None] = loss.backward
    run()


def _hook(t: Tensor, hook: Callable[[Tensor], None]) -> None:
    register: Callable[..., Any] = t.register_hook
    register(hook)


def _put(place: list[Tensor | None], index: int, call: _Seen | None = None) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        place[index] = gradient.detach().clone()
        if call is not None:
            call.delta = place[index]

    return hook


# -- comparing ---------------------------------------------------------------------------------------


def _reports(model: nn.Module, seen: dict[str, list[_Seen]], reference: dict[str, list[_Seen]]) -> list[LayerReport]:
    used = feedback(model)
    deltas = {call.note: call.delta for calls in seen.values() for call in calls if call.note is not None}
    own = _own_gradients(model, seen)
    reports: list[LayerReport] = []
    for module, state in _states(model).items():
        calls = seen[state.name]
        kind = vars(type(module)).get("_rewired_from", type(module)).__name__

        def report(status: str, note: str = "", state: LayerState = state, kind: str = kind, **more: Any) -> None:
            reports.append(LayerReport(state.name, kind, repr(state.rule), status, note=note, **more))

        if not calls:
            touched = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters(recurse=False))
            if touched and not state.active:
                report(ON_BACKPROP, "its weight is used by another module directly")
            elif touched:
                report(DEAD, "its weight is used by another module in a way that is not known; its forward never ran")
            else:
                report(NOT_RUN, "did not run in this pass")
            continue
        exact = own.get(state.name)
        ran = [call for call in calls if call.delta is not None]
        if not ran:
            report(NOT_RUN, "ran, but the loss does not depend on it", weight_exact=exact)
            continue
        if not state.active:
            note = "output layer, exact gradient" if state.role is Role.OUTPUT else "kept on backprop"
            report(ON_BACKPROP if exact is not False else WRONG, note, weight_exact=exact)
            continue
        pairs = [(call, i, handed) for call in ran for i, handed in enumerate(call.handed) if call.inputs]
        if not pairs:
            report(FIRST if exact is not False else WRONG, "nothing to hand back to", weight_exact=exact)
            continue
        handed, expected, plain = [], [], []
        for call, index, got in pairs:
            handed.append(torch.zeros_like(call.inputs[index]) if got is None else got)
            expected.append(_formula(module, state, call, index, used, deltas))
            twin_calls = reference.get(state.name, [])
            place = calls.index(call)
            other = twin_calls[place].handed[index] if place < len(twin_calls) else None
            plain.append(torch.zeros_like(call.inputs[index]) if other is None else other)
        backprop = _cosine(handed, plain)
        if isinstance(state.rule, DirectRule) and not state.settled and _close(handed, plain):
            note = "still measuring: backprop handed back zero (or nothing finite) in every pass so far"
            report(ON_BACKPROP if exact is not False else WRONG, note, weight_exact=exact)
            continue
        if any(e is None for e in expected):
            report(
                LIVE if exact is not False else WRONG,
                "formula not recomputed: forward of its own",
                backprop=backprop,
                weight_exact=exact,
            )
            continue
        wanted = [e for e in expected if e is not None]
        close = _close(handed, wanted)
        note = "" if close else "what was handed back is not what the rule says"
        if close and exact is False:
            note = "its parameters did not get their own operation's gradient"
        if not close and all(got is None for _, _, got in pairs):
            report(UNROUTED, "nothing was handed back", backprop=backprop, weight_exact=exact)
            continue
        report(
            LIVE if close and exact is not False else WRONG,
            note,
            formula=_cosine(handed, wanted),
            backprop=backprop,
            weight_exact=exact,
        )
    return reports


def _formula(
    module: nn.Module,
    state: LayerState,
    call: _Seen,
    index: int,
    used: dict[str, Tensor],
    deltas: dict[Call, Tensor | None],
) -> Tensor | None:
    """What the rule says goes to input ``index`` of ``call``; None where it cannot be recomputed."""
    x, rule = call.inputs[index], state.rule
    if isinstance(rule, LocalRule):
        if call.delta is None or (isinstance(state.kind, OwnForward) and not state.functional):
            return None
        plain = _original(module)
        _set_weight(plain, used[state.name].to(x.dtype))
        return _gradients(plain, call, [x])[0]
    assert isinstance(rule, DirectRule)
    total = torch.zeros_like(x)
    if rule.silent or call.note is None:
        return total
    several = len(state.wiring.outputs) > 1
    for error in call.note.errors:
        delta = next((d for note, d in deltas.items() if error in note.own), None)
        if delta is None or any(deltas.get(note) is not None for note in deltas if set(note.own) & set(error.above)):
            continue
        signal = rule.signal(delta, error.targets, error.axis)
        name = state.name if index == 0 else f"{state.name}#{index}"
        B = used.get(f"{name}@{error.state.name}" if several else name, used.get(name))
        if B is None:
            return None
        axes = state.kind.axis(x.dim()), error.axis
        route = plan(
            tuple(x.shape),
            axes[0],
            tuple(delta.shape),
            axes[1],
            structure=state.wiring.structure,
            layout=rule.layout,
            seen=state.order,
        )
        total += route(signal, B).to(x.dtype)
    return total


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps tensors of its last forward, which PyTorch refuses to copy."""
    kept = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})


def _original(module: nn.Module) -> nn.Module:
    """A copy of one layer as it was before conversion, without its hooks."""
    plain = restore(_copy(module))
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks, plain._backward_pre_hooks):
        hooks.clear()
    return plain


def _set_weight(plain: nn.Module, weight: Tensor) -> None:
    if nn.utils.parametrize.is_parametrized(plain, "weight"):
        # Taking the parametrization off would take the property off the class, which the user's own layer shares.
        cls: Any = type(plain)
        plain.__class__ = type(cls.__name__, (cls,), {"weight": weight})
    else:
        plain.weight = nn.Parameter(weight)


def _gradients(plain: nn.Module, call: _Seen, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of the plain operation at ``call``, for its delta, with respect to ``wanted``."""
    assert call.delta is not None
    leaves, spec = tree_flatten(call.args)
    for i, leaf in enumerate(leaves):
        if any(leaf is x for x in wanted):
            leaves[i] = leaf.detach().requires_grad_()
    fresh = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    parameters = [t for t in wanted if isinstance(t, nn.Parameter)]
    args, kwargs = tree_unflatten(leaves, spec)
    output = plain(*args, **kwargs)
    y = next(t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad)
    return list(torch.autograd.grad(y, [*fresh, *parameters], call.delta.to(y.dtype), allow_unused=True))


def _own_gradients(model: nn.Module, seen: dict[str, list[_Seen]]) -> dict[str, bool]:
    """For each layer: whether its parameters' gradients are exactly those of its own operation, over all calls.

    Parameters that several modules share are left out, and so are blocks, which may be random inside.
    """
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    exact: dict[str, bool] = {}
    for module, state in _states(model).items():
        mine = [(name, p) for name, p in module.named_parameters() if p.requires_grad and owners[p] == 1]
        if state.functional:  # who uses the weight may make a bias of its own for it
            mine = [(name, p) for name, p in mine if name == "weight"]
        calls = [call for call in seen[state.name] if call.delta is not None]
        if not mine or not calls or not state.kind.local:
            continue
        plain = _original(module)
        theirs = dict(plain.named_parameters())
        wanted: list[Tensor] = [theirs[name] for name, _ in mine]
        totals = _total(plain, calls, wanted)
        got = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in mine]
        # Sums that cancel (a key's bias, which softmax does not feel) are as exact as their terms are large.
        exact[state.name] = _close(got, totals) or _close(got, totals, _total(plain, calls, wanted, torch.abs))
    return exact


def _total(
    plain: nn.Module, calls: list[_Seen], wanted: list[Tensor], of: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Gradients of ``wanted`` summed over ``calls``, with ``of`` applied to each call's inputs and delta first."""
    totals = [torch.zeros_like(p) for p in wanted]
    for call in calls:
        if of is not None:
            assert call.delta is not None
            args = tree_map_only(Tensor, lambda t: of(t) if t.is_floating_point() else t, call.args)
            call = _Seen(args, [], [], delta=of(call.delta))
        for total, gradient in zip(totals, _gradients(plain, call, wanted), strict=True):
            if gradient is not None:
                total += gradient
    return totals


def _close(got: list[Tensor], wanted: list[Tensor], sizes: list[Tensor] | None = None) -> bool:
    """Equal to a few hundred units in the last place of the largest entry (of ``sizes``, if given)."""
    for a, b, of in zip(got, wanted, sizes or wanted, strict=True):
        size = float(of.detach().abs().max()) if b.numel() else 0.0
        tolerance = 2e3 * torch.finfo(b.dtype).eps if b.dtype.itemsize > 2 else 8 * torch.finfo(b.dtype).eps
        if not torch.isfinite(a).all() or (a.numel() and float((a - b).abs().max()) > tolerance * size):
            return False
    return True


def _cosine(a: list[Tensor], b: list[Tensor]) -> float | None:
    """Between two lists of tensors taken as one vector each; None if either is zero."""
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    norms = [sum(float(x.double().square().sum()) for x in v) ** 0.5 for v in (a, b)]
    return dot / (norms[0] * norms[1]) if all(n > 0 for n in norms) else None


def _show(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.3f}"


def _unrouted(model: nn.Module, problem: RoutingError) -> Verification:
    reports = []
    for module, state in _states(model).items():
        kind = vars(type(module)).get("_rewired_from", type(module)).__name__
        status, note = (UNROUTED, str(problem)) if state.label in str(problem) else (NOT_RUN, "the pass broke off")
        reports.append(LayerReport(state.name, kind, repr(state.rule), status, note=note))
    return Verification(type(model).__name__, reports)
