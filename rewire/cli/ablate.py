"""``rewire ablate``: models under several rules and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rewire.ablation import Grid, How, StorageError, check, from_toml, open_run, read, run_grid
from rewire.ablation.folder import check as check_folder
from rewire.ablation.folder import load_grid, new_folder
from rewire.ablation.grid import named
from rewire.ablation.inputs import one_of, positive
from rewire.ablation.report import METRICS
from rewire.ablation.runner import PLACES
from rewire.cli.options import DATA, MODELS, command_line, only, setting, several, show, stopped, training
from rewire.errors import InputError
from rewire.words import pairs, words

_NAMES = ("models", "rules", "data", "feedback", "skip", "optimizers", "schedule")  # options that hold several


@click.command(
    epilog="Example: rewire ablate --model cnn --rules 'bp dfa' --seeds 5 --optimizer sgd --momentum 0.9 --out runs/sgd"
)
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--model", "--models", "models", multiple=True, help=f"{MODELS}  [default: mlp cnn]")
@click.option(
    "--rule",
    "--rules",
    "rules",
    multiple=True,
    help="Rules, several in quotes or by repeating; with options, 'fitted(every=100)'.  [default: bp fa usf frsf dfa]",
)
@click.option("--seeds", type=int, help="How many seeds: 0, 1, ...  [default: 3]")
@click.option("--data", multiple=True, help=f"{DATA}  [default: digits]")
@click.option(
    "--layers",
    multiple=True,
    metavar="'PATTERN=RULE ...'",
    help="Rules by layer name. Each --layers is one assignment, a point of the grid; '' is none.",
)
@click.option("--blocks", multiple=True, metavar="PATTERN", help="Modules fed back as one unit.")
@click.option(
    "--feedback",
    multiple=True,
    help="Structure of B for direct rules; with options, 'lowrank(rank=8)'.  [default: dense]",
)
@click.option("--skip", multiple=True, help="keep or cut.  [default: keep]")
@click.option("--scale", multiple=True, help="auto or a number.  [default: auto]")
@click.option("--optimizer", "--optimizers", "optimizers", multiple=True, help="adam or sgd.  [default: adam]")
@click.option("--lr", type=float, multiple=True, help="Learning rate.  [default: 0.002 for adam, 0.05 for sgd]")
@click.option("--momentum", type=float, multiple=True, help="For sgd.  [default: 0]")
@click.option("--weight-decay", type=float, multiple=True, help="[default: 0]")
@click.option("--schedule", multiple=True, help="constant, or cosine to zero over all steps.  [default: constant]")
@click.option("--batch-size", type=int, multiple=True, help="[default: 32]")
@training
@click.option("--no-controls", is_flag=True, help="Leave out the controls: plain backprop, and shallow.")
@click.option(
    "--together",
    type=int,
    help="Train up to this many seeds of a cell as one stack: faster on small models, and equal up to rounding.",
)
@click.option("--workers", type=int, help="Processes; 0: none, all in this one.  [default: one per core]")
@click.option(
    "--on", "place", default="workers", show_default=True, help="workers, or ray (pip install 'rewire[ray]')."
)
@click.option("--metric", default="accuracy", show_default=True, help="What the table shows: accuracy or error.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the run; the same command again goes on with it.  [default: runs/DATE-AND-TIME]",
)
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the run in DIR, as it is.")
@click.option("--retry", is_flag=True, help="Try cells again that failed.")
def ablate(
    file: Path | None,
    no_controls: bool,
    workers: int | None,
    place: str,
    metric: str,
    out: Path | None,
    resume: Path | None,
    retry: bool,
    checkpoint_seconds: float,
    **given: Any,
) -> int:
    """Train models under several rules and seeds, and print a table.

    Every option that may be repeated is an axis: the grid has all combinations. FILE is a TOML file of the same
    names, with lists for axes; options go before what it says:

    \b
        models = ["mlp", "cnn"]
        rules = ["bp", "fa", "dfa"]
        seeds = 5
        layers = [{}, {"0" = "fa"}]
        optimizers = [{name = "adam", lr = 1e-3}, {name = "sgd", lr = 0.05, momentum = 0.9}]

    All rules of one seed start from the same weights and see the same batches. Step time is measured apart from
    training, against backprop, taking turns on the same batches; final loss is the mean training loss of the last
    epoch. A run may be stopped at any moment and gone on with; numbers are as if it had not been. Exit code 1: some
    cells failed.
    """
    one_of("metric", metric, METRICS)
    one_of("place", place, PLACES)
    positive("workers", 1 if workers is None else workers, zero=True)
    positive("checkpoint seconds", checkpoint_seconds, zero=True)
    how = How(place, workers, checkpoint_seconds)
    if resume is not None:
        only("ablate", file=file, out=out, no_controls=no_controls, **given)
        grid, folder = load_grid(resume), resume
    else:
        grid = _grid(file, no_controls, given)
        grid.cells()
        folder = out or new_folder(Path("runs"))
    if place == "ray":
        _needs_ray()
    check_folder(folder, grid)
    check(grid.cells())
    try:
        with open_run(folder, grid, command_line()) as run:
            if retry:
                run.forget_failed()
            # Progress goes to stderr, so that `rewire ablate > table.txt` holds the table alone.
            results = run_grid(run, Console(stderr=True), how)
    except (KeyboardInterrupt, StorageError) as error:
        return stopped(error, folder, "ablate")
    return show(results, folder, metric)


def _grid(file: Path | None, no_controls: bool, given: dict[str, Any]) -> Grid:
    options: dict[str, Any] = {
        name: several(value) if isinstance(value, tuple) else value for name, value in given.items()
    }
    for name in _NAMES:
        if options[name]:
            options[name] = [word for text in options[name] for word in named(text)]
    if options["layers"]:
        options["layers"] = [pairs("--layers", "0=fa", [each]) for each in options["layers"]]
    if options["blocks"]:
        options["blocks"] = words(options["blocks"])
    if options["scale"]:
        options["scale"] = [setting(text) for text in words(options["scale"])]
    if no_controls:
        options["controls"] = False
    options = {name: value for name, value in options.items() if value is not None}
    if file is None:
        return read(options, "options")
    said = from_toml(file)
    read(said, str(file))  # so that what is wrong in the file is said of the file
    aliases = {"model": "models", "rule": "rules", "seed": "seeds", "optimizer": "optimizers"}
    said = {aliases.get(name, name): value for name, value in said.items()}
    if not {"optimizers", "lr", "momentum", "weight_decay", "schedule"}.isdisjoint(options) and _complete(said):
        raise InputError(f"{file} has tables of optimizers: change them there")
    return read(said | options, str(file))


def _complete(said: dict[str, Any]) -> bool:
    found: Sequence[Any] = said.get("optimizers", ())
    return any(isinstance(each, dict) for each in (found if isinstance(found, list) else [found]))


def _needs_ray() -> None:
    from rewire.specs.libraries import library

    library("ray")
