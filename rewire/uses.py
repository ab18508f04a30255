"""One operation on a layer's weight by another module, and how to run it as a call of the layer.

An operation qualifies if it is linear in one other tensor x and mixes x's features by the weight, or by a view of
it: ``F.linear(x, qkv.weight[:d])``, ``x @ child.weight.t()``, a convolution, ``torch.einsum("bti,oi->bto", ...)``.
Direct rules then cut x as they do anywhere else. Local rules take the derivative with respect to x with (the same
view of) B in the weight's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewire import operations
from rewire.errors import PassError
from rewire.layers.kinds import BackwardWeight, Kind
from rewire.layers.own_forward import OPERATIONS
from rewire.routing import LAYOUTS
from rewire.run import run

if TYPE_CHECKING:
    from rewire.attention import Seat
    from rewire.following import Learner
    from rewire.state import LayerState

Owner = Callable[[Tensor], "Owned | None"]

PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
REVERSED = {Tensor.__rmatmul__}
# bias + a b; the bias may be any tensor, a parameter in most cases
_SUMS = {torch.addmm, torch.baddbmm, torch.addbmm, Tensor.addmm, Tensor.baddbmm, Tensor.addbmm}
# Operations in which a weight can meet an x.
KNOWN = frozenset({*OPERATIONS, *PRODUCTS, *REVERSED, *_SUMS, torch.einsum})


@dataclass(frozen=True)
class Owned:
    """A watched weight, or what another module made of it.

    Attributes:
        layer, state, name: the layer it belongs to, and its name relative to the host that watches for it.
        tensor: the weight, or what was made of it.
        weight: the parameter.
    """

    layer: nn.Module
    state: LayerState
    name: str
    tensor: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Use:
    """One operation on a layer's weight.

    Attributes:
        owned: the weight.
        view: what of it the operation was given.
        x: the other tensor.
        turned: x has its features in front of its last dimension, as in ``weight @ x``.
        mixes: the dimension of the view that meets x's features; None for a convolution.
        apply: (x, weight or its view) -> result.
        direct: the operation, and its other arguments by name, if it has a fast backward with another weight.
        anywhere: an einsum, whose result may have its features anywhere.
    """

    owned: Owned
    view: Tensor
    x: Tensor
    turned: bool
    mixes: int | None
    apply: Callable[[Tensor, Tensor], Any]
    direct: tuple[Any, dict[str, Any]] | None
    anywhere: bool = False


def find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], owner: Owner) -> Use | None:
    """The use of a watched weight in ``func(*args, **kwargs)``, if it is one that a rule can be applied to."""
    if func not in KNOWN:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    bound = OPERATIONS[func][0].bind(*args, **kwargs).arguments if func in OPERATIONS else None
    for place, view in enumerate(leaves):
        if not isinstance(view, Tensor) or (bound is not None and view is not bound["weight"]):
            continue
        owned = owner(view)
        if owned is None or owned.tensor.shape != owned.weight.shape:
            continue
        other, turned, direct, mixes = _other(func, leaves, place), False, None, None
        if bound is not None:
            mixes = -1 if func is linear else None
            other = next(i for i, leaf in enumerate(leaves) if leaf is bound["input"])
            direct = (func, {n: v for n, v in bound.items() if n not in ("input", "weight")})
        elif other >= 0 and func is not torch.einsum:
            turned = (place < other) != (func in REVERSED)
            mixes = -1 if turned else -2
        elif other >= 0:
            mixes = _letters(leaves)[place].index(_letters(leaves)[other][-1])
        x = leaves[other]
        if other < 0 or not isinstance(x, Tensor) or x is view or (turned and x.dim() < 2):
            continue

        def apply(x: Tensor, weight: Tensor, place: int = place, other: int = other) -> Any:
            filled = list(leaves)
            filled[place], filled[other] = weight, x
            filled_args, filled_kwargs = tree_unflatten(filled, spec)
            return func(*filled_args, **filled_kwargs)

        return Use(owned, view, x, turned, mixes, apply, direct, func is torch.einsum)
    return None


def of_linear(owner: Owner, x: Tensor, view: Tensor, bias: Tensor | None) -> Use | None:
    """:func:`find` for ``F.linear(x, view, bias)``, without looking for what is what."""
    owned = owner(view)
    if owned is None or owned.tensor.shape != owned.weight.shape or x is view:
        return None
    return Use(owned, view, x, False, -1, lambda x, weight: linear(x, weight, bias), (linear, {"bias": bias}))


def _other(func: Any, leaves: list[Any], place: int) -> int:
    """Where the other tensor of a product is; -1 if the weight is not a factor in one, or not one that mixes x."""
    if func is torch.einsum:
        return _einsum(leaves, place)
    first = 1 if func in _SUMS else 0
    return 2 * first + 1 - place if place in (first, first + 1) else -1


def _einsum(leaves: list[Any], place: int) -> int:
    """The other operand of an einsum of two, if its last dimension alone is what the weight mixes."""
    letters = _letters(leaves)
    if len(letters) != 2:
        return -1
    result = leaves[0].rpartition("->")[2]
    (other,) = letters.keys() - {place}
    mixed = [letter for letter in letters[other] if letter in letters[place] and letter not in result]
    return other if len(mixed) == 1 and letters[other].endswith(mixed[0]) else -1


def _letters(leaves: list[Any]) -> dict[int, str]:
    """What each operand of an einsum has its dimensions called, by place; none if it is not written out."""
    operands = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(operands) != 2 or not isinstance(leaves[0], str) or "->" not in leaves[0]:
        return {}
    return dict(zip(operands, leaves[0].replace(" ", "").split("->")[0].split(","), strict=False))


def call(use: Use, seat: Seat | None) -> Any:
    """Run a use as a call of its layer.

    Args:
        seat: how the x inside an attention lies in the model around it.
    """
    state, layer = use.owned.state, use.owned.layer
    dims = use.x.dim()
    plain = use.owned.tensor is use.owned.weight
    if state.learner is not None:
        use = _followed(use, state.learner, plain)

    def inner(x: Tensor) -> Tensor:
        x = x if seat is None else seat.inner(x, dims)
        return x.transpose(-1, -2) if use.turned else x

    # An output error has to lie as the model around has it: so do the inputs of the layers that it goes to.
    turned = seat if seat is not None and state.joins else None

    def shown(y: Any) -> Any:
        return y if turned is None else turned.outer(y)

    def forward(_: nn.Module, x: Tensor) -> Any:
        return shown(use.apply(inner(x), use.view))

    def again(weight: Tensor) -> Callable[[Tensor], Any]:
        return lambda x: shown(use.apply(inner(x), _view_of(weight, use.view, use.owned.tensor)))

    x = use.x.transpose(-1, -2) if use.turned else use.x
    args: tuple[Any, ...] = (x if seat is None else seat.outer(x),)
    kwargs: dict[str, Any] = {}
    kind = _UseKind(use, inner, again, shown)
    index = input_of(state, use.view, use.owned.tensor, use.mixes)
    if seat is not None and seat.batched:
        state.layout = LAYOUTS[0 if seat.batch_first else 1]
    if state.observer is None:
        y = run(state, layer, forward, args, kwargs, kind, index)
    else:
        before, after = state.observer
        args, kwargs = before(state, layer, args, kwargs, again, index, plain)
        y = run(state, layer, forward, args, kwargs, kind, index)
        after(state, layer, args, kwargs, y)
    return y if turned is None else turned.inner(y, dims)


def input_of(state: LayerState, view: Tensor, weight: Tensor, mixes: int | None) -> int:
    """Number of the input that meets the view of the weight: 0 for all of it, else 1 + the row it begins with.

    So each part of a weight that packs several layers (queries, keys, values) has a feedback of its own, and so
    has the other direction of a weight that is used in both (1), as a tied decoder does. ``mixes``: as in :class:`Use`.
    """
    if view is not weight and view.numel() != weight.numel():
        return 1 + int(view.storage_offset() - weight.storage_offset()) // max(int(weight.stride(0)), 1)
    usual = 0 if state.kind.transposed else 1
    if mixes is None or not view.dim() == weight.dim() == 2:
        return 0
    return 1 if view.stride(mixes) != weight.stride(usual) else 0


def _followed(use: Use, learner: Learner, plain: bool) -> Use:
    """The use with a stand-in for the weight, which hands the weight's gradient to the layer's feedback too."""
    owned = use.owned
    if not plain and learner.rule.trained:
        raise PassError(
            f"layer {owned.state.label}: another module makes something of its weight and uses that, so "
            f"{learner.rule!r} would not learn from the weight itself: use another rule, "
            f"layers={{{owned.state.name!r}: 'fa'}}"
        )
    learner.enter(owned.layer)  # before anything is taken from what it keeps
    stand_in = learner.stand_in(owned.layer, owned.tensor)
    if stand_in is owned.tensor:
        return use
    view = _view_of(stand_in, use.view, owned.tensor) if use.view is not owned.tensor else stand_in
    return replace(use, owned=replace(owned, tensor=stand_in), view=view)


def _view_of(t: Tensor, view: Tensor, base: Tensor) -> Tensor:
    """What ``view`` is of ``base``, of ``t``, which has the shape of ``base``."""
    if view is base:
        return t
    if t.stride() != base.stride():
        t = torch.empty_strided(base.shape, base.stride(), dtype=t.dtype, device=t.device).copy_(t)
    offset = int(view.storage_offset()) - int(base.storage_offset()) + int(t.storage_offset())
    return t.as_strided(view.shape, view.stride(), offset)


class _UseKind(Kind):
    """The layer's kind, with its operation run as the other module runs it."""

    def __init__(
        self,
        use: Use,
        inner: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Callable[[Tensor], Any]],
        shown: Callable[[Any], Any],
    ) -> None:
        self.use = use
        self.inner = inner
        self.shown = shown
        self.again = again

    def axis(self, dims: int) -> int:
        return self.use.owned.state.kind.axis(dims)

    def delta_axis(self, y: Any) -> int | None:
        if not isinstance(y, Tensor) or self.use.anywhere:
            return None
        return -2 if self.use.turned else self.axis(y.dim())

    def run(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: BackwardWeight,
    ) -> Any:
        (x,) = args
        use, weight = self.use, self.use.owned.tensor
        backward.note(weight)
        if use.direct is not None and use.view is weight:
            func, rest = use.direct
            signature, with_other_backward = OPERATIONS[func]
            bound = signature.bind(self.inner(x), weight, **rest)
            bound.apply_defaults()
            return self.shown(with_other_backward(backward=backward, **bound.arguments))

        def make(w: Tensor | None, r: Tensor | None) -> Callable[[Tensor], Any]:
            return self.again(backward.combine(w, r))

        y = self.shown(use.apply(self.inner(x.detach()), use.view))
        return operations.mirror(y, x, weight, backward.random(weight), make, backward.keep)
