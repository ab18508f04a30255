"""Options that hold several names."""

from __future__ import annotations

from collections.abc import Sequence


def words(options: Sequence[str]) -> list[str]:
    """The names in repeated options, each of which may hold several, apart by spaces or commas."""
    return " ".join(options).replace(",", " ").split()
