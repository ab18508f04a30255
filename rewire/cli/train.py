"""``rewire train``: one run, watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rewire.ablation import Grid, StorageError, check, open_run, read
from rewire.ablation.cell import Epoch
from rewire.ablation.folder import RunFolder, load_grid, new_folder
from rewire.ablation.folder import check as check_folder
from rewire.ablation.here import outcomes
from rewire.ablation.inputs import positive
from rewire.ablation.progress import Listener
from rewire.ablation.work import Unit
from rewire.cli.board import Board
from rewire.cli.live import Screen
from rewire.cli.options import DATA, MODELS, command_line, only, setting, show, stopped, training
from rewire.errors import InputError
from rewire.words import pairs, words


@click.command(epilog="Example: rewire train --model lenet --rule dfa --epochs 20 --out runs/lenet --tensorboard")
@click.option("--model", help=f"{MODELS}  [default: mlp]")
@click.option("--rule", help="A rule; with options, 'fitted(every=100)'.  [default: dfa]")
@click.option("--seed", type=int, help="Of weights, order of the data, and feedback.  [default: 0]")
@click.option("--data", help=f"{DATA}  [default: digits]")
@click.option("--layers", multiple=True, metavar="PATTERN=RULE", help="Rules by layer name; later ones win.")
@click.option("--blocks", multiple=True, metavar="PATTERN", help="Modules fed back as one unit.")
@click.option("--feedback", help="Structure of B for direct rules; with options, 'lowrank(rank=8)'.  [default: dense]")
@click.option("--skip", help="keep or cut.  [default: keep]")
@click.option("--scale", help="auto or a number.  [default: auto]")
@click.option("--optimizer", help="adam or sgd.  [default: adam]")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.002 for adam, 0.05 for sgd]")
@click.option("--momentum", type=float, help="For sgd.  [default: 0]")
@click.option("--weight-decay", type=float, help="[default: 0]")
@click.option("--schedule", help="constant, or cosine to zero over all steps.  [default: constant]")
@click.option("--batch-size", type=int, help="[default: 32]")
@training
@click.option("--tensorboard", is_flag=True, help="Log to DIR/tensorboard too (pip install 'rewire[tensorboard]').")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the run; the same command again goes on with it.  [default: runs/DATE-AND-TIME]",
)
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the run in DIR, as it is.")
def train(
    seed: int | None,
    tensorboard: bool,
    out: Path | None,
    resume: Path | None,
    checkpoint_seconds: float,
    **given: Any,
) -> int:
    """Train one model under one rule, and watch: loss, test accuracy and alignment with backprop.

    The folder is that of an ablation with one cell, so rewire report works on it. Training may be stopped at any
    moment and gone on with; numbers are as if it had not been.
    """
    positive("checkpoint seconds", checkpoint_seconds, zero=True)
    if resume is not None:
        only("train", seed=seed, out=out, **given)
        grid, folder = load_grid(resume), resume
    else:
        grid, folder = _grid(seed, given), out or new_folder(Path("runs"))
    if len(grid.cells()) != 1:
        raise InputError(f"{folder} holds {len(grid.cells())} cells: rewire ablate --resume {folder}")
    check_folder(folder, grid)
    check(grid.cells())
    board = Board(folder / "tensorboard") if tensorboard else None
    try:
        with open_run(folder, grid, command_line()) as run, Screen(Console(stderr=True)) as screen:
            run.forget_failed()  # whoever asks for this one cell again wants it tried again
            _train(run, checkpoint_seconds, _Both([screen, *([board] if board else [])]))
    except (KeyboardInterrupt, StorageError) as error:
        return stopped(error, folder, "train")
    finally:
        if board is not None:
            board.close()
    return show(run.results, folder)


def _grid(seed: int | None, given: Mapping[str, Any]) -> Grid:
    options = {name: value for name, value in given.items() if value not in (None, ())}
    for name in ("model", "rule"):
        if name in options and len(words([options[name]])) != 1:
            raise InputError(f"rewire train takes one {name}; several are for rewire ablate")
    if "layers" in options:
        options["layers"] = [pairs("--layers", "0=fa", options["layers"])]
    if "blocks" in options:
        options["blocks"] = words(options["blocks"])
    if "scale" in options:
        options["scale"] = setting(options["scale"])
    one = {"model": "mlp", "rule": "dfa", "seeds": [0 if seed is None else seed], "controls": False}
    return read(one | options, "options")


def _train(run: RunFolder, every: float, listener: Listener) -> None:
    units = [Unit((cell,), run.path, every) for cell in run.pending()]
    for outcome in outcomes(units, threads=run.grid.threads, listener=listener):
        if outcome is not None:
            for note in outcome.notes:
                click.echo(f"note: {note}", err=True)
            for result in outcome.results:
                run.append(result)


class _Both(Listener):
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners

    def began(self, history: Sequence[Epoch], alignment: Sequence[Mapping[str, Any]]) -> None:
        for listener in self.listeners:
            listener.began(history, alignment)

    def step(self, done: int, total: int, loss: float) -> None:
        for listener in self.listeners:
            listener.step(done, total, loss)

    def epoch(self, epoch: Epoch, alignment: Mapping[str, Any] | None) -> None:
        for listener in self.listeners:
            listener.epoch(epoch, alignment)
