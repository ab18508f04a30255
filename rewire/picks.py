"""Rows taken from the batch by index, as a mixture of experts does with its tokens: whose error is theirs?

No shape tells. But the index is on the autograd graph, between the layer's input and the layers below it, and it is
looked for there while a layer is new; layers whose input is picked by index look in each call. Such a layer is fed
back as if it had seen the whole batch, and takes its own rows of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewire.nodes import Node, counted, place_before, shape_of

# The rows of a call's input, for the node of its output; raises KeyError for other nodes.
Known = Callable[[Node], "Pick | None"]


class Pick:
    """Rows picked from a larger tensor.

    Attributes:
        lead: the leading dimensions that were picked from.
        rows: int64 (k,), positions in them, flattened.
    """

    def __init__(self, lead: tuple[int, ...], rows: Tensor) -> None:
        self.lead = lead
        self.rows = rows

    def whole(self, shape: torch.Size) -> torch.Size:
        """The shape of what a tensor of ``shape`` was picked from."""
        return torch.Size((*self.lead, *shape[1:]))

    def __call__(self, whole: Tensor) -> Tensor:
        """The picked rows of ``whole``."""
        return whole.flatten(0, len(self.lead) - 1)[self.rows]

    def put(self, picked: Tensor) -> Tensor:
        """The inverse: ``picked`` at its place among zeros; rows that were picked twice add up."""
        whole = picked.new_zeros((math.prod(self.lead), *picked.shape[1:]))
        return whole.index_add(0, self.rows, picked).reshape(self.whole(picked.shape))

    def permutes(self) -> bool:
        """Whether each row was picked once."""
        count = math.prod(self.lead)
        return len(self.rows) == count == len(set(self.rows.tolist()))

    def times(self) -> int:
        """How often each row is there, all of them side by side and in their order; 0 if they lie in any other way."""
        count = math.prod(self.lead)
        if not count or len(self.rows) % count:
            return 0
        times = len(self.rows) // count
        order = torch.arange(count, device=self.rows.device)
        return times if torch.equal(self.rows, order.repeat_interleave(times)) else 0

    def same(self, other: Pick) -> bool:
        """Whether both are the same rows."""
        mine, theirs = math.prod(self.lead), math.prod(other.lead)
        return mine == theirs and (self.rows is other.rows or torch.equal(self.rows, other.rows))

    def of(self, below: Pick) -> Pick | None:
        """Rows of rows: these, picked from what ``below`` picked; None if they do not fit together."""
        fits = math.prod(self.lead) == len(below.rows)
        return type(below)(below.lead, below.rows[self.rows]) if fits else None


class Unclear(Exception):
    """Rows are picked in more than one way."""


def pick_of(x: Tensor, known: Known) -> Pick | None:
    """How the rows of ``x`` were picked from the outputs of the calls below, if they were.

    Raises:
        Unclear: if they were, in a way that cannot be followed.
    """
    found = _below(x.grad_fn, known, x.shape[0]) if x.grad_fn is not None and x.dim() else None
    if found is not None and len(found.rows) != x.shape[0]:
        raise Unclear
    return found


def _below(root: Node, known: Known, count: int) -> Pick | None:
    """The same for what a node gives, of ``count`` rows."""
    picks, whole = _all_below(root, known, count, count)
    if not picks:
        return None
    if whole or not all(pick.same(picks[0]) for pick in picks):
        raise Unclear
    return picks[0]


def _all_below(root: Node, known: Known, wanted: int, count: int, place: int = 0) -> tuple[list[Pick], bool]:
    """All ways in which rows reach dimension ``place`` (-1: nobody knows which) of what a node gives, ``count`` long.

    Args:
        wanted: how many rows it is in the end about.

    Returns:
        How rows were picked, and whether some that were not reach it too.
    """
    picks: list[Pick] = []
    whole = False
    visited: set[Node] = set()
    stack = [(root, place)]
    while stack:
        node, place = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        try:
            pick = known(node)
        except KeyError:
            pass
        else:
            whole |= pick is None
            picks += [] if pick is None else [pick]
            continue
        parents = node.next_functions
        made = _made(node, place, count)
        if made is not None and (picked_from := parents[0][0]) is not None:
            if _leads_to_call(picked_from, known):
                below, all_of_it = _all_below(picked_from, known, wanted, math.prod(made.lead), -1)
                picks += [made] if all_of_it or not below else []
                for lower in below:  # each by itself: tokens, each of them sorted k times, and their weights
                    both = made.of(lower)
                    if both is None:
                        raise Unclear
                    times = both.times()
                    if times == 1 or (times and len(both.rows) != wanted):
                        whole = True  # sorted, and back in order again; what is there k times is yet to be summed up
                    else:
                        picks.append(both)
            continue
        if node.name().startswith(_PUT):
            # Rows put in their places: those of what they are put into.
            whole = True
            continue
        before = place_before(node, place) if place >= 0 else -1
        for parent, at in parents:
            if parent is not None:
                stack.append((parent, before if _keeps_dimensions(node, parent, at) else -1))
    return picks, whole


def _keeps_dimensions(node: Any, parent: Any, at: int) -> bool:
    """Whether which dimension is which can be told from a node to one of its inputs."""
    if node.name().startswith(("Select", "Unsqueeze")):
        return True
    return len(shape_of(parent, at)) == len(shape_of(node))


_PUT = ("IndexAdd", "IndexPut", "IndexCopy", "Scatter", "MaskedScatter", "IndexReduce")


def _leads_to_call(root: Node, known: Known) -> bool:
    """Whether an activation was picked from, and not a table of the model's own."""
    visited: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        try:
            known(node)
        except KeyError:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        else:
            return True
    return False


def _made(node: Any, place: int, count: int) -> Pick | None:
    """The pick that a node makes, if it reorders or leaves out rows: in dimension ``place`` of its output."""
    name = node.name()
    if name == "IndexSelectBackward0":
        sizes = node._saved_self_sym_sizes
        pick = Pick((sizes[dim := counted(node._saved_dim, len(sizes))],), node._saved_index)
        if dim == max(place, 0) or (place < 0 and pick.lead == (count,) and pick.permutes()):
            return pick
        return None
    if name != "IndexBackward0":
        return None
    sizes = tuple(int(n) for n in node._saved_self_sym_sizes)
    indices = list(node._saved_indices)
    while indices and indices[0] is None and sizes[0] == 1:  # rows[None, index]
        indices, sizes = indices[1:], sizes[1:]
    if not indices or indices[0] is None or any(i is None for i in indices):
        return None
    if indices[0].dtype in (torch.bool, torch.uint8):
        indices = [*indices[0].nonzero().unbind(1), *indices[1:]]
    if len(indices) > 1 and len(indices) == len(sizes):
        indices = indices[:-1]  # a number of each row
    lead = sizes[: len(indices)]
    flat = torch.zeros((), dtype=torch.int64, device=indices[0].device)
    for size, index in zip(lead, indices, strict=True):
        flat = flat * size + index % size  # negative ones count from the end
    rows = flat.flatten()
    if (
        len(lead) == 2
        and len(rows) == lead[0]
        and torch.equal(rows // lead[1], torch.arange(lead[0], device=rows.device))
    ):
        return None  # one position of each sample: the batch is as it was
    return Pick(lead, rows)
