"""Options that hold several names."""

from __future__ import annotations

from collections.abc import Sequence


def words(options: Sequence[str]) -> list[str]:
    """The names in repeated options, each of which may hold several, apart by spaces or commas.

    What stands in brackets is a name's own: ``"dfa fitted(every=20, context=8)"`` is two.
    """
    depth, apart = 0, ""
    for sign in " ".join(options):
        depth += (sign == "(") - (sign == ")")
        apart += "\n" if sign in ", \t\n" and depth <= 0 else sign
    return [word for word in apart.split("\n") if word]
