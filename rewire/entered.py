"""A context manager that says so if it was never entered: without ``with`` it would do nothing, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from types import TracebackType
from typing import Generic, TypeVar

from rewire.errors import RewireWarning

T = TypeVar("T")


class Entered(AbstractContextManager[T], ContextDecorator, Generic[T]):
    """Enters what ``make`` makes, anew each time.

    Args:
        make: makes a context manager.
        written: how the call is written, for the warning.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]], written: str) -> None:
        self._make = make
        self._written = written
        self._inside: list[AbstractContextManager[T]] = []
        self._was_entered = False

    def __enter__(self) -> T:
        self._was_entered = True
        manager = self._make()
        entered = manager.__enter__()
        self._inside.append(manager)
        return entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._inside.pop().__exit__(kind, error, trace)

    def __del__(self) -> None:
        if not self._was_entered:
            warnings.warn(
                f"{self._written} was not entered and does nothing: write `with {self._written}:` around the forward",
                RewireWarning,
                stacklevel=2,
            )
