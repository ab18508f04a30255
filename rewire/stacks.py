"""Several batches in one, one behind the other, as siamese networks run them: ``encoder(torch.cat([a, b]))``.

2N rows for N errors could be two parts of each sample, side by side, or two batches. Shapes do not tell; but what takes
the batches apart again lies on the autograd graph, between the layer's output and the layers above: a ``chunk``, or
slices that together are all of it. It is looked for while layers are new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rewire.nodes import Node, counted, place_before, puts_behind, shape_of

Part = tuple[int, int]  # of how many equal parts of the rows which one
_NONE: Part = (0, 0)


def stacked_below(x: Tensor, is_call: Callable[[Node], bool]) -> dict[Node, int]:
    """The calls below of whose output ``x`` has every one of k equal parts, and nothing else, and that k."""
    if x.grad_fn is None:
        return {}
    found: dict[Node, set[Part | None]] = {}
    start: tuple[Node, int, Part | None, int] = (x.grad_fn, x.output_nr, None, 0)
    visited, stack = {start}, [start]
    while stack:
        node, number, part, rows = stack.pop()
        if is_call(node):
            found.setdefault(node, set()).add(part if rows == 0 else _NONE)
            continue
        taken = _taken(node, number)
        if taken is not None:
            part = taken if part is None else _NONE  # a part of a part is none of ours
        elif part is None and puts_behind(node):
            part = _NONE  # what lies behind one another again was not taken apart for good
        elif part is not None:
            rows = place_before(node, rows)
        for parent, place in node.next_functions:
            if parent is not None and (step := (parent, place, part, rows)) not in visited:
                visited.add(step)
                stack.append(step)
    stacks = {}
    for node, parts in found.items():
        count = len(parts)
        # Each row of x is made of one of every part.
        if count > 1 and parts == {(count, i) for i in range(count)} and shape_of(node)[:1] == (count * len(x),):
            stacks[node] = count
    return stacks


def _taken(node: Any, number: int) -> Part | None:
    """The part that output ``number`` of a node is of what it was made from, if it is one of several equal ones."""
    name = node.name()
    if name not in _TAKES:
        return None
    if name == "UnbindBackward0":
        return (len(node._input_metadata), number) if node._saved_dim == 0 else None
    sizes = node._saved_self_sym_sizes
    rows = int(sizes[0]) if sizes else 0
    if counted(node._saved_dim, len(sizes)) != 0 or not rows:
        return None
    if name == "SelectBackward0":
        return rows, int(node._saved_index) % rows
    if name == "SplitBackward0":
        first, size = number * int(node._saved_split_size), int(node._saved_split_size)
    elif name == "SplitWithSizesBackward0":
        each = [int(size) for size in node._saved_split_sizes]
        first, size = sum(each[:number]), each[number]
    else:
        first = min(int(node._saved_start) % 2**64, rows)
        size = min(int(node._saved_end) % 2**64, rows) - first
        if int(node._saved_step) != 1:
            return None
    return (rows // size, first // size) if size and rows % size == first % size == 0 else None


_TAKES = {"SplitBackward0", "SplitWithSizesBackward0", "SliceBackward0", "SelectBackward0", "UnbindBackward0"}
