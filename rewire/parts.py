"""Rows of an error that were made one after the other: samples in a loop, groups of them, steps of a sequence.

``torch.stack([self.pool(bag) for bag in bags])``, ``torch.cat([self.encoder(crops) for crops in groups])``: each call
below has rows of its own, in any number, and feeds only some rows of e. No shape tells which; but where they are put
behind one another, a ``stack`` or ``cat`` on the first dimension, lies on the autograd graph between the calls above
and below. Everything below it is handed back the feedback of those rows of e alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewire.stacks import place_before, puts_behind

Node = torch.autograd.graph.Node
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
        stack.append((node, 0, (0, count), _rows(node, 0) == count))
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
            here = aligned and parent is not None and (_views(node) or _alike(node, place, parent, at))
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
    first, last = rows
    if node.name().startswith("Stack"):
        sizes: list[int | None] = [1] * len(parents)
    else:
        sizes = [None if parent is None else _rows(parent, at) for parent, at in parents]
        if sizes.count(None) == 1:  # one without a gradient: whatever is left
            rest = _rows(node, 0) - sum(size for size in sizes if size is not None)
            sizes = [rest if size is None else size for size in sizes]
    if None in sizes:
        return [None] * len(parents)
    total = sum(size for size in sizes if size is not None)
    if total == 0 or total != (len(parents) if node.name().startswith("Stack") else _rows(node, 0)):
        return [None] * len(parents)
    out: list[Rows | None] = []
    begin = 0
    for size in sizes:
        end = begin + (size or 0)
        ends = (last - first) * begin, (last - first) * end
        out.append(None if ends[0] % total or ends[1] % total else (first + ends[0] // total, first + ends[1] // total))
        begin = end
    return out


def _rows(node: Any, place: int) -> int:
    """The first dimension of output ``place`` of what a node belongs to; 0 if there is none on the graph."""
    shape = _shape(node, place)
    return int(shape[0]) if shape else 0


def _shape(node: Any, place: int) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[place].shape) if place < len(metadata) else ()


def _alike(node: Any, place: int, parent: Any, at: int) -> bool:
    """Whether a node's input has as many dimensions as its output, and as many rows."""
    ours, theirs = _shape(node, place), _shape(parent, at)
    return len(ours) == len(theirs) and ours[:1] == theirs[:1]


def _views(node: Any) -> bool:
    """Whether a node's input has the same numbers in the same order."""
    return "View" in node.name() or node.name().startswith(("Reshape", "Squeeze", "Unsqueeze"))
