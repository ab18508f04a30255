"""Inputs that were transposed on their way up, as an attention inside a batch-first model may do for itself.

(16, 2, F) fits an error of 2 samples as sequence first, and as 8 parts of each sample. Shapes do not tell, and what
other layers have shown need not hold here; but a ``transpose`` between this layer and what its input was made from
lies on the autograd graph. It is looked for while layers are new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rewire.nodes import Node, place_before, shape_of


def turned_from(x: Tensor, is_call: Callable[[Node], bool]) -> tuple[bool, Node | None]:
    """Whether the first dimension of what ``x`` was made from is its second now; and the node of the call that made it.

    What lies in between is followed for as long as dimensions can be: through operations on elements, padding and
    other transposes. Without a call at the end, the node is None.
    """
    node: Any = x.grad_fn
    dims = x.dim()
    first, second = 0, 1
    while node is not None and not is_call(node):
        before = place_before(node, first), place_before(node, second)
        parents = [
            parent
            for parent, place in node.next_functions
            if parent is not None and len(shape_of(parent, place)) == dims
        ]
        if -1 in before or not parents:
            return second == 0 < first and not _splits(node), None
        (first, second), node = before, parents[0]
    return second == 0 < first, node


def _splits(node: Any) -> bool:
    """Whether a node's first dimension is one of several that its input has as one, for reasons of its own.

    Products of (N, T, F) with a matrix do so as well, but know what they had.
    """
    if "View" not in node.name() or node.name().startswith("UnsafeView"):
        return False
    parent, place = node.next_functions[0]
    return shape_of(parent, place)[:1] != shape_of(node)[:1]
