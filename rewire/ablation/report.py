"""The table: one row per model and rule, mean ± deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from .cell import Cell, Result

METRICS = ("accuracy", "error")


@dataclass(frozen=True, slots=True)
class Row:
    """All seeds of one model under one rule."""

    model: str
    rule: str
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    step_ratio: float | None
    diverged: int


def rows(results: Iterable[Result]) -> list[Row]:
    """``results`` grouped by model and rule, in the order they first appear."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.model, result.cell.rule), []).append(result)
    return [
        Row(
            model,
            rule,
            tuple(result.accuracy for result in group),
            tuple(result.final_loss for result in group),
            group[0].step_ratio,
            sum(result.diverged for result in group),
        )
        for (model, rule), group in groups.items()
    ]


def table(results: Sequence[Result], metric: str = "accuracy") -> Table:
    """A table of :func:`rows`; ``metric`` is ``accuracy`` or ``error``, both on the test images in %."""
    out = Table()
    for name in ("model", "rule"):
        out.add_column(name)
    for name in (f"test {metric} %", "step time ÷ bp", "final loss"):
        out.add_column(name, justify="right")
    previous = None
    for row in rows(results):
        if previous not in (None, row.model):
            out.add_section()
        shown = [100 * (value if metric == "accuracy" else 1 - value) for value in row.accuracies]
        ratio = "–" if row.step_ratio is None else f"{row.step_ratio:.2f}"
        loss = f"{row.diverged} of {len(shown)} diverged" if row.diverged else spread(row.losses, 4)
        name = "" if row.model == previous else row.model
        out.add_row(name, row.rule, spread(shown, 2), ratio, loss)
        previous = row.model
    return out


def spread(values: Sequence[float], digits: int) -> str:
    """``mean ± sample deviation``, or the mean alone for one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def title(cell: Cell) -> str:
    """What all cells of a grid share, in one line."""
    momentum = f", momentum {cell.momentum:g}" if cell.momentum else ""
    decay = f", weight decay {cell.weight_decay:g}" if cell.weight_decay else ""
    return (
        f"{cell.data}: {cell.epochs} epochs, batch {cell.batch_size}, "
        f"{cell.optimizer} {cell.lr:g}{momentum}{decay}, {cell.schedule}"
    )
