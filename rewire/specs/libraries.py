"""Importing what need not be installed, with one line for whoever lacks it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rewire.errors import InputError


def library(name: str) -> Any:
    """The module ``name``.

    Raises:
        InputError: if it is missing, or made for another build of torch.
    """
    with imports(name):
        return importlib.import_module(name)


@contextmanager
def imports(name: str) -> Iterator[None]:
    """Failing imports inside become an :class:`InputError` (libraries import parts of themselves when used)."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        built = next((c for c in causes if isinstance(c, RuntimeError) and "operator torchvision::" in str(c)), None)
        if built is not None:
            raise InputError(
                f"{name} cannot be used: {built}. The installed torchvision was made for another build of torch; "
                "install the two from the same index"
            ) from error
        missing = next((c for c in reversed(causes) if isinstance(c, ImportError)), None)
        if missing is None:
            raise
        wanted = missing.name or name
        raise InputError(f"{name} cannot be imported ({missing}): pip install {wanted}") from error
