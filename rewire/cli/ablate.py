"""``rewire ablate``: models under several rules and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console

from rewire.ablation import Cell, check, grid, run_grid
from rewire.ablation.inputs import one_of, positive
from rewire.ablation.report import METRICS, table, title
from rewire.ablation.results import Writer
from rewire.cli.words import words

# What is sensible depends on another option, so these stand here and not at the options.
_EPOCHS = {"digits": 15, "fashion-mnist": 3}
_LR = {"adam": 2e-3, "sgd": 0.05}


@click.command(
    epilog="Example: rewire ablate --model cnn --rules 'bp dfa' --seeds 5 --optimizer sgd --momentum 0.9",
)
@click.option(
    "--model",
    "--models",
    "models",
    multiple=True,
    help="Models: mlp, cnn, lenet.  [default: mlp cnn]",
)
@click.option(
    "--rule",
    "--rules",
    "rules",
    multiple=True,
    help="Rules, several in quotes or by repeating.  [default: bp fa usf frsf dfa]",
)
@click.option("--seeds", type=int, default=3, show_default=True, help="How many seeds: 0, 1, ...")
@click.option("--data", default="digits", show_default=True, help="digits (with scikit-learn) or fashion-mnist.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with Fashion-MNIST's four IDX files, gzipped or plain.",
)
@click.option("--epochs", type=int, help="[default: 15 for digits, 3 for fashion-mnist]")
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--optimizer", default="adam", show_default=True, help="adam or sgd.")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.002 for adam, 0.05 for sgd]")
@click.option("--momentum", type=float, default=0.0, show_default=True, help="For sgd.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--schedule", default="constant", show_default=True, help="constant, or cosine to zero over all steps.")
@click.option(
    "--metric",
    default="accuracy",
    show_default=True,
    help="What the table shows of the test images: accuracy or error.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Results go to a new folder in here.",
)
@click.option(
    "--threads",
    type=int,
    default=1,
    show_default=True,
    help="CPU threads for torch. Small models gain nothing from more, and numbers depend on how many.",
)
def ablate(
    models: Sequence[str],
    rules: Sequence[str],
    seeds: int,
    data: str,
    data_dir: Path | None,
    epochs: int | None,
    batch_size: int,
    optimizer: str,
    lr: float | None,
    momentum: float,
    weight_decay: float,
    schedule: str,
    metric: str,
    out: Path,
    threads: int,
) -> None:
    """Train models under several rules and seeds, and print a table.

    All rules of one seed start from the same weights and see the same batches. Step time is measured
    apart from training, against backprop, taking turns on the same batches; final loss is the mean
    training loss of the last epoch.
    """
    positive("seeds", seeds)
    one_of("metric", metric, METRICS)
    positive("threads", threads)
    torch.set_num_threads(threads)
    base = Cell(
        model="mlp",
        rule="bp",
        seed=0,
        data=data,
        data_dir=data_dir,
        epochs=_EPOCHS.get(data, 1) if epochs is None else epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=_LR.get(optimizer, 1.0) if lr is None else lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
    )
    cells = grid(
        base,
        words(models) or ["mlp", "cnn"],
        words(rules) or ["bp", "fa", "usf", "frsf", "dfa"],
        range(seeds),
    )
    check(cells)
    writer = Writer(out)
    # Progress goes to stderr, so that `rewire ablate > table.txt` holds the table alone.
    results = run_grid(cells, writer, Console(stderr=True))
    screen = Console()
    screen.print(f"\n{title(base)}", highlight=False)
    screen.print(table(results, metric))
    screen.print(f"Results: {writer.folder}/results.jsonl and results.csv", highlight=False)
