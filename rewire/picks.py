"""Rows taken from the batch by index, as a mixture of experts does with its tokens: whose error is theirs?

No shape tells. But the index is on the autograd graph, between the layer's input and the layers below it, and it is
looked for there while a layer is new; layers whose input is picked by index look in each call. Such a layer is fed
back as if it had seen the whole batch, and takes its own rows of that.

Inside a block under activation checkpointing the index is out of sight until the backward has run the block again. Then
the forward notes that rows may have been picked, and the backward looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rewire.kept import Hidden, given, kept
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

    def found(self) -> Pick | None:
        """What the backward knows of it: itself, if the forward knew which rows."""
        return self

    def above(self) -> Pick | None:
        """What calls above are to know of it."""
        return self


class Later(Pick):
    """Rows that may have been picked: which, the backward will know, and nothing else than that may be asked for.

    Args:
        ask: tells, in the backward, which rows were picked; or None.
        below: what ``ask`` will ask in turn.
        whole: it will find none, or that it is not clear: all rows are there too.
    """

    def __init__(self, ask: Callable[[], Pick | None], below: Iterable[Later] = (), whole: bool = False) -> None:
        self._whole = whole
        self._ask: Callable[[], Pick | None] | None = ask
        self._below: Iterable[Later] = below
        self._found: Pick | None = None

    def above(self) -> Pick | None:
        """None, if that is what it will be."""
        return None if self._whole else self

    def found(self) -> Pick | None:
        """Which rows were picked. Checkpointed blocks in which that was done run again, if they have not yet."""
        stack = [self]
        while stack:  # from the lowest up: each asking the next below would be as deep as the model
            one = stack[-1]
            waits = [later for later in one._below if later._ask is not None]
            if waits:
                stack += waits
                continue
            stack.pop()
            if one._ask is not None:
                one._found = one._ask()
                one._ask, one._below = None, ()  # and the graph that it would look at
        return self._found


class Unclear(Exception):
    """Rows are picked in more than one way."""


def pick_of(x: Tensor, known: Known) -> Pick | None:
    """How the rows of ``x`` were picked from the outputs of the calls below, if they were.

    Raises:
        Unclear: if they were, in a way that cannot be followed.
        Hidden: if that cannot be told before the backward, by :func:`pick_below`; with what calls below do not know.
    """
    return pick_below(x.grad_fn, x.shape[0], known, look=False) if x.grad_fn is not None and x.dim() else None


def pick_below(root: Node, count: int, known: Known, look: bool) -> Pick | None:
    """The same for what a node gives, of ``count`` rows.

    Args:
        look: in the backward, or after the forward: look at what activation checkpointing hides.

    Raises:
        Unclear: as for that.
        Hidden: as for that.
    """
    picks, whole, hidden = _all_below(root, _settled(known, look), look, count, count)
    if hidden is not None:
        hidden.whole = whole
        raise hidden
    if not picks:
        return None
    if whole or not all(pick.same(picks[0]) for pick in picks) or len(picks[0].rows) != count:
        raise Unclear
    return picks[0]


def _settled(known: Known, look: bool) -> Known:
    """``known``, where the backward has to tell: only in the backward."""

    def settled(node: Node) -> Pick | None:
        pick = known(node)
        if not isinstance(pick, Later):
            return pick
        if not look:
            raise Hidden(pick)
        return pick.found()

    return settled


def _all_below(
    root: Node, known: Known, look: bool, wanted: int, count: int, place: int = 0
) -> tuple[list[Pick], bool, Hidden | None]:
    """All ways in which rows reach dimension ``place`` (-1: nobody knows which) of what a node gives, ``count`` long.

    Args:
        wanted: how many rows it is in the end about.

    Returns:
        How rows were picked, whether some that were not reach it too, and whether more may have been.
    """
    picks: list[Pick] = []
    hidden: list[Hidden] = []
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
        except Hidden as later:
            hidden.append(later)
            continue
        else:
            whole |= pick is None
            picks += [] if pick is None else [pick]
            continue
        parents = node.next_functions
        try:
            made = _made(node, place, count, look)
        except Hidden as later:
            # From a table of the model's own it does not matter which rows.
            if parents[0][0] is not None and _leads_to_call(parents[0][0], known):
                hidden.append(later)
            continue
        if made is not None and (picked_from := parents[0][0]) is not None:
            if _leads_to_call(picked_from, known):
                below, all_of_it, more = _all_below(picked_from, known, look, wanted, math.prod(made.lead), -1)
                hidden += [] if more is None else [more]
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
    return picks, whole, Hidden(*(later for one in hidden for later in one.args)) if hidden else None


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
        except Hidden:
            return True
        except KeyError:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        else:
            return True
    return False


def _made(node: Any, place: int, count: int, look: bool) -> Pick | None:
    """The pick that a node makes, if it reorders or leaves out rows: in dimension ``place`` of its output."""
    name = node.name()
    if name == "IndexSelectBackward0":
        sizes = node._saved_self_sym_sizes
        dim = counted(node._saved_dim, len(sizes))
        here = dim == max(place, 0)
        if not here and (place >= 0 or sizes[dim] != count):
            return None
        pick = Pick((sizes[dim],), kept(node, "index", look))
        return pick if here or pick.permutes() else None
    if name != "IndexBackward0":
        return None
    sizes = tuple(int(n) for n in node._saved_self_sym_sizes)
    there = given(node, "indices")
    while there and not there[0] and sizes[0] == 1:  # rows[None, index]
        there, sizes = there[1:], sizes[1:]
    if not there or not all(there):
        return None
    indices = list(kept(node, "indices", look))[-len(there) :]
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
