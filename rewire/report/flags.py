"""What keeps alignment from being believed: every flag that was raised, with where, when and what it means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .runs import Moment, Outcome
from .table import Group, Row

# Flags are sentences: what was found, a colon, and in which layers. Those that differ after the colon, or in their
# numbers, are of one kind.
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
_MEANING = (
    ("numeric floor", "There backprop’s own gradient is made of rounding: an angle to it would mean nothing."),
    (
        "have grown",
        "The network is blowing up, and backprop’s gradient shrinks in proportion: angles to it lose their meaning.",
    ),
    ("chance", "Fresh random feedback, which knows nothing of the network, gives angles as small."),
    ("carries", "Γ is the number of that one layer more than of the network: look at the layers."),
    ("not finite", "Training has broken down."),
)


@dataclass(frozen=True, slots=True)
class Flag:
    """One kind of flag in one row: its newest words and their meaning, in how many seeds of how many with a record,
    first and last when, and in how many at the end.
    """

    group: Group
    row: Row
    words: str
    meaning: str
    seeds: int
    of: int
    first: str
    last: str
    at_end: int


def flags(group: Group) -> list[Flag]:
    """All flags in ``group``: those still there at the end first, else rows in order."""
    return sorted((flag for row in group.rows for flag in _of(group, row)), key=lambda flag: not flag.at_end)


def recorded(group: Group) -> bool:
    """Whether any cell of ``group`` has a record of alignment."""
    return any(each.alignment for row in group.rows for each in row.outcomes)


def when(moment: Moment) -> str:
    """``epoch 3, step 120``."""
    parts = []
    if moment.epoch is not None:
        parts.append(f"epoch {moment.epoch:.3g}")
    if moment.step is not None:
        parts.append(f"step {moment.step:g}")
    return ", ".join(parts) or "at some time"


def _of(group: Group, row: Row) -> list[Flag]:
    found: dict[str, list[tuple[Outcome, Moment, str]]] = {}
    for outcome in row.outcomes:
        for moment in outcome.alignment:
            for words in moment.flags:
                found.setdefault(_NUMBER.sub("#", words.partition(":")[0]), []).append((outcome, moment, words))
    flagged = []
    for kind, hits in found.items():
        hits.sort(key=lambda hit: hit[1].when)
        flagged.append(
            Flag(
                group,
                row,
                words=hits[-1][2],
                meaning=next((meaning for word, meaning in _MEANING if word in kind), ""),
                seeds=len({id(outcome) for outcome, _, _ in hits}),
                of=sum(bool(each.alignment) for each in row.outcomes),
                first=when(hits[0][1]),
                last=when(hits[-1][1]),
                at_end=len({id(outcome) for outcome, moment, _ in hits if moment is outcome.alignment[-1]}),
            )
        )
    return flagged
