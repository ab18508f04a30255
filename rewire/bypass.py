"""Weights that meet an activation outside of any call of their layer: seen on the autograd graph.

``x @ layer.weight.T`` leaves a product node one of whose inputs leads to nothing but the weight, and another to an
activation. A penalty on weights leaves no such node. What happens inside a layer's call is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.nodes import Node


@dataclass(frozen=True)
class _Made:
    """What a node's value is made of: the parameters it comes from, and whether an activation is in it."""

    leaves: frozenset[Tensor]
    active: bool


def direct_uses(roots: Iterable[Node], sources: Callable[[Node], Iterable[Node] | None]) -> set[Tensor]:
    """Parameters of two and more dimensions that meet an activation between ``roots`` and the leaves.

    Args:
        sources: the nodes of a call's inputs, for the node of a call's output; None for any other node. They are
            walked on from.
    """
    known: dict[Node, _Made] = {}
    met: set[Tensor] = set()
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in known:
            stack.pop()
            continue
        inputs = sources(node)
        if inputs is not None:
            known[node] = _ACTIVATION
            stack.extend(inputs)
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in parents if parent not in known]
        if waiting:
            stack.extend(waiting)
            continue
        made = [known[parent] for parent in parents]
        known[node] = _made(node, made)
        met.update(leaf for leaves in _met(node, made) for leaf in leaves if leaf.dim() > 1)
    return met


_ACTIVATION = _Made(frozenset(), active=True)
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution", "Einsum")


def _made(node: Node, parents: list[_Made]) -> _Made:
    leaf: Tensor | None = getattr(node, "variable", None)
    if leaf is not None:
        return _Made(frozenset((leaf,)), active=False)
    if node.name().startswith("Embedding"):
        return _ACTIVATION  # rows looked up are no weight any more
    leaves: frozenset[Tensor] = frozenset().union(*(p.leaves for p in parents))
    return _Made(leaves, any(p.active for p in parents))


def _met(node: Node, parents: list[_Made]) -> Iterator[frozenset[Tensor]]:
    name = node.name().removesuffix("Backward0").removesuffix("Backward1")
    kind: type = type(node)
    if name in _PRODUCTS or issubclass(kind, torch.autograd.function.BackwardCFunction):
        anything = True  # an operation of one's own may do anything, a product too
    elif name == "Mul":
        anything = False  # a weight is also multiplied by a scale, or a learnt mask
    else:
        return
    for i, made in enumerate(parents):
        others = parents[:i] + parents[i + 1 :]
        if made.leaves and not made.active and any(o.active or (anything and o.leaves - made.leaves) for o in others):
            yield made.leaves
