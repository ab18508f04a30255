"""What can go wrong, each with a message that says what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RewireError(Exception):
    """Base of every error this library raises on purpose."""


class ConversionError(RewireError, ValueError):
    """An argument that cannot be used. Raised before anything about the model was changed."""


class RoutingError(RewireError, RuntimeError):
    """The output error has no defined way to a layer's input: the shapes do not fit."""


class PassError(RewireError, RuntimeError):
    """Something about a forward or backward pass keeps a rule from being applied."""


class InputError(RewireError, ValueError):
    """Something asked for on the command line or by name does not exist or cannot be."""


class RewireWarning(UserWarning):
    """Said once by name: something keeps backprop, or did not run, or could not be measured."""


def nearest(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'conv1'?"`` for the closest of ``options``, or the empty string. Case does not count."""
    by_lower: dict[str, str] = {}
    for option in options:
        by_lower.setdefault(option.lower(), option)
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def some(items: Sequence[str], most: int) -> str:
    """The first of several, for messages, and how many there are besides."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
