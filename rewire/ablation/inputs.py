"""Checking what a user asked for: one clear line, with the nearest right spelling."""

from __future__ import annotations

from collections.abc import Iterable

from rewire.errors import InputError, nearest

__all__ = ["InputError", "one_of", "positive"]


def one_of(kind: str, word: str, choices: Iterable[str]) -> str:
    """``word`` if it is one of ``choices``; otherwise an :class:`InputError` that lists them."""
    names = list(choices)
    if word in names:
        return word
    raise InputError(f"unknown {kind} {word!r}{nearest(word.lower(), names)}; known are {', '.join(names)}")


def positive(kind: str, number: float, *, zero: bool = False) -> None:
    """Raise :class:`InputError` unless ``number`` is finite and above zero (or zero, where allowed)."""
    # Written so that nan, which compares false with everything, is refused too.
    if not (0 < number < float("inf") or (zero and number == 0)):
        raise InputError(f"{kind} must be {'zero or more' if zero else 'above zero'}, got {number:g}")
