"""Running a grid: what is pending goes to whoever does it, and what comes back is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rewire.errors import RewireError

from . import here, on_ray, workers
from .cell import Cell, Result
from .data import load
from .environment import cores
from .folder import RunFolder
from .inputs import InputError
from .progress import HISTORY
from .random_state import seeded
from .report import spread
from .trainer import make_trainer
from .work import Outcome, Unit, groups_of

PLACES = ("workers", "ray")


@dataclass(frozen=True)
class How:
    """How a grid is run; numbers do not depend on it.

    Attributes:
        on: ``"workers"``, processes of this machine, or ``"ray"``.
        workers: how many; 0: none, all is done in this process; None: one per core.
        every: seconds between checkpoints of a cell.
    """

    on: str = "workers"
    workers: int | None = None
    every: float = 30.0

    def outcomes(self, units: Sequence[Unit], threads: int) -> Iterator[Outcome | None]:
        """The outcome of each unit as it is done; None now and then."""
        count = max(1, cores() // threads) if self.workers is None else self.workers
        if self.on == "ray":
            return on_ray.outcomes(units, threads=threads, count=count)
        if count == 0:
            return here.outcomes(units, threads=threads)
        return workers.outcomes(units, count=count, threads=threads)


def check(cells: Sequence[Cell]) -> None:
    """Build and convert every model under every rule, so that what cannot be asked for is said at once.

    What goes wrong in training is not looked for: one cell that fails stops no others.

    Raises:
        InputError: the data cannot be had, a model does not go with them, or an argument of ``convert`` cannot be.
    """
    for cell in _one_per_seed(cells):
        data = load(cell.data, cell.data_dir)
        try:
            with seeded(cell.seed):
                make_trainer(cell, data)
        except InputError:
            raise
        except RewireError as error:
            raise InputError(f"{cell.model} under {cell.rule}: {error}") from error


def run_grid(run: RunFolder, console: Console, how: How | None = None) -> list[Result]:
    """Run every cell that is pending; each result is on disk as soon as it is there.

    ``console`` gets a line per finished cell, and below it a progress bar where that is a terminal.

    Returns:
        All results of the grid, in its order.

    Raises:
        StorageError: the disk takes no more. What is finished is kept.
    """
    how = how or How()
    every, pending = run.grid.cells(), run.pending()
    if len(pending) < len(every):
        console.print(f"{len(every) - len(pending)} of {len(every)} cells are finished already", highlight=False)
    units = [Unit(cells, run.path, how.every) for cells in groups_of(pending, run.grid.together)]
    notes: set[str] = set()
    with _bar(console) as bar:
        finished = {cell.id: cell.epochs for cell in every if cell not in pending}
        task = bar.add_task("", total=sum(cell.epochs for cell in every), completed=sum(finished.values()))
        for outcome in how.outcomes(units, run.grid.threads) if units else ():
            if outcome is None:
                _advance(bar, task, run, pending, finished)
                continue
            for note in outcome.notes:
                if note not in notes:
                    console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, emoji=False)
            notes.update(outcome.notes)
            for result in outcome.results:
                run.append(result)
                finished[result.cell.id] = result.cell.epochs
                console.print(_line(result, len(run.results), len(every)), highlight=False, emoji=False)
            bar.update(task, completed=sum(finished.values()))
    order = {cell.id: number for number, cell in enumerate(every)}
    return sorted((r for r in run.results if r.cell.id in order), key=lambda result: order[result.cell.id])


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        # In a file or a pipe the lines are the progress; a bar would only leave its last frame there.
        disable=not console.is_terminal,
        transient=True,
    )


def _advance(bar: Progress, task: TaskID, run: RunFolder, pending: Iterable[Cell], finished: dict[str, int]) -> None:
    """Count the epochs of cells under way by their files: that works wherever they are trained."""
    if bar.disable:
        return
    under_way = sum(_lines(run.cell(cell) / HISTORY) for cell in pending if cell.id not in finished)
    bar.update(task, completed=sum(finished.values()) + under_way)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _one_per_seed(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of every configuration."""
    first: dict[Cell, Cell] = {}
    for cell in cells:
        first.setdefault(replace(cell, seed=0), cell)
    return list(first.values())


def _line(result: Result, done: int, total: int) -> str:
    """One line with marks of rich's; names and errors are not ours, and brackets in them are no marks."""
    cell = result.cell
    start = f"[dim]{done:>{len(str(total))}}/{total}[/dim]  {escape(f'{cell.label:<22}')}  "
    if result.status == "failed":
        return f"{start}[red]failed[/red]  {escape(str(result.error))}"
    assert result.accuracy is not None and result.final_loss is not None
    gamma = "" if result.gamma is None else f"  Γ {result.gamma:.2f}"
    loss = spread([result.final_loss], 4)
    return f"{start}test {100 * result.accuracy:6.2f} %  loss {loss}{gamma}  {result.seconds:.1f} s" + (
        "  [red]diverged[/red]" if result.status == "diverged" else ""
    )
