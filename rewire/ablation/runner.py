"""A grid of models, rules and seeds: laid out, checked, run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rewire.errors import RewireError

from .cell import Cell, Epoch, Result
from .data import load
from .inputs import InputError
from .results import Writer
from .timing import step_ratio
from .train import make_trainer, run_cell


def grid(base: Cell, models: Iterable[str], rules: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    """``base`` for every model, rule and seed, in that order; names given twice count once.

    Raises:
        InputError: a model or a rule is unknown.
    """
    rules, seeds = list(dict.fromkeys(rules)), list(seeds)
    return [
        replace(base, model=model, rule=rule, seed=seed)
        for model in dict.fromkeys(models)
        for rule in rules
        for seed in seeds
    ]


def check(cells: Sequence[Cell]) -> None:
    """Take one training step of every model under every rule, so that what cannot work fails at once.

    Raises:
        InputError: the data cannot be had, or a rule refuses a model.
    """
    for cell in _one_per_pair(cells):
        data = load(cell.data, cell.data_dir)
        try:
            with torch.random.fork_rng(devices=[]):
                make_trainer(cell, data).step(data.x_train[:2], data.y_train[:2])
        except RewireError as error:
            raise InputError(f"{cell.model} under {cell.rule}: {error}") from error


def run_grid(cells: Sequence[Cell], writer: Writer, console: Console) -> list[Result]:
    """Run every cell in order; each result goes to ``writer`` as soon as it is there.

    ``console`` gets a line per finished cell, and below it a progress bar where that is a terminal.
    """
    ratios: dict[tuple[str, str], float] = {}
    results: list[Result] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        console=console,
        # In a file or a pipe the lines are the progress; a bar would only leave its last frame there.
        disable=not console.is_terminal,
        transient=True,
    )
    with bar as progress:
        task = progress.add_task("step times", total=sum(cell.epochs for cell in cells))
        for cell in _one_per_pair(cells):
            progress.update(task, description=f"step time {cell.model} {cell.rule}")
            ratios[cell.model, cell.rule] = step_ratio(cell)

        for done, cell in enumerate(cells, start=1):
            progress.update(task, description=f"{cell.model} {cell.rule} seed {cell.seed}")

            def advance(epoch: Epoch) -> None:
                progress.advance(task)

            result = replace(run_cell(cell, advance), step_ratio=ratios[cell.model, cell.rule])
            # A cell that ends early still owes the bar its epochs.
            progress.advance(task, cell.epochs - len(result.history))
            writer.append(result)
            results.append(result)
            console.print(_line(result, done, len(cells)), highlight=False)
    return results


def _one_per_pair(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of every (model, rule)."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        first.setdefault((cell.model, cell.rule), cell)
    return list(first.values())


def _line(result: Result, done: int, total: int) -> str:
    cell = result.cell
    return (
        f"[dim]{done:>{len(str(total))}}/{total}[/dim]  {cell.model:<6} {cell.rule:<8} seed {cell.seed}  "
        f"test {100 * result.accuracy:6.2f} %  loss {result.final_loss:.4f}  {result.seconds:.1f} s"
        + ("  [red]diverged[/red]" if result.diverged else "")
    )
