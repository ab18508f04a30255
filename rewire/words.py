"""Options that hold several names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewire.errors import InputError

# A run of anything but spaces and commas; inside parentheses and quotes those belong to the word.
_WORD = re.compile(
    r"""(?: "[^"]*" | '[^']*' | \( (?: "[^"]*" | '[^']*' | [^()"'] | \([^()]*\) )* \) | [^\s,()"'] )+""", re.X
)


def words(options: Sequence[str]) -> list[str]:
    """The names in repeated options, each of which may hold several, apart by spaces or commas.

    A rule may have options of its own: ``"bp fitted(every=100, context=16)"`` is two words.

    Raises:
        InputError: a parenthesis or quote is not closed.
    """
    text = " ".join(options)
    rest = _WORD.sub("", text).replace(",", " ").strip()
    if rest:
        raise InputError(f"{text!r}: {rest.split()[0]!r} is not closed, or closes nothing")
    return _WORD.findall(text)


def pairs(option: str, example: str, items: Sequence[str]) -> dict[str, str]:
    """``PATTERN=RULE`` words as a dict; later ones win, and come last.

    Raises:
        InputError: something is no such pair. ``option`` names where it stood, ``example`` shows one.
    """
    found: dict[str, str] = {}
    for item in words(items):
        pattern, equals, rule = item.partition("=")
        if not equals or not pattern or not rule:
            raise InputError(f"{option} takes PATTERN=RULE, such as {example!r}, not {item!r}")
        found.pop(pattern, None)
        found[pattern] = rule
    return found
