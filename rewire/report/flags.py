"""What keeps alignment from being believed: every flag that was raised, with where and how long."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .runs import Moment, Outcome
from .table import Group, Row

# Flags are sentences; those that differ in their numbers alone are one flag.
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)

_PLAIN: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Flag:
    """One kind of flag in one row: its newest words, in how many seeds, first when, and how it was at the end."""

    group: Group
    row: Row
    words: str
    seeds: int
    of: int
    first: str
    at_end: int


def flags(group: Group) -> list[Flag]:
    """All flags in ``group``, rows in order."""
    return [flag for row in group.rows for flag in _of(group, row)]


def recorded(group: Group) -> bool:
    """Whether any cell of ``group`` has a record of alignment."""
    return any(each.alignment for row in group.rows for each in row.outcomes)


def _of(group: Group, row: Row) -> list[Flag]:
    found: dict[str, list[tuple[Outcome, Moment, str]]] = {}
    for outcome in row.outcomes:
        for moment in outcome.alignment:
            for words in moment.flags:
                found.setdefault(_NUMBER.sub("#", words), []).append((outcome, moment, words))
    with_record = sum(bool(each.alignment) for each in row.outcomes)
    return [
        Flag(
            group,
            row,
            words=hits[-1][2],
            seeds=len({id(outcome) for outcome, _, _ in hits}),
            of=with_record,
            first=when(min((moment for _, moment, _ in hits), key=lambda moment: moment.when)),
            at_end=len({id(outcome) for outcome, moment, _ in hits if moment is outcome.alignment[-1]}),
        )
        for hits in found.values()
    ]


def when(moment: Moment) -> str:
    """``epoch 3, step 120``."""
    parts = []
    if moment.epoch is not None:
        parts.append(f"epoch {moment.epoch:g}")
    if moment.step is not None:
        parts.append(f"step {moment.step:g}")
    return ", ".join(parts) or "at some time"


def explain(words: str) -> str:
    """A flag in plain words; one that is a sentence already stays as it is."""
    return _PLAIN.get(words.strip().lower().replace("-", "_").replace(" ", "_"), words)
