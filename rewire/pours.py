"""Rows added up by index, as a graph network pools its nodes into graphs: whose error is theirs?

Many rows below become few above: ``zeros.index_add(0, graph, nodes)``. Shapes would read a multiple of N rows as
windows, sample after sample. But the index says which sample every row went to, and it lies on the autograd graph
between the calls above and below. A layer below such a pool is handed back, at each of its rows, the feedback of the
sample that the row went to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewire.nodes import Node, shape_of
from rewire.picks import Pick

C = TypeVar("C")

_POURS = ("IndexAddBackward", "ScatterAddBackward", "ScatterReduceBackward", "IndexReduceBackward", "IndexPutBackward")
_SCATTER = "MaskedScatterBackward"
_PICKS = ("IndexBackward", "IndexSelectBackward", "GatherBackward")


def pours_below(
    sources: Iterable[Node], call_at: Callable[[Node], C | None], sources_of: Callable[[C], Iterable[Node]]
) -> dict[C, Pick]:
    """The calls below ``sources`` whose rows were added up by index, with the row above that each of theirs went to.

    A call that is reached in other ways too (before and after a pool, through two of them) has no single row above for
    each of its own, and is left out, as is what rows were picked from by index in between.

    Args:
        call_at: the call whose output a node is.
        sources_of: graph nodes of its inputs.
    """
    found: dict[C, list[Pick | None]] = {}
    stack: list[tuple[Node, Pick | None]] = [(node, None) for node in sources]
    visited: set[tuple[Node, int]] = set()
    kept: list[Pick | None] = []  # an id is one pour's only as long as that lives
    while stack:
        node, pour = stack.pop()
        if (node, id(pour)) in visited:
            continue
        visited.add((node, id(pour)))
        kept.append(pour)
        call = call_at(node)
        if call is not None:
            if not any(_same(pour, other) for other in found.setdefault(call, [])):
                found[call].append(pour)
                stack += [(source, pour) for source in sources_of(call)]
            continue
        parents = [parent for parent, _ in node.next_functions]
        made = _made(node)
        if made is not None:
            poured = made if pour is None else made.of(pour)
            stack += [(parent, poured) for parent in parents[1:] if parent is not None]
            parents = parents[:1]
        elif node.name().startswith(_PICKS):
            pour = None
        stack += [(parent, pour) for parent in parents if parent is not None]
    return {call: pours[0] for call, pours in found.items() if len(pours) == 1 and pours[0] is not None}


def pours(node: Node) -> bool:
    """Whether a node is of an operation that adds up rows by index, or puts them at their places."""
    return node.name().startswith((*_POURS, _SCATTER))


class Placed(Pick):
    """Rows put at their places in a sequence of others, as those of an image among words.

    What lies at these places has no errors of its own, but is looked at from others.
    """


def _same(one: Pick | None, other: Pick | None) -> bool:
    return one is other or (one is not None and other is not None and one.same(other))


def _made(node: Any) -> Pick | None:
    """Where each row of what a node adds goes."""
    if not pours(node):
        return None
    name, shape = node.name(), shape_of(node)
    if name.startswith(_SCATTER):
        return _scattered(shape, node._saved_mask, node._saved_source_sym_sizes)
    if name.startswith("IndexPutBackward"):
        return _put(shape, node._saved_indices)
    if int(node._saved_dim) % 2**64 not in (0, -len(shape) % 2**64):
        return None
    index = node._saved_index
    if index.dtype is not torch.int64:
        return None
    if index.dim() > 1:  # scattered: the same place for all features of a row
        index = index.flatten(1)
        if not torch.equal(index, index[:, :1].expand_as(index)):
            return None
        index = index[:, 0]
    return Pick(shape[:1], index % shape[0]) if index.dim() == 1 else None


def _put(shape: tuple[int, ...], indices: Sequence[Tensor | None]) -> Pick | None:
    """The same for ``tensor[indices] = rows``, of a tensor of ``shape``."""
    places: list[Tensor] = []
    for index in indices:
        if index is None:
            return None
        places += index.nonzero().unbind(1) if index.dtype in (torch.bool, torch.uint8) else [index]
    if len(places) >= len(shape):  # numbers, and no rows
        return None
    flat = places[0] % shape[0]
    for size, index in zip(shape[1:], places[1:], strict=False):
        flat = flat * size + index % size  # negative ones count from the end
    return Pick(shape[: len(places)], flat.flatten())


def _scattered(shape: tuple[int, ...], mask: Tensor, source: Sequence[int]) -> Pick | None:
    """The same for ``tensor.masked_scatter(mask, rows)``: one after the other, to where the mask is true."""
    if len(shape) < 2 or not source or source[-1] != shape[-1]:
        return None
    first = mask.expand(shape)[..., :1]
    if mask.dim() == len(shape) and mask.stride(-1) and mask.shape[-1] > 1 and not bool((mask == first).all()):
        return None  # numbers, and no rows
    rows = first.flatten().nonzero()[:, 0]
    return Placed(shape[:-1], rows) if math.prod(source[:-1]) == len(rows) else None
