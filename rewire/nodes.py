"""What the nodes of the autograd graph tell of the tensors that they were made for: shapes, and where dimensions went.

None of it is promised by PyTorch. What is not there, or under another name, reads as "nobody knows".
"""

from __future__ import annotations

from typing import Any

import torch

Node = torch.autograd.graph.Node


def shape_of(node: Any, place: int = 0) -> tuple[int, ...]:
    """The shape of output ``place`` of the operation that a node belongs to; () for leaves, which have none there."""
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[place].shape) if place < len(metadata) else ()


def rows_of(node: Any, place: int = 0) -> int:
    """The first dimension of the same; 0 if there is none."""
    return int(next(iter(shape_of(node, place)), 0))


def counted(dim: int, dims: int) -> int:
    """A dimension as a node has it, from the front. Those counted from the back are unsigned there."""
    return int(dim) - 2**64 + dims if int(dim) >= 2**63 else int(dim)


def puts_behind(node: Any) -> bool:
    """Whether an operation's inputs lie one behind the other in its output."""
    if not node.name().startswith(("CatBackward", "StackBackward")):
        return False
    return counted(node._saved_dim, len(shape_of(node))) == 0


def views(node: Any) -> bool:
    """Whether an operation's input has the same numbers in the same order."""
    return "View" in node.name() or node.name().startswith(("Reshape", "Squeeze", "Unsqueeze"))


def place_before(node: Any, place: int) -> int:
    """Which dimension of an operation's input is dimension ``place`` of its output; -1 if nobody knows."""
    name, dims = node.name(), len(shape_of(node))
    if name.startswith("TBackward"):
        return 1 - place
    if name.startswith("TransposeBackward"):
        one, other = counted(node._saved_dim0, dims), counted(node._saved_dim1, dims)
        return {one: other, other: one}.get(place, place)
    if name.startswith("PermuteBackward"):
        return counted(node._saved_dims[place], dims) if place >= 0 else -1
    if name.startswith("SelectBackward"):
        return place + (counted(node._saved_dim, dims + 1) <= place)
    if name.startswith("UnsqueezeBackward"):
        added = counted(node._saved_dim, dims)
        return -1 if place == added else place - (added < place)
    return -1 if place != 0 and "View" in name else place
