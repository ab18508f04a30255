"""The table on the terminal: one row per configuration, mean ± deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from .cell import Cell, Result

METRICS = ("accuracy", "error")
LARGE = 1e4  # larger losses are written with an exponent
_OF_FEEDBACK = ("feedback", "skip", "scale")
_OWN_COLUMN = ("model", "rule", "seed", "data_dir", "alignments")


@dataclass(frozen=True)
class Row:
    """All seeds of one configuration.

    Attributes:
        cell: of the first seed.
        accuracies: of those that gave one.
        losses: final ones, of those that did not diverge.
        gammas: last alignments, of those that have one.
        flags: what makes these alignments doubtful, each once.
        step_ratio: mean over seeds.
    """

    cell: Cell
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    gammas: tuple[float, ...]
    flags: tuple[str, ...]
    step_ratio: float | None
    diverged: int
    failed: int
    seeds: int


def rows(results: Iterable[Result]) -> list[Row]:
    """``results`` grouped by everything but the seed and where the data lie, in the order they first appear."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(replace(result.cell, seed=0).id, []).append(result)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Result]) -> Row:
    ratios = [result.step_ratio for result in group if result.step_ratio is not None]
    last = [result.alignment[-1] for result in group if result.alignment]
    return Row(
        cell=group[0].cell,
        accuracies=tuple(result.accuracy for result in group if result.accuracy is not None),
        losses=tuple(r.final_loss for r in group if r.final_loss is not None and r.status == "done"),
        gammas=tuple(result.gamma for result in group if result.gamma is not None),
        flags=tuple(dict.fromkeys(flag for each in last for flag in each.get("flags", ()))),
        step_ratio=statistics.fmean(ratios) if ratios else None,
        diverged=sum(result.status == "diverged" for result in group),
        failed=sum(result.status == "failed" for result in group),
        seeds=len(group),
    )


def table(results: Sequence[Result], metric: str = "accuracy") -> Table:
    """A table of :func:`rows`; ``metric`` is ``accuracy`` or ``error``, both on the test samples in %.

    What differs between rows beside model and rule has a column of its own. Γ marked with ! is flagged: do not trust it
    before you have read why.
    """
    found = rows(results)
    varying = [
        field.name for field in fields(Cell) if field.name not in _OWN_COLUMN and len(_values(found, field.name)) > 1
    ]
    aligned = any(row.gammas or row.flags for row in found)
    out = Table()
    for name in ("model", "rule", *varying):
        out.add_column(name.replace("_", " "))
    out.add_column(f"test {metric} %", justify="right")
    # A narrow terminal wraps headings, not numbers, where that leaves them whole.
    for name in (*(["Γ"] if aligned else []), "step ÷ bp", "final loss"):
        out.add_column(name, justify="right", no_wrap=not varying)
    previous = None
    for row in found:
        if previous not in (None, row.cell.model):
            out.add_section()
        shown = [100 * (value if metric == "accuracy" else 1 - value) for value in row.accuracies]
        out.add_row(
            # Names are not ours: brackets in them are no marks of rich's.
            Text("" if row.cell.model == previous else row.cell.model),
            Text(row.cell.rule),
            *(Text(_setting(getattr(row.cell, name))) for name in varying),
            spread(shown, 2),
            *([spread(row.gammas, 2) + (" !" if row.flags else "")] if aligned else []),
            "–" if row.step_ratio is None else f"{row.step_ratio:.2f}",
            _ended(row) or spread(row.losses, 4),
        )
        previous = row.cell.model
    return out


def _values(found: Sequence[Row], name: str) -> set[Any]:
    """What ``name`` is in the rows where it means anything: plain backprop has no feedback."""
    return {getattr(row.cell, name) for row in found if not (row.cell.plain and name in _OF_FEEDBACK)}


def _ended(row: Row) -> str:
    found = [(row.diverged, "diverged"), (row.failed, "failed")]
    return ", ".join(f"{count} of {row.seeds} {what}" for count, what in found if count)


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join("=".join(item) if isinstance(item, tuple) else str(item) for item in value) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float], digits: int) -> str:
    """``mean ± sample deviation``, or the mean alone for one value, or a dash for none."""
    if not values:
        return "–"
    # Of a network that nearly diverged the digits would fill the terminal.
    form = f".{digits}f" if statistics.fmean(values) < LARGE else ".2e"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{form}}"


def title(cells: Sequence[Cell]) -> str:
    """What all cells of a grid share, in one line."""

    def same(name: str) -> Any:
        found = {getattr(cell, name) for cell in cells}
        return found.pop() if len(found) == 1 else None

    parts = [
        f"{number} epochs" if (number := same("epochs")) else "",
        f"batch {b}" if (b := same("batch_size")) else "",
    ]
    if optimizer := same("optimizer"):
        parts.append(f"{optimizer} {lr:g}" if (lr := same("lr")) else optimizer)
    parts += [
        f"momentum {m:g}" if (m := same("momentum")) else "",
        f"weight decay {w:g}" if (w := same("weight_decay")) else "",
    ]
    parts.append(same("schedule") or "")
    data = ", ".join(dict.fromkeys(cell.data for cell in cells))
    return f"{data}: {', '.join(part for part in parts if part)}"
