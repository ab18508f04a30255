"""What each rule says is handed back, computed again with as little as possible of the code that is checked.

The equations of the rules that come with the library are written down once more, and the common ways of an error
to an input are plain products; for rules of one's own, and shapes that have to be interpreted, the rule and
:mod:`rewire.routing` are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rewire.buffers import memory_of
from rewire.diagnose.match import Match, close
from rewire.diagnose.watch import Layer, Randomness, Seen
from rewire.errors import RoutingError
from rewire.feedback import quick_normal, standard_normal
from rewire.layer_feedback import changed_randoms, made_for, random
from rewire.learning import glance, rows_of
from rewire.replay import BuffersOf
from rewire.routing import route_to
from rewire.rules.base import DirectRule, LearnedLocal, LocalRule, Rule
from rewire.rules.direct import DFA, SDFA, Shallow
from rewire.rules.learned_local import KP, LDFA, PFA, WM
from rewire.rules.local import BRSF, FA, FRSF, USF
from rewire.state import LayerState
from rewire.structures import Feedback
from rewire.targets import current_targets

# -- direct rules --------------------------------------------------------------------------------------

_SIGNALS: dict[type[Rule], Callable[[Tensor], Tensor]] = {
    DFA: lambda e: e,
    SDFA: lambda e: (e > 0).to(e.dtype) - (e < 0).to(e.dtype),
    Shallow: lambda e: e * 0,
}


def signal(rule: DirectRule, e: Tensor, axis: int) -> Tensor:
    """What ``rule`` projects."""
    ours = _SIGNALS.get(type(rule))
    return rule.signal(e, current_targets(), axis) if ours is None else ours(e)


def fed_back(
    state: LayerState, rule: DirectRule, shape: torch.Size, output: LayerState, sent: Tensor, B: Tensor
) -> Tensor | None:
    """``sent B`` as a gradient for an input of ``shape``; None if there is no way."""
    axes = state.kind.axis(len(shape)), output.kind.axis(sent.dim())
    if B.shape[0] != sent.shape[axes[1]]:
        return None
    sent = sent.to(B.dtype)
    if "sequence_first" not in (rule.layout, state.layout) and not (state.order and any(state.order)):
        plain = _plainly(sent, B, shape, axes)
        if plain is not None:
            return plain
    above = output.rule
    try:
        route = route_to(
            tuple(shape),
            axes[0],
            tuple(sent.shape),
            axes[1],
            structure=state.structure().routing,
            layout=rule.layout,
            e_layout=above.layout if isinstance(above, DirectRule) else rule.layout,
            seen=state.order,
            stacked=state.stacked,
            hint=state.layout,
        )
    except RoutingError:
        return None
    return route(sent, B) if B.shape == route.feedback_shape else None


def _plainly(e: Tensor, B: Tensor, x: torch.Size, axes: tuple[int, int]) -> Tensor | None:
    """The ways that need no interpretation of shapes."""
    batch = x[0] == e.shape[0] > 1
    if B.shape[1] != x[axes[0]]:
        return None
    if axes == (-1, -1) and B.dim() == 2 and batch:
        if len(x) == e.dim() == 2:
            return torch.einsum("bn,nf->bf", e, B)
        if len(x) == e.dim() == 3 and x[:2] == e.shape[:2] and x[0] != x[1]:
            return torch.einsum("btn,nf->btf", e, B)
        if len(x) == 3 and e.dim() == 2 and x[0] != x[1]:
            return torch.einsum("bn,nf->bf", e, B)[:, None].expand(x)
    if axes[0] == 1 and batch:
        if e.dim() == 2 and axes[1] == -1:
            if B.dim() > 2 and B.shape[1:] != x[1:]:
                return None
            fed = torch.einsum("bn,nf->bf", e, B.flatten(1))
            return fed.reshape(x) if B.dim() > 2 else fed.reshape(*fed.shape, *(1,) * (len(x) - 2)).expand(x)
        if axes[1] == 1 and e.shape[2:] == x[2:] and B.dim() == 2:
            return torch.einsum("bn...,nf->bf...", e, B)
    return None


def context(state: LayerState, index: int, x: Tensor, sent: tuple[Tensor, int], output: str) -> Tensor | None:
    """What the layer's own input x adds under a rule that looks at it: e c C for each row of e and of x, c being x P.

    Args:
        sent: what is projected, and its dimension with the n features.
        output: the output layer whose error that is.

    Returns:
        A tensor of x's shape; None where the rows of e do not each belong to a run of rows of x.
    """
    C = memory_of(state, index).get("C")
    if C is None:
        return torch.zeros_like(x)
    e, axis = sent
    widths = {name: rows_of(state, name, index) for name, i in state.shapes if i == index}
    if output not in widths or len(C) != sum(widths.values()):
        return None
    C = torch.split(C, list(widths.values()))[list(widths).index(output)]
    features = state.kind.axis(x.dim())
    B = made_for(state, output, index, state.shapes[output, index])
    e = B.shown(e, axis, {}) if isinstance(B, Feedback) else e
    rows = e.movedim(axis, -1).reshape(-1, e.shape[axis]).to(C.dtype)
    seen = x.detach().movedim(features, -1)
    flat = seen.reshape(-1, seen.shape[-1]).to(C.dtype)
    if len(flat) % len(rows) or C.shape[0] != rows.shape[1]:
        return None
    steps_first, errors_too = state.order or (False, False)
    at = torch.arange(len(flat), device=x.device)
    if errors_too != steps_first and e.dim() != 2:
        return None
    # x is (T, N, features) and e (N, n); or one error for each run of rows.
    run = len(flat) // len(rows)
    of = at % len(rows) if steps_first and e.dim() == 2 else at * state.stacked // run % len(rows)
    c = flat @ glance(state, C.shape[1], flat.shape[1]).to(flat)
    made = torch.einsum("mn,mr,nrf->mf", rows[of], c, C)
    return made.reshape(seen.shape).movedim(-1, features).to(x.dtype)


# -- local rules ---------------------------------------------------------------------------------------

# (W, R, s) -> B
_BACKWARD: dict[type[Rule], Callable[[Tensor, Tensor, float], Tensor]] = {
    FA: lambda W, R, s: R,
    USF: lambda W, R, s: s * W.sign(),
    BRSF: lambda W, R, s: R.abs() * W.sign(),
    FRSF: lambda W, R, s: R.abs() * W.sign(),
}


def backward_weight(state: LayerState, W: Tensor, draw: int, module: nn.Module) -> Tensor:
    """B of a local rule for the weight of one call. ``module``: holds feedback that learns."""
    rule = state.rule
    if not isinstance(rule, LocalRule):
        return W
    if isinstance(rule, LearnedLocal):
        return _learned(state, rule, W, module).detach().to(W.dtype)
    s = state.local_scale(W)
    seed, name = state.wiring.seed, state.name
    if rule.redraw:
        R = quick_normal(W.shape, seed=seed, name=name, draw=draw, scale=s)
    elif changed_randoms(state):  # no seed gives it
        R = random(state, rule, W.shape, W.dtype, W.device)
    else:
        R = s * standard_normal(W.shape, seed=seed, name=name)
    R = R.to(W.device, W.dtype)
    ours = _BACKWARD.get(type(rule))
    if ours is not None:
        return ours(W, R, s)
    if rule.magnitude:
        R = R.abs()
    return rule.backward_weight(W if rule.uses_weight else None, R if rule.random else None, s)


def _learned(state: LayerState, rule: LearnedLocal, W: Tensor, module: nn.Module) -> Tensor:
    def t(name: str) -> Tensor:
        tensor: Tensor = getattr(module, state.tag + name)
        return tensor.detach().to(W.dtype)

    if type(rule) in (KP, WM):
        return t("B")
    if type(rule) is LDFA:
        return _product(state, t("P").t(), t("Q").t(), W, module)
    if type(rule) is PFA:
        return _product(state, t("A"), t("R"), W, module)
    assert state.learner is not None
    return rule.feedback(state.learner.kept(module), state.learner.form)


def _product(state: LayerState, left: Tensor, right: Tensor, W: Tensor, module: nn.Module) -> Tensor:
    """B_o,ik = sum over r of left_or right_r,ik, in the weight's own order of dimensions."""
    if not (isinstance(module, nn.modules.conv._ConvTransposeNd) or state.kind.transposed):
        return torch.einsum("or,rj->oj", left, right).reshape(W.shape)
    groups = int(getattr(module, "groups", 1))
    left = left.reshape(groups, -1, left.shape[1])
    right = right.reshape(right.shape[0], W.shape[0] // groups, -1)
    return torch.einsum("gor,rik->giok", left, right).reshape(W.shape)


def follows(layer: Layer, gradient: Tensor) -> dict[str, Tensor]:
    """Gradients that a layer's trained feedback gets with ``gradient`` at its weight, by parameter of its module."""
    state, module = layer.state, layer.module
    if state.learner is None or not state.learner.rule.trained:
        return {}
    rule, form = state.learner.rule, state.learner.form
    kept = state.learner.kept(module)
    if type(rule) is KP:
        found = {"B": gradient}
    elif type(rule) is LDFA:
        found = {"Q": torch.einsum("ro,oj->jr", kept["P"].to(gradient.dtype), form.matrix(gradient))}
    elif type(rule) is PFA:
        found = {"R": torch.einsum("or,oj->rj", kept["A"].to(gradient.dtype), form.matrix(gradient))}
    else:
        found = rule.follow(gradient, kept, form)
    return {state.tag + name: t for name, t in found.items()}


class Local:
    """Computes what a local rule (or backprop) hands back, beside the forward of the reference pass.

    A layer's original forward is run once more on the same input, random numbers and buffers, with its operation
    split in two: the value, without a gradient for its input, and a zero whose gradient is B's. Where another module
    uses the weight directly the operation is all there is, and is run with B.

    Args:
        calls: of the converted model, with the gradients at their outputs.
        used: ``feedback(model)`` there, by layer.

    Attributes:
        shown: by layer, whether ``used`` is the B of its newest call.
    """

    def __init__(self, calls: Mapping[str, list[Seen]], used: Callable[[str], Mapping[str, Tensor]]) -> None:
        self.shown: dict[str, bool] = {}
        self._left = {name: list(seen) for name, seen in calls.items()}
        self._used = used

    def before(self, call: Seen, layer: Layer) -> None:
        """To be called before ``layer`` runs in the reference."""
        left = self._left[call.name]
        ours = left.pop(0) if left else None
        if ours is None or ours.delta is None or not ours.places or not ours.state.kind.local:
            return
        if isinstance(ours.state.rule, DirectRule):
            return
        with torch.enable_grad(), _saving_for_itself():
            if ours.again is None:
                self._forward(ours, call, layer)
            else:
                self._use(ours, call, layer)
        if not left:
            # What is not kept is made from the seed again if anybody asks.
            ours.state.randoms, ours.state.local = changed_randoms(ours.state), None

    def _show(self, ours: Seen, B: Tensor) -> None:
        used = self._used(ours.name).get(ours.state.name)
        if used is None:
            self.shown[ours.name] = False
            return
        # Rules that learn keep wider numbers than a weight of few bits has; a pass hands them back in the weight's.
        coarse = max(used.dtype, B.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        self.shown[ours.name] = close(used.to(coarse), B.to(coarse))

    def _use(self, ours: Seen, call: Seen, layer: Layer) -> None:
        assert call.again is not None
        W = ours.state.kind.look(layer.module)
        if ours.plain:
            B = backward_weight(ours.state, W, ours.draw, layer.module)
            self._show(ours, B)
        elif isinstance(ours.state.rule, LocalRule):  # of a weight that the other module alone knows how to make
            B = self._used(call.name)[ours.state.name]
        else:
            return
        _, (x,) = _fresh(call.args, ours)
        _expect(ours, call.again(B.to(W.dtype))(x), [x])

    def _forward(self, ours: Seen, call: Seen, layer: Layer) -> None:
        module = layer.module
        parent: Any = getattr(type(module), "_rewired_from", type(module))
        own = layer.state.kind.own(module)
        others = [p for p in module.parameters() if p is not own]
        buffers = [BuffersOf(part._buffers) for part in module.modules()]
        random = Randomness()
        split = _Split(ours, layer.module, ours.state.kind.look(module).shape, others)
        (args, kwargs), xs = _fresh(call.args, ours)
        watched, call.state.ran = call.state.ran, True
        call.state.busy.add(get_ident())  # a use by the layer itself is no use by another module
        try:
            with split:
                y = parent.forward(module, *args, **kwargs)
        finally:
            call.state.busy.discard(get_ident())
            call.state.ran = watched
        random.put_back()
        for kept in buffers:
            kept.put_back()
        if split.found is not None:
            self._show(ours, split.found)
            _expect(ours, y, xs)


class _Split(TorchFunctionMode):
    """Splits the operation with the layer's weight (or what its forward makes of it) in two."""

    def __init__(self, theirs: Seen, module: nn.Module, shape: torch.Size, others: list[nn.Parameter]) -> None:
        super().__init__()
        self.theirs, self.module, self.shape, self.others = theirs, module, shape, others
        self.found: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = _argument(args, kwargs, *_WEIGHT_AT[func]) if func in _WEIGHT_AT else None
        if weight is None or weight.shape != self.shape or any(weight is other for other in self.others):
            return func(*args, **kwargs)
        B = backward_weight(self.theirs.state, weight.detach(), self.theirs.draw, self.module)
        self.found = B
        x = _argument(args, kwargs, *_INPUT_AT[func])
        cut_args, cut_kwargs = _replaced(args, kwargs, _INPUT_AT[func], x.detach())
        fed_args, fed_kwargs = _replaced(args, kwargs, _WEIGHT_AT[func], B)
        fed = func(*fed_args, **fed_kwargs)
        return func(*cut_args, **cut_kwargs) + (fed - fed.detach())


def _saving_for_itself() -> Any:
    """Keeps what is saved for backward here out of the books of a checkpoint around it."""
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    # Detached: a node that holds its own output as it is would never be freed.
    return hooks(torch.Tensor.detach, lambda t: t)


def _fresh(args: Any, theirs: Seen) -> tuple[Any, list[Tensor]]:
    """The arguments of a call with leaves in place of its inputs; and those."""
    leaves, spec = tree_flatten(args)
    xs = [leaves[place.leaf].clone().requires_grad_() for place in theirs.places]
    for place, x in zip(theirs.places, xs, strict=True):
        leaves[place.leaf] = x
    return tree_unflatten(leaves, spec), xs


def _expect(theirs: Seen, output: Any, xs: list[Tensor]) -> None:
    """What ``output``, one tensor or what a layer's own forward returns, brings back to ``xs``."""
    outputs = [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
    if len(outputs) != len(theirs.deltas):
        return
    ends = [(y, delta.to(y.dtype)) for y, delta in zip(outputs, theirs.deltas, strict=True) if delta is not None]
    grads = torch.autograd.grad([y for y, _ in ends], xs, [delta for _, delta in ends], allow_unused=True)
    for place, x, grad in zip(theirs.places, xs, grads, strict=True):
        wanted = torch.zeros_like(x) if grad is None else grad
        theirs.expected[place.leaf] = Match.of(torch.zeros_like(x) if place.handed is None else place.handed, wanted)


Where = tuple[int, str]  # position and name of an argument

_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_INPUT_AT: dict[Any, Where] = {**dict.fromkeys(_FUNCTIONS, (0, "input")), torch.addmm: (1, "mat1")}
_WEIGHT_AT: dict[Any, Where] = {**dict.fromkeys(_FUNCTIONS, (1, "weight")), torch.addmm: (2, "mat2")}


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs[name]


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], where: Where, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another value at ``where``."""
    position, name = where
    new_args, new_kwargs = list(args), dict(kwargs)
    if position < len(args):
        new_args[position] = value
    else:
        new_kwargs[name] = value
    return tuple(new_args), new_kwargs
