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

from rewire.layers.kinds import BackwardWeight

Node = torch.autograd.graph.Node

# Where nodes keep the weight, and whether what lies there is its transpose if W is (out, in).
_PLACES = (("_raw_saved_mat2", True), ("_raw_saved_weight", False))
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
                _put(saved, backward, turned and not transposed)
                return True
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def exchange_within(
    outputs: list[Tensor],
    inputs: list[Tensor],
    shape: torch.Size,
    others: list[nn.Parameter],
    backward: BackwardWeight,
) -> int:
    """:func:`exchange` for a forward of any kind: every operation with a weight of ``shape``.

    Args:
        others: weights that are not meant, though of that shape.

    Returns:
        How many operations were found.
    """
    ends = {x.grad_fn for x in inputs if x.grad_fn is not None}
    seen: set[Node] = set(ends)
    stack = [y.grad_fn for y in outputs]
    pointers = {other.data_ptr() for other in others}
    count = 0
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
            if weight.shape == (shape[::-1] if turned else shape):
                _put(saved, backward, turned, note=True)
                count += 1
                break
    return count


def _put(saved: Any, backward: BackwardWeight, turned: bool, note: bool = False) -> None:
    def pack(kept: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
        weight = kept.t() if turned else kept
        if note:
            backward.note(weight)
        random = backward.random(weight)
        return (weight, weight._version, random) if backward.keep else (None, 0, random)

    saved.register_hooks(pack, _unpack_turned(backward) if turned else _unpack(backward))


def _unpack(backward: BackwardWeight) -> Callable[[Any], Tensor]:
    def unpack(packed: tuple[Tensor | None, int, Tensor | None]) -> Tensor:
        weight, version, random = packed
        if weight is not None and weight._version != version:
            raise RuntimeError(
                f"a weight of shape {tuple(weight.shape)} that the backward pass needs was modified by an in-place "
                f"operation: it is at version {weight._version}, expected {version}. Run backward before stepping "
                "the optimizer"
            )
        return backward.combine(weight, random)

    return unpack


def _unpack_turned(backward: BackwardWeight) -> Callable[[Any], Tensor]:
    unpack = _unpack(backward)
    return lambda packed: unpack(packed).t()
