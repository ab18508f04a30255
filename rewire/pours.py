"""Rows added up by index, as a graph network pools its nodes into graphs: whose error is theirs?

Many rows below become few above: ``zeros.index_add(0, graph, nodes)``. Shapes would read a multiple of N rows as
windows, sample after sample. But the index says which sample every row went to, and it lies on the autograd graph
between the calls above and below. A layer below such a pool is handed back, at each of its rows, the feedback of the
sample that the row went to.

Inside a block under activation checkpointing the index is not there before the backward has run the block again: it is
looked at then, just before the operation's own node runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewire.kept import Hidden, Kept, given
from rewire.nodes import Node, shape_of
from rewire.passes import backward_id
from rewire.picks import Later, Pick

C = TypeVar("C")

_POURS = ("IndexAddBackward", "ScatterAddBackward", "ScatterReduceBackward", "IndexReduceBackward", "IndexPutBackward")
_SCATTER = "MaskedScatterBackward"
_PICKS = ("IndexBackward", "IndexSelectBackward", "GatherBackward")
_POUR = "rewire.pour"  # where one that is looked at later lies in the metadata of its node
_WAYS = 8  # of which nobody knows yet whether they are one, followed below a call


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
            ways = found.setdefault(call, [])
            if len(ways) >= _WAYS and isinstance(pour, Later):
                pour = None  # too many to keep apart: through any number of pools, and so left out
            if not any(_same(pour, other) for other in ways):
                ways.append(pour)
                stack += [(source, pour) for source in sources_of(call)]
            continue
        parents = [parent for parent, _ in node.next_functions]
        made = _made(node)
        if made is not None:
            poured = _after(made, pour)
            stack += [(parent, poured) for parent in parents[1:] if parent is not None]
            parents = parents[:1]
        elif node.name().startswith(_PICKS):
            pour = None
        stack += [(parent, pour) for parent in parents if parent is not None]
    only = {call: _only(ways) for call, ways in found.items()}
    return {call: pour for call, pour in only.items() if pour is not None}


def _after(made: Pick, pour: Pick | None) -> Pick | None:
    """Where rows go that are first added up as ``made`` says, and then as ``pour`` does."""
    if isinstance(made, Later) or isinstance(pour, Later):
        return Later(partial(_after_found, made, pour))
    return made if pour is None else made.of(pour)


def _after_found(made: Pick, pour: Pick | None) -> Pick | None:
    first, then = made.found(), None if pour is None else pour.found()
    return then if first is None else _after(first, then)


def _only(ways: list[Pick | None]) -> Pick | None:
    """The one way in which a call's rows go; None if there are several, or rows are not added up in all of them."""
    if None in ways:
        return None
    if len(ways) > 1 and any(isinstance(way, Later) for way in ways):
        return Later(partial(_only_found, ways))
    return ways[0] if len(ways) == 1 else None


def _only_found(ways: list[Pick | None]) -> Pick | None:
    found = [None if way is None else way.found() for way in ways]
    return found[0] if all(_same(way, found[0]) for way in found[1:]) else None


def pours(node: Node) -> bool:
    """Whether a node is of an operation that adds up rows by index, or puts them at their places."""
    return node.name().startswith((*_POURS, _SCATTER))


class Placed(Pick):
    """Rows put at their places in a sequence of others, as those of an image among words.

    What lies at these places has no errors of its own, but is looked at from others.
    """


def _same(one: Pick | None, other: Pick | None) -> bool:
    if one is None or other is None or isinstance(one, Later) or isinstance(other, Later):
        return one is other
    return one.same(other)


def _made(node: Any) -> Pick | None:
    """Where each row of what a node adds goes."""
    if not pours(node):
        return None
    name, shape = node.name(), shape_of(node)
    place: Callable[[Any], Pick | None]
    if name.startswith(_SCATTER):
        what, place = "mask", partial(_scattered, shape, source=node._saved_source_sym_sizes)
    elif name.startswith("IndexPutBackward"):
        what, place = "indices", partial(_put, shape)
        if not all(given(node, what)):
            return None
    else:
        what, place = "index", partial(_added, shape)
        if int(node._saved_dim) % 2**64 not in (0, -len(shape) % 2**64):
            return None
    kept = Kept(node, what)
    return _later(node, kept, place) if kept.hidden else place(getattr(node, f"_saved_{what}"))


def _later(node: Any, kept: Kept, place: Callable[[Any], Pick | None]) -> Pick:
    """The same once the backward is there: at the latest when the node runs, which keeps it no longer."""
    later: Later | None = node.metadata.get(_POUR)
    if later is None:
        later = node.metadata[_POUR] = Later(lambda: place(kept.seen()))
        if backward_id() == -1:  # a block that is run again has no backward of its own
            node.register_prehook(partial(_runs, later))
    return later


def _runs(later: Later, _: Any) -> None:
    with suppress(Hidden):  # who asks for it says so
        later.found()


def _added(shape: tuple[int, ...], index: Tensor) -> Pick | None:
    """The same for ``tensor.index_add(0, index, rows)`` and relatives, of a tensor of ``shape``."""
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
