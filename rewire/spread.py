"""Rows that meet every sample, as each of K texts is compared to each of N videos: whose error is theirs?

An output of shape (N, K, n) may be made of rows that have no batch dimension: K of them, made once and expanded over
the batch. An error for each of K rows looks like one for each of N samples where K is N. But where the batch went
lies on the autograd graph: below an ``expand``, or a sum with something that has a batch, the first dimension is what
was the second. A layer below is handed back the feedback of the mean error over the batch, row by row.

K rows put in front of each sample's own (a learned prompt) are expanded too, but no rows of the output are theirs: they
all are handed back the mean of the whole error, unless samples reach them in other ways as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from rewire.nodes import Node, counted, place_before, shape_of, views

C = TypeVar("C")
Dims = tuple[int, int]

# Which dimension of a tensor one of the output's is, if not a number from 0:
_UNKNOWN = -1
_GONE = -2  # there is none: the tensor was expanded along it
_PART = -3  # nor are there such rows: other rows were put beside these, some were taken, or the output has none

_SPREAD = (_GONE, 0)
_BROADCASTS = ("Add", "Sub", "Mul", "Div", "Expand")  # but no matrix product, Addmm
_MOVES = ("TBackward", "TransposeBackward", "PermuteBackward", "SelectBackward", "UnsqueezeBackward")
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Linear", "Convolution", "Scaled")
_MIXES = ("Index", "Gather", "Scatter", "Flip", "Roll", "Sort", "Topk", "Cum", "Take", "Embedding", "Repeat")


def mean_over_batch(e: Tensor) -> Tensor:
    """(N, K, n) -> (K, n)."""
    return e.mean(0)


def mean_over_all(e: Tensor) -> Tensor:
    """(N, ..., n) -> (1, n)."""
    return e.flatten(0, -2).mean(0, keepdim=True)


def spread_below(
    sources: Iterable[Node],
    shape: tuple[int, ...],
    call_at: Callable[[Node], C | None],
    sources_of: Callable[[C], Iterable[Node]],
) -> dict[C, Callable[[Tensor], Tensor]]:
    """The calls below ``sources`` whose rows are the second dimension of an output of ``shape``, (N, K, n), or no rows.

    A call that the batch reaches in other ways as well is left out. An output may also be (N, n).

    Args:
        call_at: the call whose output a node is.
        sources_of: graph nodes of its inputs.
    """
    found: dict[C, set[bool]] = {}
    met: dict[C, tuple[int, ...]] = {}  # all calls, by the shape of what they made
    ends: dict[_Edge, int] = {}  # where the batch ends, and what the output's rows are below
    # A node, an output of it, and which dimensions of that N and K are.
    stack: list[tuple[Any, int, Dims]] = []
    visited: set[tuple[Any, int, Dims]] = set()

    def step(node: Any, place: int, dims: Dims) -> None:
        if node is not None and (entry := (node, place, dims)) not in visited:
            visited.add(entry)
            stack.append(entry)

    sources, lead = [*sources], shape[:-1]
    for node in sources:
        at = (0, 1 if len(lead) > 1 else _PART)
        step(node, 0, at if shape_of(node)[: len(lead)] == lead else (_UNKNOWN, _UNKNOWN))
    while stack:
        node, place, dims = stack.pop()
        call = call_at(node)
        if call is not None:
            met.setdefault(call, shape_of(node, place))
            if dims == _SPREAD or dims[0] >= 0:
                found.setdefault(call, set()).add(dims == _SPREAD)
            for source in sources_of(call):
                alike = dims == _SPREAD or shape_of(source)[:-1] == shape_of(node, place)[:-1]
                step(source, 0, dims if alike else _through_anything(dims, shape_of(node, place), shape_of(source)))
            continue
        for number, (parent, at) in enumerate(node.next_functions):
            # What becomes of the rows further down is for shapes to say, as with any batch.
            below = dims if dims == _SPREAD else _below(node, place, dims, shape_of(parent, at))
            if dims[0] >= 0 and below[0] == _GONE:
                ends[node, number] = max(below[1], ends.get((node, number), below[1]))
            step(parent, at, below)
    of: dict[C, Callable[[Tensor], Tensor]] = {call: mean_over_batch for call, v in found.items() if v == {True}}
    if ends and shape[0] > 1:  # of one sample shapes show as much
        batched = _reached(sources, {edge for edge, rows in ends.items() if rows < 0}, call_at, sources_of)
        unclear = _UNKNOWN in ends.values()
        for call, made in met.items():
            if call not in batched and not _shown(made, lead, unclear):
                of[call] = mean_over_all
    return of


_Edge = tuple[Any, int]  # a node, and which of its inputs


def _reached(
    sources: Iterable[Node],
    ends: set[_Edge],
    call_at: Callable[[Node], C | None],
    sources_of: Callable[[C], Iterable[Node]],
) -> set[C]:
    """The calls below ``sources`` on some way that crosses none of ``ends``."""
    reached: set[C] = set()
    stack: list[Any] = [*sources]
    visited: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        call = call_at(node)
        if call is not None:
            reached.add(call)
            below = [*sources_of(call)]
        else:
            edges = enumerate(node.next_functions)
            below = [parent for i, (parent, _) in edges if parent is not None and (node, i) not in ends]
        new = [node for node in below if node not in visited]
        visited.update(new)
        stack += new
    return reached


def _shown(made: tuple[int, ...], lead: tuple[int, ...], unclear: bool) -> bool:
    """Whether shapes alone show what an output's errors are to a call without a batch, of (N, ...) or (T, N, ...).

    Args:
        made: the shape of its output.
        unclear: what was taken for the batch may be positions, and the call's rows the batch.
    """
    if len(made) < 2 or made[0] == 1:
        return not (len(made) == 3 and made[1] == lead[0])
    return unclear and len(lead) > 1 and made[0] % lead[1] == 0


def spreads(node: Any) -> bool:
    """Whether an operation makes more of an input's numbers: ``expand``, sums of unlike shapes; also a batch of one."""
    name, here = node.name(), shape_of(node)
    if not _broadcasts(name) and not name.startswith(("RepeatBackward", "UnsqueezeBackward")):
        return False
    return any(
        parent is not None and parent.next_functions and shape_of(parent, at) != here
        for parent, at in node.next_functions
    )


