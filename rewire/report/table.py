"""Cells to rows: everything but rule and seed makes a group, a rule with its options makes a row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rewire.ablation.grid import BASELINE
from rewire.ablation.inputs import one_of

from .compare import Comparison, compare, correct
from .runs import NEUTRAL, Collected, Moment, Outcome, canonical

METRICS = ("accuracy", "error")
# What belongs to the rule rather than to the experiment.
_OPTIONS = ("layers", "blocks", "feedback", "skip", "scale")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample deviation of ``n`` numbers; the deviation of one number is None."""

    mean: float
    deviation: float | None
    n: int

    def text(self, digits: int) -> str:
        """``mean ± deviation``, or the mean alone."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Row:
    """All seeds of one rule in one group. ``values`` are in % of the test set, by seed."""

    label: str
    rule: str
    options: Mapping[str, str]
    outcomes: tuple[Outcome, ...]
    values: Mapping[Hashable, float]
    is_baseline: bool = False
    comparison: Comparison | None = None

    def spread(self, name: str) -> Spread | None:
        """Of the outcomes' number ``name``, over seeds that have it."""
        return spread([value for each in self.outcomes if (value := getattr(each, name)) is not None])

    def mean(self, name: str) -> Spread | None:
        """The same without deviation: for what is measured once and written beside every seed."""
        found = self.spread(name)
        return None if found is None else replace(found, deviation=None)

    @property
    def result(self) -> Spread | None:
        """Of ``values``."""
        return spread(list(self.values.values()))

    @property
    def last(self) -> list[Moment]:
        """Each seed's last record of alignment."""
        return [each.alignment[-1] for each in self.outcomes if each.alignment]

    @property
    def gamma(self) -> Spread | None:
        """Γ at the end, over seeds that could measure it."""
        return spread([moment.gamma for moment in self.last if moment.gamma is not None])

    @property
    def flagged(self) -> bool:
        """Whether any seed has a trust flag at the end, where its Γ is from."""
        return any(moment.flags for moment in self.last)

    def count(self, status: str) -> int:
        """Seeds that ended with ``status``."""
        return sum(each.status == status for each in self.outcomes)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that may be compared: same model, data, optimizer and so on, written in ``title``."""

    title: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row | None:
        """The first of the rows compared against."""
        return next((row for row in self.rows if row.is_baseline), None)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a page, a table or a file says."""

    collected: Collected
    groups: tuple[Group, ...]
    common: Mapping[str, Any]
    metric: str
    baseline: str
    labels: tuple[str, ...]
    tests: int
    notes: tuple[str, ...] = field(default=())

    def value(self, accuracy: float | None) -> float | None:
        """``accuracy`` (0 to 1) in the report's metric, in %."""
        return in_percent(accuracy, self.metric)


def build(collected: Collected, *, baseline: str | None = None, metric: str = "accuracy") -> Report:
    """Group, compare and correct.

    Args:
        collected: what :func:`.runs.read` found.
        baseline: the rule to compare with; by default the one the runs name, else ``bp``.
        metric: ``accuracy`` or ``error``, both on the test set in %.

    Raises:
        InputError: no such metric, or ``baseline`` was given and no cell has it.
    """
    one_of("metric", metric, METRICS)
    rules = list(dict.fromkeys(each.rule for each in collected.outcomes))
    if baseline is not None:
        one_of("baseline", baseline, rules)
    chosen = baseline or collected.baseline or BASELINE
    notes = list(collected.notes)
    if chosen not in rules:
        notes.append(f"No cell has the baseline {chosen}: nothing is compared")

    settings = [
        {name: value for name, value in each.cell.items() if name not in ("rule", "seed", *_OPTIONS, *NEUTRAL)}
        for each in collected.outcomes
    ]
    varying = _varying(settings)
    common = {name: value for name, value in settings[0].items() if name not in varying}
    options = [{name: each.cell.get(name) for name in _OPTIONS} for each in collected.outcomes]
    told = _varying(options)

    members: dict[str, list[int]] = {}
    for index, each in enumerate(settings):
        members.setdefault(canonical(each), []).append(index)
    groups = []
    for indices in members.values():
        found: dict[tuple[str, str], list[int]] = {}
        for index in indices:
            shown = {name: options[index][name] for name in told}
            found.setdefault((collected.outcomes[index].rule, canonical(shown)), []).append(index)
        rows = [
            _row([collected.outcomes[i] for i in each], {name: options[each[0]][name] for name in told}, metric)
            for each in found.values()
        ]
        here = settings[indices[0]]
        groups.append(Group(_title(here, varying), here, tuple(_against(rows, chosen))))

    # One family for the whole report: that is what a reader looks through.
    flat = correct([row.comparison for group in groups for row in group.rows])
    corrected = iter(flat)
    groups = [
        replace(group, rows=tuple(replace(row, comparison=next(corrected)) for row in group.rows)) for group in groups
    ]
    labels = dict.fromkeys(row.label for group in groups for row in sorted(group.rows, key=lambda r: not r.is_baseline))
    tests = sum(each is not None and each.p is not None for each in flat)
    return Report(collected, tuple(groups), common, metric, chosen, tuple(labels), tests, tuple(notes))


