"""Rules that other packages ship: entry points of the group ``rewire.rules``, each named as its rule is.

In the package's pyproject.toml::

    [project.entry-points."rewire.rules"]
    halved = "package.module:Halved"

Nothing is imported before somebody asks for a rule by that name, so a package that is broken breaks no other rule.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from rewire.errors import ConversionError

GROUP = "rewire.rules"


@cache
def found() -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by name, as the packages that are installed declare them."""
    by_name: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        others = by_name.get(entry.name, ())
        if all(entry.value != other.value for other in others):  # a path may be searched twice
            by_name[entry.name] = (*others, entry)
    return by_name


def load(name: str) -> object:
    """What the entry point called ``name`` names.

    Raises:
        ConversionError: if it cannot be imported, or several packages have one of that name. Names the package.
    """
    entries = found()[name]
    if len(entries) > 1:
        raise ConversionError(
            f"rule {name!r} is shipped by several packages: {', '.join(sorted(map(_where, entries)))}"
        )
    (entry,) = entries
    try:
        return entry.load()
    except Exception as problem:  # whatever a module of somebody else's raises
        raise ConversionError(
            f"rule {name!r} is shipped by {_where(entry)}, which could not be imported: "
            f"{type(problem).__name__}: {problem}"
        ) from problem


def where(name: str) -> str:
    """Who ships the rule called ``name``, for messages."""
    return ", ".join(map(_where, found()[name]))


def _where(entry: EntryPoint) -> str:
    package = "an unnamed package" if entry.dist is None else entry.dist.name
    return f"{package} ({entry.value})"
