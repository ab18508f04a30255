"""The targets of the pass under way, for rules that project them instead of the output error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from rewire.errors import ConversionError

# A context variable: each thread (and each async task) has its own, so two trainings never mix.
_current: ContextVar[Tensor | None] = ContextVar("rewire_targets", default=None)


@contextmanager
def targets(y: Tensor) -> Iterator[None]:
    """Give the targets of the forward passes inside the block to rules that need them (``drtp``).

    Args:
        y: class indices, int64, of the output's shape without its class dimension (a negative index,
            such as the usual ``ignore_index=-100``, means "no target"), or targets of the output's own
            shape and any floating dtype, such as one-hot rows.

    Only the forward has to be inside the block; the backward may run after it.

    Example:
        >>> with rewire.targets(y):
        ...     loss = loss_fn(model(x), y)
        >>> loss.backward()
    """
    if not isinstance(y, Tensor):
        raise ConversionError(f"targets needs a tensor, not {type(y).__name__}")
    token = _current.set(y)
    try:
        yield
    finally:
        _current.reset(token)


# () -> the innermost :func:`targets` of this thread, or None outside of any.
current_targets: Callable[[], Tensor | None] = _current.get
