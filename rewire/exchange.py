"""Another weight in the backward of PyTorch's own operations.

A linear operation or convolution keeps its weight on its graph node, for one thing only: the gradient of its input.
So a local rule lets the operation run as it is and exchanges what is kept there. Its backward is then PyTorch's own
kernel, for every geometry, dtype and device, and the layer costs microseconds more than under backprop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import PassError
from rewire.layers.kinds import BackwardWeight
from rewire.nodes import Node

# Where nodes keep the weight, and whether what lies there is its transpose if W is (out, in).
_PLACES = (("_raw_saved_mat2", True), ("_raw_saved_weight", False))
_BATCHES: type = torch._C._functions.BmmBackward0  # type: ignore[attr-defined]
_DEPTH = 5  # a linear operation makes no more nodes than this: views, a sum with the bias, the product


_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_hooks_on_everything: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def exchangeable() -> bool:
    """Whether what operations keep may be exchanged now.

    Not inside ``torch.func`` transforms, and not where somebody else has hooks on all saved tensors (activation
    checkpointing, offloading): there can be one pair only.
    """
    return not _transforming() and _hooks_on_everything(True) is None


def exchange(y: Tensor, backward: BackwardWeight, *, transposed: bool) -> bool:
    """Let the operation that made y hand back what ``backward`` makes of its weight.

    Args:
        y: result of one linear operation or convolution of one tensor that requires a gradient.
        transposed: a linear operation keeps W as the layer has it (in, out), not transposed.

    Returns:
        Whether the weight was found. If not, nothing has changed.
    """
    node = y.grad_fn
    for _ in range(_DEPTH):
        if node is None:
            return False
        for place, turned in _PLACES:
            saved = getattr(node, place, None)
            if saved is not None:
                _put(saved, backward, turned and not transposed, batched=type(node) is _BATCHES)
                return True
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def swapped(x: Tensor, kept: Tensor, bias: Tensor, B: Tensor) -> Tensor:
    """``x kept + bias``, an operation that hands back δ Bᵀ: :func:`exchange` for a small layer, where hooks are felt.

    The product keeps ``kept``, the very tensor, which nobody else has. So its numbers can be exchanged afterwards. As
    under backprop, and other than with hooks, the weight may not change before the backward.

    Args:
        x: (N, inputs).
        kept: the weight, transposed, as a tensor made for this call: (inputs, outputs).
        bias: (outputs,).
        B: of the shape, dtype and device of ``kept``.
    """
    y = torch.addmm(bias, x, kept)
    kept.data = B
    return y


def exchange_within(
    outputs: list[Tensor],
    inputs: list[Tensor],
    shape: torch.Size,
    own: Tensor | None,
    others: list[nn.Parameter],
    backward: BackwardWeight,
    transposed: bool = False,
) -> int:
    """:func:`exchange` for a forward of any kind: every operation with a weight of ``shape``.

    Args:
        own: the layer's weight. Where it is used as it is, no other matrix is meant: an adapter's product may have the
            same shape.
        others: weights that are not meant, though of that shape.
        transposed: as for :func:`exchange`.

    Returns:
        How many operations were found.
    """
    ends = {x.grad_fn for x in inputs if x.grad_fn is not None}
    seen: set[Node] = set(ends)
    stack = [y.grad_fn for y in outputs]
    pointers = {other.data_ptr() for other in others}
    found: list[tuple[Any, bool, bool, bool]] = []  # what is kept, turned, batched, and whether it is ``own``
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
        for place, turned in _PLACES:
            saved = getattr(node, place, None)
            weight: Tensor | None = None if saved is None else getattr(node, place.replace("_raw", ""))
            if weight is None or weight.data_ptr() in pointers:
                continue
            batched = type(node) is _BATCHES
            if batched:
                if weight.stride(0):
                    continue  # not one weight for all of a batch
                weight = weight[0]
            turned = turned and not transposed
            if weight.shape == (shape[::-1] if turned else shape):
                found.append((saved, turned, batched, own is not None and weight.data_ptr() == own.data_ptr()))
                break
    if any(itself for *_, itself in found):
        found = [place for place in found if place[-1]]
    for saved, turned, batched, _ in found:
        _put(saved, backward, turned, note=True, batched=batched)
    return len(found)


class Exchange:
    """The pair of hooks that takes W when it is put away and gives B when it is asked for.

    Made once for each layer, or for each call of one whose R is drawn anew.
    """

    def __init__(self, backward: BackwardWeight, turned: bool, note: bool = False) -> None:
        self.backward = backward
        self.turned = turned
        self.note = note
        self.fixed: Tensor | None = None

    def pack(self, kept: Tensor) -> Any:
        """W, as the operation keeps it, to what is kept instead: B itself if it needs no W."""
        fixed = self.fixed
        if (
            fixed is not None
            and fixed.dtype is kept.dtype
            and fixed.device == kept.device
            and fixed.shape == kept.shape
        ):
            return fixed
        weight = kept.t() if self.turned else kept
        backward = self.backward
        if self.note:
            backward.note(weight)
        later = backward.later(weight)
        if later is not None:
            return later
        random = backward.random(weight)
        if backward.keep:
            return weight, weight._version, random
        if random is None:
            return None, 0, None
        made = backward.combine(None, random)
        self.fixed = made.t() if self.turned else made
        return self.fixed

    def unpack(self, packed: Any) -> Tensor:
        """What is kept to B, as the operation would have kept it."""
        if torch.is_grad_enabled():
            refuse_second_order()
        if isinstance(packed, Tensor):
            return packed
        if callable(packed):
            made: Tensor = packed()
            return made.t() if self.turned else made
        weight, version, random = packed
        if weight is not None and weight._version != version:
            raise RuntimeError(
                f"a weight of shape {tuple(weight.shape)} that the backward pass needs was modified by an in-place "
                f"operation: it is at version {weight._version}, expected {version}. Run backward before stepping "
                "the optimizer"
            )
        made = self.backward.combine(weight, random)
        return made.t() if self.turned else made


def refuse_second_order() -> None:
    """With ``create_graph``: autograd would take what has been put in the weight's place for the weight.

    Raises:
        PassError: always.
    """
    raise PassError(
        "create_graph=True: a gradient that a local rule (fa, usf, ...) handed back would be differentiated as if its "
        "backward weight were the weight. Run the forward within "
        "torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), where it is not; or, if no second "
        "derivatives are wanted, without create_graph"
    )


class _Batched:
    """The same for a product of batches, which keeps W expanded: of an x that is not contiguous and a frozen weight."""

    def __init__(self, one: Exchange) -> None:
        self.one = one
        self.size = 1

    def pack(self, kept: Tensor) -> Any:
        """As :meth:`Exchange.pack`."""
        self.size = kept.shape[0]
        return self.one.pack(kept[0])

    def unpack(self, packed: Any) -> Tensor:
        """As :meth:`Exchange.unpack`."""
        return self.one.unpack(packed).expand(self.size, -1, -1)


def _put(saved: Any, backward: BackwardWeight, turned: bool, note: bool = False, batched: bool = False) -> None:
    hooks = backward.exchange
    if hooks is None or hooks.turned != turned or hooks.note != note:
        hooks = Exchange(backward, turned, note)
        if backward.lasting:
            backward.exchange = hooks
    pair = _Batched(hooks) if batched else hooks
    saved.register_hooks(pair.pack, pair.unpack)
