"""Tensors that graph nodes keep for the backward, as an index: read without disturbing activation checkpointing.

What an operation saves inside a checkpointed block is thrown away, and asking the node for it runs the block again: in
the middle of its own forward, or a second time in the backward, where each may be asked for once only. So such a tensor
is not asked for in the forward. In the backward, which runs the block again in any case, it is looked at without being
taken away from the node that will ask for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewire.nodes import Node

_CHECKPOINT = "torch.utils.checkpoint"
_HANDLES = "handles"  # what checkpointing gives for a tensor has there whether this was asked for, by backward pass


class Hidden(Exception):
    """What a node keeps cannot be looked at: not now, as activation checkpointing has it.

    Attributes:
        whole: what it is about rows is known all the same: they are all there, beside any that were picked.
    """

    whole = False


def kept(node: Node, name: str, look: bool) -> Any:
    """What ``node`` keeps under ``name``: a tensor, or a list of tensors and None.

    Args:
        look: in the backward, or after the forward: run checkpointed blocks again to see it.

    Raises:
        Hidden: if it is in the hands of activation checkpointing.
    """
    found = Kept(node, name)
    if not found.hidden:
        return getattr(node, f"_saved_{name}")
    if not look:
        raise Hidden
    return found.seen()


class Kept:
    """The same to be looked at later, whether or not the node is still there.

    Attributes:
        hidden: it is in the hands of activation checkpointing.
    """

    def __init__(self, node: Node, name: str) -> None:
        raw = getattr(node, f"_raw_saved_{name}")
        self._several = isinstance(raw, (tuple, list))
        self._packed = [(one.data, one.unpack_hook) for one in (raw if self._several else (raw,))]
        self.hidden = any(_checkpointed(*packed) for packed in self._packed)

    def seen(self) -> Any:
        """What it is, and it stays where it is; to be asked before the node itself has run."""
        found = [_seen(*packed) for packed in self._packed]
        return found if self._several else found[0]


def given(node: Node, name: str) -> list[bool]:
    """Which of the tensors that a node keeps in a list there are: those that are None are seen in any case."""
    return [one.unpack_hook is not None or one.data is not None for one in getattr(node, f"_raw_saved_{name}")]


def _checkpointed(data: Any, unpack: Any) -> bool:
    """Whether it was given to activation checkpointing; what a block keeps that is run again is at hand."""
    return getattr(unpack, "__module__", "") == _CHECKPOINT and not isinstance(data, Tensor)


def _seen(data: Any, unpack: Any) -> Any:
    if not _checkpointed(data, unpack):
        return data if unpack is None else unpack(data)
    if not hasattr(data, _HANDLES):  # PyTorch does not promise any of this
        raise Hidden
    return unpack(_Look(data))


class _Look:
    """Stands for what checkpointing gave for a tensor, which notes there that this was asked for: in a copy."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder

    @property
    def handles(self) -> dict[Any, Any]:
        """Where the tensor is, by backward pass."""
        return dict(self.holder.handles)