def spread(values: Sequence[float]) -> Spread | None:
    """Of ``values``; None if there are none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def in_percent(accuracy: float | None, metric: str) -> float | None:
    """``accuracy`` (0 to 1) as accuracy or error in %."""
    if accuracy is None:
        return None
    return 100 * (accuracy if metric == "accuracy" else 1 - accuracy)


def plain(value: Any) -> str:
    """A setting as one would write it on a command line."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={plain(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(plain, value)) or "none"
    return json.dumps(value, default=str)


def described(settings: Mapping[str, Any]) -> str:
    """``epochs 15, batch size 32, lr 0.002``: what is set, in one line."""
    return ", ".join(
        f"{name.replace('_', ' ')} {plain(value)}"
        for name, value in settings.items()
        # Zero of anything here is the same as not having it.
        if value or value is False
    )


def _row(outcomes: list[Outcome], options: Mapping[str, Any], metric: str) -> Row:
    rule = outcomes[0].rule
    shown = {name: plain(value) for name, value in options.items() if value not in (None, [], {})}
    label = " · ".join([rule, *(f"{name}={value}" for name, value in shown.items())])
    values: dict[Hashable, float] = {}
    for position, each in enumerate(outcomes):
        value = in_percent(each.accuracy, metric)
        if value is not None:
            # Without a seed of its own a cell cannot be paired with anything.
            values[("no seed", position, id(each)) if each.seed is None else canonical(each.seed)] = value
    return Row(label, rule, shown, tuple(outcomes), values)


def _against(rows: list[Row], rule: str) -> list[Row]:
    """``rows``, baseline first, compared with the baseline of the same options, or else the first there is."""
    baselines = [row for row in rows if row.rule == rule]
    # Backprop with other rules in some layers is not backprop: it is compared with it, where that was run.
    if rule == BASELINE and any(map(_whole, baselines)):
        baselines = [row for row in baselines if _whole(row)]
    if not baselines:
        return rows
    others = [row for row in rows if row not in baselines]
    same = {canonical(row.options): row for row in reversed(baselines)}
    return [replace(row, is_baseline=True) for row in baselines] + [
        replace(row, comparison=_compared(row, same.get(canonical(row.options), baselines[0]))) for row in others
    ]


def _whole(row: Row) -> bool:
    """Whether the rule is that of the whole model."""
    cell = row.outcomes[0].cell
    return not cell.get("layers") and not cell.get("blocks")


def _compared(row: Row, baseline: Row) -> Comparison | None:
    found = compare(row.values, baseline.values)
    # One seed at chance among others at 98 % is nothing a t-test is made for, and the fact says more.
    for each, whose in ((row, ""), (baseline, f" of {baseline.label}")):
        if found is not None and each.count("diverged"):
            words = f"{each.count('diverged')} of {len(each.outcomes)}{whose} diverged"
            return Comparison(found.difference, words)
    return found


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({canonical({name: each.get(name)}) for each in settings}) > 1]


def _title(settings: Mapping[str, Any], varying: Sequence[str]) -> str:
    first = " on ".join(plain(settings[name]) for name in ("model", "data") if settings.get(name) is not None)
    rest = described({name: settings.get(name) for name in varying if name not in ("model", "data")})
    return ", ".join(part for part in (first, rest) if part) or "all cells"
