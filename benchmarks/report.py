"""Results of step_time.py as tables, drawn or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from machine import one_line
from models import CASES
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Line = dict[str, Any]
RULES = ("bp", "fa", "frsf", "brsf", "dfa")
LIBRARIES = {"hand": "by hand", "biotorch": "BioTorch", "tinydfa": "TinyDFA"}
MISSED = " ✗"
NOISE = 0.03  # a time per sample that rises by less is taken to be the same


@dataclass
class Sheet:
    """One table, and what is to be said below it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_columns: int = 1

    def markdown(self) -> str:
        sides = [":--"] * self.text_columns + ["--:"] * (len(self.columns) - self.text_columns)
        table = [f"| {' | '.join(cells)} |" for cells in (self.columns, sides, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *table, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def draw(self, console: Console) -> None:
        table = Table(title=escape(self.title))
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="left" if place < self.text_columns else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", highlight=False, markup=False)


def show(lines: list[Line], about: dict[str, object], markdown: bool) -> None:
    """Print every table that has rows."""
    console = Console(width=150)
    made = [*(ratios(lines, mode) for mode in ("eager", "compiled")), batches(lines), others(lines)]
    if markdown:
        print(f"{one_line(about)}\n")
    for sheet in made:
        if sheet.rows and markdown:
            print(sheet.markdown())
        elif sheet.rows:
            sheet.draw(console)
    if not markdown:
        console.print(one_line(about), highlight=False)


def ratios(lines: list[Line], mode: str) -> Sheet:
    """Every model at its ordinary batch (or whichever was asked for), one column a rule."""
    mine = [line for line in lines if line["mode"] == mode]
    rules = _ordered(who for line in mine for who in (*line["contenders"], *line["fails"]) if _ours(who))
    word = "compiled step / compiled backprop" if mode == "compiled" else "step / backprop"
    columns = ["model", "batch", "backprop ms", *rules, "goal"]
    sheet = Sheet(f"{word}: median [quartiles]", columns)
    for line in mine:
        case = CASES[line["model"]]
        seconds = line["reference_seconds"]
        goals = {who: case.goal(who, line["batch"], mode) for who in rules}
        cells = [_cell(line, who, goals[who], sheet) for who in rules]
        wanted = ", ".join(f"{who} {goal:g}" for who, goal in goals.items() if goal is not None)
        feedback = "" if case.feedback == "dense" else f", feedback={case.feedback}"
        first = [case.title + feedback, str(line["batch"]), "-" if seconds is None else f"{seconds * 1e3:.2f}"]
        sheet.rows.append([*first, *cells, wanted])
    return with_missed(sheet)


def batches(lines: list[Line]) -> Sheet:
    """Models run at several batch sizes: microseconds per sample, and whether they ever rise."""
    swept = [line for line in lines if line["mode"] == "eager" and line["reference_seconds"] is not None]
    models = [m for m in CASES if len({line["batch"] for line in swept if line["model"] == m}) > 1]
    swept = sorted((line for line in swept if line["model"] in models), key=lambda x: (x["model"], x["batch"]))
    rules = _ordered(who for line in swept for who in line["contenders"] if _ours(who))
    sheet = Sheet("µs per sample (ratio to backprop)", ["model", "batch", "backprop", *rules])
    for line in swept:
        cells = [
            CASES[line["model"]].title,
            str(line["batch"]),
            f"{line['reference_seconds'] / line['batch'] * 1e6:.1f}",
        ]
        for who in rules:
            one = line["contenders"].get(who)
            cells.append(
                "fails" if one is None else f"{one['seconds'] / line['batch'] * 1e6:.1f} ({one['ratio'][1]:.2f})"
            )
        sheet.rows.append(cells)
    for model in models:
        for who in rules:
            timed = [(x["batch"], x["contenders"].get(who)) for x in swept if x["model"] == model]
            each = [(batch, one["seconds"] / batch) for batch, one in timed if one is not None]
            rises = [f"{a[0]} to {b[0]}" for a, b in pairwise(each) if b[1] > a[1] * (1 + NOISE)]
            said = f"rises from batch {', '.join(rises)}" if rises else "never rises with the batch"
            sheet.notes.append(f"{CASES[model].title}, {who}: time per sample {said}")
    return sheet


def others(lines: list[Line]) -> Sheet:
    """Other libraries beside rewire, each rule a row, measured in the same run."""
    columns = ["model", "rule", "rewire", *LIBRARIES.values()]
    sheet = Sheet("step / backprop beside other libraries: median [quartiles]", columns, text_columns=2)
    for line in lines:
        theirs = [who for who in (*line["contenders"], *line["fails"]) if not _ours(who)]
        for rule in _ordered(who.rpartition(":")[2] for who in theirs):
            cells = [_cell(line, rule, None, sheet)]
            for library in LIBRARIES:
                who = f"{library}:{rule}"
                cells.append(_cell(line, who, None, sheet) if who in theirs else "–")
            sheet.rows.append([CASES[line["model"]].title, rule, *cells])
    return sheet


def _cell(line: Line, who: str, goal: float | None, sheet: Sheet) -> str:
    one = line["contenders"].get(who)
    if one is None:
        reason = line["fails"].get(who, "not run")
        if reason in ("not installed", "not run"):
            return reason
        note = f"{CASES[line['model']].title}, {who}: {reason}"
        if note not in sheet.notes:
            sheet.notes.append(note)
        return "fails"
    return spread(one["ratio"], goal)


def spread(ratio: Sequence[float], goal: float | None) -> str:
    """Median and quartiles of a ratio."""
    low, middle, high = ratio
    return f"{middle:.2f} [{low:.2f} {high:.2f}]{missed(middle, goal)}"


def missed(found: float, goal: float | None) -> str:
    """The mark of a ratio above its goal. Judged as it is printed: 0.734 meets 0.73."""
    return MISSED if goal is not None and round(found, 2) > goal else ""


def with_missed(sheet: Sheet) -> Sheet:
    """Say what the mark means, if there is one."""
    if any(MISSED in text for row in (*sheet.rows, sheet.notes) for text in row):
        sheet.notes.append("✗: above the goal")
    return sheet


def _ours(who: str) -> bool:
    return ":" not in who and who != "backprop"


def _ordered(names: Any) -> list[str]:
    """Each name once, in the order of the command line's own rules; others behind."""
    once = list(dict.fromkeys(names))
    return sorted(once, key=lambda name: RULES.index(name) if name in RULES else len(RULES))
