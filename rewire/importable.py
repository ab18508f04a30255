"""Functions by name: ``"package.module:function"``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rewire.errors import ConversionError


def name_of(function: Callable[..., Any]) -> str:
    """``"module:qualified.name"``, from which :func:`find` gets the very same function.

    Raises:
        ConversionError: for lambdas, functions inside functions, partials and other objects without such a name.
    """
    places = [(getattr(function, "__module__", None), getattr(function, "__qualname__", None))]
    places.append(("torch", getattr(function, "__name__", None)))  # what is written in C does not say where it is
    for module, qualified in places:
        if isinstance(module, str) and isinstance(qualified, str):
            name = f"{module}:{qualified}"
            with suppress(ConversionError):
                if find(name) is function:
                    return name
    raise ConversionError(
        f"{function!r} has no name that it could be imported by in another process (lambdas, functions made inside "
        "functions and partials have none): define it with def at the top of a module"
    )


def find(name: str) -> Callable[..., Any]:
    """The function :func:`name_of` named. Imports its module.

    Raises:
        ConversionError: if there is none.
    """
    module, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as problem:
        raise ConversionError(f"no function {name!r} can be imported here: {problem}") from None
    if not callable(found):
        raise ConversionError(f"{name!r} is no function but {type(found).__name__}")
    function: Callable[..., Any] = found
    return function
