"""Rows of an error that were made one after the other: samples in a loop, groups of them, steps of a sequence.

``torch.stack([self.pool(bag) for bag in bags])``, ``torch.cat([self.encoder(crops) for crops in groups])``: each call
below has rows of its own, in any number, and feeds only some rows of e. No shape tells which; but where they are put
behind one another, a ``stack`` or ``cat`` on the first dimension, lies on the autograd graph between the calls above
and below. Everything below it is handed back the feedback of those rows of e alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewire.nodes import Node, place_before, puts_behind, rows_of, shape_of, views

Rows = tuple[int, int]  # from, to
C = TypeVar("C")

# What may put rows in another place, or make each of many.
_MIXES = ("Index", "Gather", "Scatter", "Flip", "Roll", "Sort", "Topk", "Cum", "Take", "Embedding", "Repeat", "Expand")


class Parts:
    """Some rows of an error; the mean over several parts of it for what feeds several, as over the steps of a sequence.

    Attributes:
        rows: where each part begins, and where it ends. All are of one length.
    """

    def __init__(self, rows: list[Rows]) -> None:
        self.rows = rows

    def __call__(self, whole: Tensor) -> Tensor:
        """(N, ...) -> (length of a part, ...)."""
        parts = [whole[first:last] for first, last in self.rows]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def parts_below(
    sources: Iterable[Node], count: int, call_at: Callable[[Node], C | None], sources_of: Callable[[C], Iterable[Node]]
) -> dict[C, Parts]:
    """The calls below ``sources`` that feed only some of the ``count`` rows there: which.

    What feeds all rows in one piece as well, or parts of different lengths, is left out.

    Args:
        call_at: the call whose output a node is.
        sources_of: graph nodes of its inputs.
    """
    found: dict[C, set[Rows]] = {}
    # A node, an output of it, the rows that it feeds, and whether its first dimension is these rows, in their order.
    stack: list[tuple[Any, int, Rows, bool]] = []
    for node in sources:
        stack.append((node, 0, (0, count), rows_of(node, 0) == count))
    visited = set(stack)

    def step(node: Any, place: int, rows: Rows, aligned: bool) -> None:
        if node is not None and (entry := (node, place, rows, aligned)) not in visited:
            visited.add(entry)
            stack.append(entry)

    while stack:
        node, place, rows, aligned = stack.pop()
        call = call_at(node)
        if call is not None:
            found.setdefault(call, set()).add(rows)
            for source in sources_of(call):
                step(source, 0, rows, aligned and _alike(node, place, source, 0))
            continue
        parents = node.next_functions
        if aligned and puts_behind(node):
            for (parent, at), part in zip(parents, _divided(node, rows), strict=True):
                step(parent, at, part or rows, part is not None)
            continue
        aligned = aligned and place_before(node, 0) == 0 and not any(word in node.name() for word in _MIXES)
        for number, (parent, at) in enumerate(parents):
            here = aligned and parent is not None and (views(node) or _alike(node, place, parent, at))
            # The other factor of a product has no rows of the result.
            here = here and not (node.name().startswith(("Mm", "Addmm")) and number == len(parents) - 1)
            step(parent, at, rows, here)
    return {
        call: Parts(sorted(parts))
        for call, parts in found.items()
        if (0, count) not in parts and len({last - first for first, last in parts}) == 1
    }


def _divided(node: Any, rows: Rows) -> list[Rows | None]:
    """The rows that each input of a ``stack`` or ``cat`` feeds; None where that is not known."""
    parents = node.next_functions
    stacked = node.name().startswith("Stack")
    total = len(parents) if stacked else rows_of(node)
    sizes = [1 if stacked else rows_of(parent, at) for parent, at in parents]
    if sizes.count(0) == 1:  # one without a gradient: whatever is left
        sizes[sizes.index(0)] = total - sum(sizes)
    if min(sizes) < 1 or sum(sizes) != total:
        return [None] * len(parents)
    first, last = rows
    ends = [(last - first) * end for end in accumulate(sizes, initial=0)]
    return [
        None if begin % total or end % total else (first + begin // total, first + end // total)
        for begin, end in pairwise(ends)
    ]


def _alike(node: Any, place: int, parent: Any, at: int) -> bool:
    """Whether a node's input has as many dimensions as its output, and as many rows."""
    ours, theirs = shape_of(node, place), shape_of(parent, at)
    return len(ours) == len(theirs) and ours[:1] == theirs[:1]
