"""What ``rewire ablate`` and ``rewire train`` have in common: options that say what is trained, and how a run ends."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from rewire.ablation import Result, StorageError
from rewire.ablation.report import table, title
from rewire.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

DATA = "digits (with scikit-learn), fashion-mnist (with --data-dir), FILE.npz or package.module:function."
MODELS = (
    "mlp, cnn, lenet, resnet, torchvision:NAME, timm:NAME, hf:MODEL_TYPE or package.module:function (returns a model)."
)


def training(function: F) -> F:
    """Options of one optimizer and batch, of several where a grid takes them."""
    options = [
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Folder with Fashion-MNIST's four IDX files, gzipped or plain.",
        ),
        click.option("--epochs", type=int, help="[default: 15 for digits, 3 for fashion-mnist, else 10]"),
        click.option("--alignments", type=int, help="How often alignment is measured.  [default: 5; 0: never]"),
        click.option(
            "--threads",
            type=int,
            help="CPU threads of torch. Small models gain nothing from more, and numbers depend on it.  [default: 1]",
        ),
        click.option(
            "--checkpoint-seconds",
            type=float,
            default=30.0,
            show_default=True,
            help="How much work a kill may cost: a cell's state is kept this often.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def command_line() -> str:
    """What was typed, to be kept with the run."""
    return shlex.join(["rewire", *sys.argv[1:]])


def setting(text: str) -> str | float:
    """A number where ``text`` is one."""
    try:
        return float(text)
    except ValueError:
        return text


def several(values: Sequence[Any]) -> list[Any] | None:
    """A list, or None where nothing was given, so that a file or a default counts."""
    return list(values) or None


def show(results: Sequence[Result], folder: Path, metric: str = "accuracy") -> int:
    """Print the table, and what failed; the exit code."""
    # A file or a pipe has no width that a table would have to fit.
    screen = Console() if Console().is_terminal or "COLUMNS" in os.environ else Console(width=160)
    cells = [result.cell for result in results]
    # Names and paths are not ours: brackets and colons in them mean nothing to rich.
    screen.print(f"\n{title(cells)}", highlight=False, markup=False, emoji=False)
    screen.print(table(results, metric))
    screen.print(f"Results: {folder / 'results.jsonl'}", highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        if page := _page(folder):
            screen.print(f"Report: {page}", highlight=False, soft_wrap=True, markup=False, emoji=False)
    except InputError as problem:  # the table is there all the same
        screen.print(f"No report: {problem}", highlight=False, soft_wrap=True, markup=False, emoji=False)
    failed = [result for result in results if result.status == "failed"]
    if failed:
        names = "; ".join(f"{result.cell.label} ({result.cell.id}): {result.error}" for result in failed)
        click.echo(f"rewire: {len(failed)} of {len(results)} cells failed: {names}", err=True)
    return 1 if failed else 0


def _page(folder: Path) -> Path | None:
    """The HTML report, where that can be written; a table that is there is worth more than a report that is not."""
    try:
        html = importlib.import_module("rewire.ablation.html")
    except ImportError:
        return None
    page: Path = html.write(folder)
    return page


def stopped(error: BaseException, folder: Path, command: str) -> int:
    """Say how to go on after Ctrl-C or with a full disk; the exit code."""
    go_on = f"go on with rewire {command} --resume {folder}"
    if isinstance(error, StorageError):
        click.echo(f"rewire: {error}. What is finished is kept: make room, and {go_on}", err=True)
        return 1
    click.echo(f"rewire: interrupted. What is finished is kept: {go_on}", err=True)
    return 130


def only(command: str, **given: Any) -> None:
    """Raise unless nothing of ``given`` was given beside ``--resume``."""
    more = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, (), False)]
    if more:
        raise InputError(f"--resume goes on with a run as it is, without {more[0]}: rewire {command} --resume DIR")