def _broadcasts(name: str) -> bool:
    return name.removesuffix("Backward0").removesuffix("Backward1") in _BROADCASTS


def _below(node: Any, place: int, dims: Dims, below: tuple[int, ...]) -> Dims:
    """The same dimensions in an input of a node, of shape ``below``."""
    name, here = node.name(), shape_of(node, place)
    batch, rows = dims
    if name.startswith(_MOVES):
        return _moved(node, batch), _moved(node, rows)
    if _broadcasts(name):
        return _expanded(batch, here, below), _expanded(rows, here, below)
    if name.startswith(("CatBackward", "SliceBackward")) and here != below:
        along = counted(node._saved_dim, len(here))
        return _UNKNOWN if batch == along else batch, _PART if rows == along else rows
    if name.startswith("RepeatBackward"):
        return _repeated(node, batch, here, below), _repeated(node, rows, here, below)
    if name.startswith(_MIXES):
        return min(batch, _UNKNOWN), min(rows, _UNKNOWN)
    if len(below) > len(here) > 0 and below[0] == below[1] and not views(node):
        return min(batch, _UNKNOWN), min(rows, _UNKNOWN)  # a sum, or what was taken out, along either dimension
    batch, rows = _through_anything(dims, here, below)
    return batch, min(rows, _UNKNOWN) if name.startswith(_PRODUCTS) else rows


def _moved(node: Any, dim: int) -> int:
    """A dimension before a transpose, or before another was added or taken."""
    if dim < 0:
        return dim
    before = place_before(node, dim)
    return _GONE if before == _UNKNOWN and node.name().startswith("Unsqueeze") else before


def _expanded(dim: int, here: tuple[int, ...], below: tuple[int, ...]) -> int:
    """A dimension in what was expanded, or broadcast, to the shape of ``here``."""
    new = len(here) - len(below)
    if dim < 0:
        return dim
    return _GONE if dim < new or below[dim - new] < here[dim] else dim - new


def _repeated(node: Any, dim: int, here: tuple[int, ...], below: tuple[int, ...]) -> int:
    """A dimension in what ``repeat`` was given: as for ``expand``, but there may be copies one behind the other."""
    old = dim - len(here) + len(below)
    several = dim >= 0 and old >= 0 and below[old] > 1 and int(node._saved_repeats[dim]) > 1
    return _UNKNOWN if several else _expanded(dim, here, below)


def _through_anything(dims: Dims, here: tuple[int, ...], below: tuple[int, ...]) -> Dims:
    """Dimensions are where they were if all in front of them are; as a reshape leaves them."""
    batch, rows = (d if d < 0 or here[: d + 1] == below[: d + 1] else _UNKNOWN for d in dims)
    return batch, rows
