"""Rows that meet every sample, as each of K texts is compared to each of N videos: whose error is theirs?

An output of shape (N, K, n) may be made of rows that have no batch dimension: K of them, made once and expanded over
the batch. An error for each of K rows looks like one for each of N samples where K is N. But where the batch went
lies on the autograd graph: below an ``expand``, or a sum with something that has a batch, the first dimension is what
was the second. A layer below is handed back the feedback of the mean error over the batch, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from rewire.nodes import Node, place_before, shape_of

C = TypeVar("C")
Dims = tuple[int, int]

# Which dimension of a tensor one of the output's is, if not a number from 0:
_UNKNOWN = -1
_GONE = -2  # there is none: the tensor was expanded along it

_SPREAD = (_GONE, 0)
_BROADCASTS = ("Add", "Sub", "Mul", "Div", "Expand")  # but no matrix product, Addmm
_MOVES = ("TBackward", "TransposeBackward", "PermuteBackward", "SelectBackward", "UnsqueezeBackward")
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Linear", "Convolution", "Scaled")
_MIXES = ("Index", "Gather", "Scatter", "Flip", "Roll", "Sort", "Topk", "Cum", "Take", "Embedding", "Repeat", "Cat")


def mean_over_batch(e: Tensor) -> Tensor:
    """(N, K, n) -> (K, n)."""
    return e.mean(0)


def spread_below(
    sources: Iterable[Node],
    shape: tuple[int, ...],
    call_at: Callable[[Node], C | None],
    sources_of: Callable[[C], Iterable[Node]],
) -> dict[C, Callable[[Tensor], Tensor]]:
    """The calls below ``sources`` whose rows are the second dimension of an output of ``shape``, (N, K, n).

    A call that the batch reaches in other ways as well is left out.

    Args:
        call_at: the call whose output a node is.
        sources_of: graph nodes of its inputs.
    """
    found: dict[C, set[bool]] = {}
    # A node, an output of it, and which dimensions of that N and K are.
    stack: list[tuple[Any, int, Dims]] = []
    visited: set[tuple[Any, int, Dims]] = set()

    def step(node: Any, place: int, dims: Dims) -> None:
        if node is not None and (entry := (node, place, dims)) not in visited:
            visited.add(entry)
            stack.append(entry)

    for node in sources:
        step(node, 0, (0, 1) if shape_of(node)[:2] == shape[:2] else (_UNKNOWN, _UNKNOWN))
    while stack:
        node, place, dims = stack.pop()
        call = call_at(node)
        if call is not None:
            if dims == _SPREAD or dims[0] >= 0:
                found.setdefault(call, set()).add(dims == _SPREAD)
            for source in sources_of(call):
                alike = dims == _SPREAD or shape_of(source)[:-1] == shape_of(node, place)[:-1]
                step(source, 0, dims if alike else _through_anything(dims, shape_of(node, place), shape_of(source)))
            continue
        for parent, at in node.next_functions:
            # What becomes of the rows further down is for shapes to say, as with any batch.
            step(parent, at, dims if dims == _SPREAD else _below(node, place, dims, shape_of(parent, at)))
    return {call: mean_over_batch for call, votes in found.items() if votes == {True}}


def _below(node: Any, place: int, dims: Dims, below: tuple[int, ...]) -> Dims:
    """The same dimensions in an input of a node, of shape ``below``."""
    name, here = node.name(), shape_of(node, place)
    batch, rows = dims
    if name.startswith(_MOVES):
        return _moved(node, batch), _moved(node, rows)
    if name.removesuffix("Backward0").removesuffix("Backward1") in _BROADCASTS:
        return _expanded(batch, here, below), _expanded(rows, here, below)
    if name.startswith(_MIXES):
        return min(batch, _UNKNOWN), min(rows, _UNKNOWN)
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


def _through_anything(dims: Dims, here: tuple[int, ...], below: tuple[int, ...]) -> Dims:
    """Dimensions are where they were if all in front of them are; as a reshape leaves them."""
    batch, rows = (d if d < 0 or here[: d + 1] == below[: d + 1] else _UNKNOWN for d in dims)
    return batch, rows
